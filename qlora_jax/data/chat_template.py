"""Rendering of chat templates, which are programs from model repositories.

transformers' sandbox keeps them from files, from the network and from Python's internals. Against templates that never
end or fill the memory, it runs in a child process with limits of its own.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

# It imports transformers, and this process need not.
_CHILD = Path(__file__).with_name("template_child.py")


class TemplateUnusable(UserError):
    """A chat template that must not be run on other rows either: it was stopped."""


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], renders: Sequence[tuple[int, bool]], position: str
) -> list[str]:
    """Render a conversation with the tokenizer's chat template, as its `apply_chat_template` does.

    Args:
        tokenizer: has a chat template.
        messages: of the conversation; values that are null are left out, and the role developer is system's name in
            newer APIs, which a template that does not mention it would pass over or take for another.
        renders: for each rendering, how many of the messages it has, and if it ends with a prompt for an answer.
        position: of the conversation, for messages.

    Raises:
        UserError: the template refuses the messages or fails; `TemplateUnusable` if it had to be stopped.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"{position}: the tokenizer's chat template cannot be used: {str(error).rstrip('.')}."
        ) from error
    named = {} if "developer" in template else {"developer": "system"}
    request = {
        "template": template,
        "variables": {
            name: list(map(str, value)) if isinstance(value, list | tuple) else str(value)
            for name, value in tokenizer.special_tokens_map.items()
        },
        "messages": [
            {key: value for key, value in message.items() if value is not None}
            | {"role": named.get(message["role"], message["role"])}
            for message in messages
        ],
        "renders": list(renders),
    }
    answer = _child().ask(json.dumps(request, default=lambda value: f"<{type(value).__name__}>"), position)
    if "error" in answer:
        refusal = str(answer["error"]).rstrip(".")
        raise UserError(f"{position}: the tokenizer's chat template refuses the messages: {refusal}.")
    rendered: list[str] = answer["rendered"]
    return rendered


@functools.cache
def _child() -> "_Child":
    child = _Child()
    atexit.register(child.stop)
    return child


class _Child:
    """The child process, which is started when it is first asked, and again after it was stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: str, position: str) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # an answer that nobody waits for would be taken for that of the next request
                self.stop()
                raise
            if line:
                answer: dict[str, Any] = json.loads(line)
                return answer
            status = process.wait()
            self.stop()
        why = "takes over three seconds" if status == -signal.SIGPROF else f"ended its process with status {status}"
        raise TemplateUnusable(
            f"{position}: the tokenizer's chat template {why}; use the tokenizer of another version of the model."
        )

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the run, which may go on to its end
                env={**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            )
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
