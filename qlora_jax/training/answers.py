"""Prompts that a run answers before and after training."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from qlora_jax import data
from qlora_jax.defaults import DEFAULT_DATASET
from qlora_jax.errors import UserError
from qlora_jax.files import read_checked_json, reason, user_path, write_checked_json
from qlora_jax.generation import Sampling, generate
from qlora_jax.generation.text import TextStream
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.model import Model
from qlora_jax.training.progress import announced
from qlora_jax.training.run_directory import RunDirectory

_BEFORE = "answers_before.json"
# Every prompt is answered twice, so that no file comes near; lines of one character take 70 times their size.
_MOST_CHARACTERS = 1 << 22
logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A prompt, answered before and after training."""

    prompt: str
    before: str
    after: str


def read_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return the prompts to answer before and after training: those of `prompts`, or the embedded data's own."""
    if config.prompts is None:
        return data.default_prompts() if config.dataset == DEFAULT_DATASET else ()
    try:
        with user_path(config.prompts).open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`prompts={config.prompts}` cannot be read: {error}.") from error
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"`prompts={config.prompts}` has over {_MOST_CHARACTERS} characters; give fewer prompts.")
    # Not `splitlines`, which takes form feeds and U+2028 for the end of a line.
    prompts = tuple(line for line in text.split("\n") if line.strip())
    if not prompts:
        raise UserError(f"`prompts={config.prompts}` holds no prompt; write one a line.")
    return prompts


@dataclasses.dataclass(frozen=True)
class Questionnaire:
    """Prompts, and what it takes to ask a model as in training on `dataset_format`."""

    prompts: tuple[str, ...]
    config: TrainConfig
    model: Model
    tokenizer: Any
    dataset_format: str

    def ask(self, lora: nnx.State) -> list[str]:
        """Return the model's answers with some adapters."""
        if not self.prompts:
            return []
        config, tokenizer = self.config, self.tokenizer
        encoded = [
            data.encode_prompt(prompt, tokenizer=tokenizer, dataset_format=self.dataset_format).tolist()
            for prompt in self.prompts
        ]
        for prompt, ids in zip(self.prompts, encoded, strict=True):
            data.check_tokens(ids, tokenizer, self.model.base.config.vocab_size, f"prompt {prompt!r}")
        with announced(f"answering {len(encoded)} prompts"):
            tokens = generate(
                self.model.parts.graphdef,
                lora,
                self.model.parts.frozen,
                encoded,
                eos_ids=data.eos_ids(tokenizer, self.model.base.config.eos_token_ids, self.dataset_format),
                sampling=Sampling(
                    max_new_tokens=config.max_new_tokens,
                    do_sample=config.do_sample,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    seed=config.seed,
                ),
            )
        return [self._text(ids) for ids in tokens]

    def _text(self, tokens: Sequence[int]) -> str:
        """Decode an answer, up to where another turn begins."""
        stream = TextStream(self.tokenizer, data.FORMATS[self.dataset_format].stops)
        for token in tokens:
            stream.add(token)
        stream.end()
        return stream.text.strip()

    def recorded(self, directory: RunDirectory) -> list[str] | None:
        """Return the answers from before training that an interrupted run recorded; None if it recorded none."""
        file, missing = directory.path / _BEFORE, "(not asked before training)"
        if not file.exists():
            return None
        try:
            known = read_checked_json(file)["answers"]
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); the answers from before training are lost.", file, reason(error))
            known, missing = {}, "(lost)"
        return [known.get(prompt, missing) for prompt in self.prompts]

    def record(self, directory: RunDirectory, before: Sequence[str]) -> None:
        """Record the answers from before training, for a run that may be interrupted."""
        write_checked_json(directory.path / _BEFORE, {"answers": dict(zip(self.prompts, before, strict=True))})

    def answers(self, before: Sequence[str], after: Sequence[str]) -> list[Answer]:
        """Return the prompts with their answers."""
        return [Answer(*found) for found in zip(self.prompts, before, after, strict=True)]
