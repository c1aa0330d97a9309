"""Child process that renders chat templates; see `qlora_jax.data.chat_template`.

Reads a request a line and answers it in a line, JSON both. It imports nothing of this package, so that it starts fast.
A template that takes too much of the processor ends the process; one that takes too much memory is an error.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 3.0
"""Processor time of a request."""
MEMORY = 2**30
"""Bytes beside those of the interpreter and its libraries."""
OUTPUT = 2**20
"""Characters that a rendering may have beyond 16 times those of its request."""


def answer(line: str) -> dict[str, Any]:
    """Render the messages of a request, all or the first of them, with and without a prompt for an answer."""
    request = json.loads(line)
    rendered = []
    for count, generation_prompt in request["renders"]:
        texts: list[str] = render_jinja_template(  # type: ignore[assignment]  # it returns a pair
            conversations=[request["messages"][:count]],
            chat_template=request["template"],
            add_generation_prompt=generation_prompt,
            **request["variables"],
        )[0]
        if len(texts[0]) > OUTPUT + 16 * len(line):
            return {"error": f"it renders {len(line)} characters of messages to {len(texts[0])}"}
        rendered.append(texts[0])
    return {"rendered": rendered}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or "no reason given"


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = answer(line)
        except MemoryError:
            found = {"error": f"it takes over {MEMORY} bytes of memory"}
        except jinja2.TemplateError as error:  # its own refusals among them
            found = {"error": _short(error)}
        except Exception as error:  # a template may raise whatever its expressions do
            found = {"error": f"{type(error).__name__}: {_short(error)}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
