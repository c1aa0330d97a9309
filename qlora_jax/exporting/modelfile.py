"""Ollama Modelfiles whose template is the one that the model was trained with.

Ollama's templates are programs in another language than chat templates. The few that most models have are known here,
and one is used only if the model's own template renders conversations to the same text; any other model is left to the
template inside its GGUF file, which Ollama recognises by itself or not at all.

Syntax: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and template.md
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.chat_template import render
from qlora_jax.data.formats import FORMATS, conversation_text, turn_stops
from qlora_jax.errors import UserError

logger = logging.getLogger(__name__)

Message = Mapping[str, str]

_USER, _ANSWER, _AGAIN = (
    {"role": r, "content": c} for r, c in (("user", "u 1"), ("assistant", "a 2"), ("user", "u 3"))
)
_SYSTEM = {"role": "system", "content": "s 0"}


@dataclasses.dataclass(frozen=True)
class KnownTemplate:
    """A chat template in both languages.

    Attributes:
        turn: a turn, with {role} and {content}.
        answer: beginning of the answer.
        stop: token that ends a turn.
        roles: names of roles that differ from Ollama's.
        system: it has turns of the role system.
    """

    turn: str
    answer: str
    stop: str
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: bool = True

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation up to the beginning of the answer, as the chat template does."""
        turns = (
            self.turn.format(role=self.roles.get(message["role"], message["role"]), content=message["content"])
            for message in messages
        )
        return "".join(turns) + self.answer

    @property
    def ollama(self) -> str:
        """The template in Ollama's language."""
        role = "{{ .Role }}"
        for theirs, name in self.roles.items():
            role = f'{{{{ if eq .Role "{theirs}" }}}}{name}{{{{ else }}}}{role}{{{{ end }}}}'
        turn = self.turn.format(role=role, content="{{ .Content }}")
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.answer}"

    def default_system(self, rendered: str) -> str | None:
        """Return the system prompt that a template puts before a conversation without one."""
        begin, end = self.turn.format(role="system", content="\0").split("\0")
        match = re.match(f"{re.escape(begin)}(.*?){re.escape(end)}", rendered, re.DOTALL)
        return match[1] if match and self.system else None


KNOWN = {
    "ChatML": KnownTemplate("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "Llama 3": KnownTemplate(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Gemma": KnownTemplate(
        "<start_of_turn>{role}\n{content}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        roles={"assistant": "model", "system": "user"},
        system=False,
    ),
}
"""Name -> template."""


def modelfile(
    weights: str, tokenizer: Any, *, adapter: str | None = None, dataset_format: str | None = None, note: str = ""
) -> str:
    """Return the contents of a Modelfile.

    Args:
        weights: GGUF file of the model, or of the base.
        tokenizer: with the chat template of training.
        adapter: GGUF file of the adapter, if it is not merged.
        dataset_format: of the training data; None for a chat format.
        note: comment on the first line.
    """
    lines = [f"# {note}"] if note else []
    lines += [f"FROM {weights}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    if dataset_format is not None and not FORMATS[dataset_format].chat:
        prompt = [{"role": "user", "content": "{{ .Prompt }}"}]
        lines.append(f'TEMPLATE """{conversation_text(prompt, dataset_format, "Modelfile")}"""')
        stops = [tokenizer.eos_token, *turn_stops(dataset_format)]
    elif (found := _recognised(tokenizer)) is not None:
        template, system = found
        lines.append(f'TEMPLATE """{template.ollama}"""')
        lines += [] if system is None else [f'SYSTEM """{system}"""']
        stops = [template.stop]
    else:
        lines.append("# The chat template is the GGUF file's own.")
        stops = [tokenizer.eos_token]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _recognised(tokenizer: Any) -> tuple[KnownTemplate, str | None] | None:
    """Find the known template that renders as the tokenizer's own, and the system prompt that it adds."""
    if not tokenizer.chat_template:
        return None
    for name, known in KNOWN.items():
        if known.stop not in str(tokenizer.chat_template):
            continue
        try:
            chats = [[_USER], [_USER, _ANSWER, _AGAIN], *([[_SYSTEM, _USER]] if known.system else [])]
            rendered = [render(tokenizer, chat, [(len(chat), True)], "Modelfile")[0] for chat in chats]
        except UserError as error:
            logger.info("the Modelfile has no TEMPLATE: %s", error)
            return None
        # llama.cpp and Ollama put it there themselves.
        rendered = [
            text.removeprefix(tokenizer.bos_token) if _adds_bos(known, tokenizer) else text for text in rendered
        ]
        system = known.default_system(rendered[0])
        before = [] if system is None else [{"role": "system", "content": system}]
        if rendered == [known.render(chat if chat[0] is _SYSTEM else [*before, *chat]) for chat in chats]:
            return known, system
        logger.info("the Modelfile has no TEMPLATE: the model's own is like %s, but renders otherwise", name)
    return None


def _adds_bos(known: KnownTemplate, tokenizer: Any) -> bool:
    """Tell if the tokenizer has a BOS that is not the beginning of every turn."""
    return bool(tokenizer.bos_token) and not known.turn.startswith(tokenizer.bos_token)
