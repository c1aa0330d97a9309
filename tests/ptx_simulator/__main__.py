"""Lists what a PTX file uses and the simulator does not model: `python -m ptx_simulator --list file.ptx`, in tests/."""

import collections
import re
import sys

from ptx_simulator import unsupported


def main(argv):
    if len(argv) != 2 or argv[0] != "--list":
        print("usage: python -m ptx_simulator --list file.ptx")
        return 2
    with open(argv[1]) as file:
        by_entry = unsupported(file.read())
    for entry, messages in by_entry.items():
        print(f"{entry}: {len(messages)} unsupported")
        opcodes = collections.Counter(re.sub(r"^line \d+: (\S+?):? .*", r"\1", message) for message in messages)
        for opcode, n in opcodes.most_common():
            print(f"  {n:5d} {opcode}")
    return 1 if any(by_entry.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
