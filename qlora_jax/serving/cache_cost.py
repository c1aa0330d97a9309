"""Cost of keeping keys and values in fewer bits: perplexity on text that no run has trained on."""

import math
from typing import NamedTuple

from qlora_jax import data
from qlora_jax.choices import CacheDtype
from qlora_jax.generation import EngineOptions, Request, Sampling
from qlora_jax.serving.model import ServedModel

_MOST_TOKENS = 1024


class CacheCost(NamedTuple):
    """Perplexities of one text.

    Attributes:
        tokens: of it that were predicted.
        dtype: that keys and values were kept in.
        perplexity: with that.
        exact: with the type of computation.
    """

    tokens: int
    dtype: CacheDtype
    perplexity: float
    exact: float

    def __str__(self) -> str:
        """Describe in one line for people."""
        more = f"{100 * (self.perplexity / self.exact - 1):+.2f} %"
        return (
            f"keys and values in {self.dtype}: perplexity {self.perplexity:.4f} on {self.tokens} tokens of held-out "
            f"text, {self.exact:.4f} in the type of computation ({more})"
        )


def cache_cost(served: ServedModel, name: str, dtype: CacheDtype) -> CacheCost:
    """Measure what a type of keys and values costs a name of a served model, on the embedded held-out answers."""
    rows = data.load_rows("default", split="eval")
    text = "\n\n".join(message["content"] for row in rows for message in row["messages"])
    tokens = served.encode_text(text)[:_MOST_TOKENS]
    request = Request(tuple(tokens), Sampling(max_new_tokens=1), served.names[name].adapter, scored=True)

    def perplexity(dtype: CacheDtype) -> float:
        engine = served.engine(EngineOptions(1, len(tokens) + 1, dtype))
        engine.submit(request)
        logprobs = [token.logprob for token in engine.run() if token.prompt and token.logprob is not None]
        return math.exp(-sum(logprobs) / len(logprobs))

    return CacheCost(len(tokens) - 1, dtype, perplexity(dtype), perplexity("auto"))
