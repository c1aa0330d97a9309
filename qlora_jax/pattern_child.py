"""Child process that matches regular expressions; see `qlora_jax.patterns`.

Reads one request as JSON and answers it as JSON. It imports nothing of this package, so that it starts in hundredths of
a second. An expression that takes too much of the processor ends the process; one that takes too much memory is an
error.
"""

import json
import re
import resource
import sys
from typing import Any

SECONDS = 2
"""Processor time of a request."""
MEMORY = 2**29
"""Bytes of the process."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the names that each expression matches as a whole, or the first expression that is none and why."""
    found = []
    for number, expression in enumerate(request["expressions"]):
        try:
            compiled = re.compile(expression)
            found.append([name for name in request["names"] if compiled.fullmatch(name)])
        except MemoryError:
            return {"error": f"it takes over {MEMORY} bytes of memory", "number": number}
        except (re.error, OverflowError, RecursionError) as error:
            return {"error": str(error)[:200], "number": number}
    return {"found": found}


def main() -> None:
    """Answer one request."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
