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
from typing import Any, NamedTuple

from qlora_jax import data
from qlora_jax.data.chat_template import render
from qlora_jax.errors import UserError
from qlora_jax.exporting.templates import adds_bos

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


class _Found(NamedTuple):
    """A known template that a tokenizer has.

    Attributes:
        template: that it is.
        system: prompt that it adds to a conversation without one.
        bos: it begins with BOS, which is not that of its first turn.
    """

    template: KnownTemplate
    system: str | None
    bos: bool


def modelfile(
    weights: str, tokenizer: Any, *, adapter: str | None = None, dataset_format: str = data.CHAT, note: str = ""
) -> str:
    """Return the contents of a Modelfile.

    Args:
        weights: GGUF file of the model, or of the base.
        tokenizer: with the chat template of training.
        adapter: GGUF file of the adapter, if it is not merged.
        dataset_format: of the training data.
        note: comment on the first line.
    """
    lines = [f"# {note}"] if note else []
    lines += [f"FROM {weights}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    chosen = data.FORMATS[dataset_format]
    if chosen.prompt is not None:
        lines.append(f'TEMPLATE """{_start(tokenizer, bool(tokenizer.bos_token))}{_prompt_template(chosen)}"""')
        stops = [tokenizer.eos_token, *chosen.stops]
    elif (found := _recognised(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{_start(tokenizer, found.bos)}{found.template.ollama}"""')
        lines += [] if found.system is None else [f'SYSTEM """{found.system}"""']
        stops = [found.template.stop]
    else:
        lines.append("# The chat template is the GGUF file's own.")
        stops = tokenizer.convert_ids_to_tokens(data.eos_ids(tokenizer, (), dataset_format))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _start(tokenizer: Any, bos: bool) -> str:
    """Return the BOS that a text begins with in training, unless llama.cpp and Ollama put it there themselves."""
    return str(tokenizer.bos_token) if bos and not adds_bos(tokenizer) else ""


def _prompt_template(chosen: data.RowFormat) -> str:
    """Return the prompt of a format in Ollama's language; of one without turns, it has the last question alone."""
    assert chosen.prompt is not None
    before, after = chosen.prompt
    asked = f"{before}{{{{ .Content }}}}{after}"
    if not chosen.turns:
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        return f"{{{{- range $i, $message := .Messages }}}}{last}{asked}{{{{ end }}}}{{{{ end }}}}"
    # As in training: a space, which an answer that was generated may have brought.
    apart = '{{ if and .Content (not (eq (slice .Content 0 1) " " "\\n")) }} {{ end }}'
    answered = f'{{{{ else if eq .Role "assistant" }}}}{apart}{{{{ .Content }}}}'
    return f'{{{{- range .Messages }}}}{{{{ if eq .Role "user" }}}}{asked}{answered}{{{{ end }}}}{{{{ end }}}}'


def _recognised(tokenizer: Any) -> _Found | None:
    """Find the known template that renders as the tokenizer's own."""
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
        bos = tokenizer.bos_token or ""
        begins = bool(bos) and not known.turn.startswith(bos) and rendered[0].startswith(bos)
        rendered = [text.removeprefix(bos) if begins else text for text in rendered]
        system = known.default_system(rendered[0])
        before = [] if system is None else [{"role": "system", "content": system}]
        if rendered == [known.render(chat if chat[0] is _SYSTEM else [*before, *chat]) for chat in chats]:
            return _Found(known, system, begins)
        logger.info("the Modelfile has no TEMPLATE: the model's own is like %s, but renders otherwise", name)
    return None
