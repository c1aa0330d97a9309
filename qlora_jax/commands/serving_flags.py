"""Flags of the commands that answer: the base, its adapters, and how the next token is chosen."""

import contextlib
import dataclasses
import sys
from collections.abc import Set
from typing import TYPE_CHECKING, Any, Literal

from qlora_jax.choices import CacheDtype
from qlora_jax.cli import arguments, flag
from qlora_jax.commands.base_flags import BaseFlags, base_refusals

if TYPE_CHECKING:
    from qlora_jax.generation import EngineOptions, Sampling
    from qlora_jax.serving.model import ServedModel, ServingConfig

_DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedFlags(BaseFlags):
    """Flags of a base with adapters."""

    adapters: tuple[str, ...] = arguments(
        "Directories of runs, of their checkpoints, or of adapters in PEFT's format, each as NAME=DIRECTORY or named "
        "after its directory; none for the base alone, given as --model."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = flag(  # type: ignore[assignment]
        "auto", "Type of computation, and of weights that are not quantised; auto: bfloat16, on CPUs float32."
    )
    context: int = flag(4096, "Most tokens of a conversation, with the answer: what the cache has room for.")
    kv_cache_dtype: CacheDtype = flag(
        "auto", "Type of keys and values of the tokens before; auto: that of computation. int8 says what it costs."
    )
    prompt_lookup_num_tokens: int = flag(
        0, "Guess at so many tokens where an answer repeats the text before it: the same answer, sooner."
    )
    compilation_cache: str = flag(
        "auto", "Directory that keeps compiled programs, with which the next start is sooner; none: keep none."
    )

    @property
    def served(self) -> "ServingConfig":
        """The base and adapters to load."""
        from qlora_jax.serving.model import ServingConfig, adapter_names

        return ServingConfig(
            adapters=adapter_names(self.adapters),
            model=self.model,
            storage=self.storage,
            dtype=None if self.dtype == "auto" else self.dtype,
        )

    def engine_options(self, slots: int) -> "EngineOptions":
        """Settings of an engine with so many slots."""
        from qlora_jax.generation import EngineOptions

        return EngineOptions(slots, self.context, self.kv_cache_dtype, self.prompt_lookup_num_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags(ServedFlags):
    """Flags of answers, as transformers has them."""

    max_new_tokens: int = flag(512, "Longest answer, in tokens.", group="generation")
    min_new_tokens: int = flag(0, "An answer does not end before so many.", group="generation")
    do_sample: bool = flag(False, "Sample; otherwise the likeliest token is taken.", group="generation")
    temperature: float = flag(1.0, "Logits are divided by it.", group="generation")
    top_k: int = flag(50, "Sample among so many of the likeliest tokens (0: all).", group="generation")
    top_p: float = flag(1.0, "Sample among the likeliest tokens that hold this probability.", group="generation")
    min_p: float = flag(0.0, "Sample among tokens with this share of the likeliest's probability.", group="generation")
    typical_p: float = flag(1.0, "Sample among the tokens of typical information.", group="generation")
    repetition_penalty: float = flag(1.0, "Logits of tokens that came already are divided by it.", group="generation")
    no_repeat_ngram_size: int = flag(0, "No sequence of so many tokens comes twice (0: any).", group="generation")
    seed: int = flag(0, "Seed of the draws.", group="generation")
    stop: str | None = flag(None, r"Text that ends an answer; \n stands for a new line.", group="generation")

    @property
    def sampling(self) -> "Sampling":
        """Settings of the choice of tokens."""
        from qlora_jax.generation import Sampling

        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return () if self.stop is None else (self.stop.replace("\\n", "\n"),)


def served_refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that has no effect beside the others."""
    found = base_refusals(values, given)
    if not values.adapters and values.model is None:
        found.append("give the directory of a run, or a base as `model`.")
    if not 0 <= values.prompt_lookup_num_tokens <= 64:
        found.append(f"`prompt_lookup_num_tokens={values.prompt_lookup_num_tokens}`: must be from 0 to 64.")
    if values.context < 2:
        found.append(f"`context={values.context}`: must be at least 2.")
    return found


def sampling_refusals(values: Any, given: Set[str]) -> list[str]:
    """List those of `served_refusals`, and of flags of draws where nothing is drawn."""
    found = served_refusals(values, given)
    if not values.do_sample:
        drawn = (name for name in _DRAWN if name in given)
        found += [f"`{name}` has no effect without `do_sample`; give that too, or leave it out." for name in drawn]
    return found


def load(flags: ServedFlags) -> "ServedModel":
    """Load the base and its adapters, with a progress bar and notes on the standard error output."""
    from qlora_jax.commands.terminal import progress_bar
    from qlora_jax.serving.cache_cost import cache_cost
    from qlora_jax.serving.model import load_served

    config = flags.served
    with contextlib.redirect_stdout(sys.stderr), progress_bar("Loading the base model") as progress:
        served = load_served(config, progress)
    if flags.kv_cache_dtype == "int8":
        print(cache_cost(served, next(iter(served.names)), flags.kv_cache_dtype), file=sys.stderr)
    if (positions := served.config.max_position_embeddings) < flags.context:
        print(f"Note: the model was made for {positions} tokens; answers get worse beyond them.", file=sys.stderr)
    return served
