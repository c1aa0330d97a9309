"""Times of the 4-bit products on the GPU at hand, with XLA's and an ordinary bfloat16 product for comparison."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qlora_jax.gpus import Chip
from qlora_jax.kernels import roofline, timings_cache, xla
from qlora_jax.kernels.pallas import Fused, Unfused
from qlora_jax.kernels.product import Product
from qlora_jax.quantization import abstract_quantized

IMPLEMENTATIONS = ("fused", "unfused", "xla", "bf16")
"""Names of what can be timed; "bf16" multiplies with a weight that was never quantized."""
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_IMPLEMENTATIONS: Mapping[str, Any] = MappingProxyType({"fused": Fused(), "unfused": Unfused(), "xla": xla})

# A call lasts about this long, to make its start not count; it is called so many times.
_SECONDS_A_CALL, _CALLS = 0.02, 5
# Difference from XLA's result, relative to its largest element: a few times the last bit of bfloat16.
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Time of one implementation of one product.

    Attributes:
        layer: a layer whose weight has this shape, such as "llama-7b down".
        product: what is multiplied.
        implementation: one of `IMPLEMENTATIONS`.
        seconds: median; infinite if the GPU's memory was too small.
        roofline_seconds: the least that the GPU's data sheet allows, see `best_seconds`.
        bound: the sheet's limit, "tensor" or "memory".
    """

    layer: str
    product: Product
    implementation: str
    seconds: float
    roofline_seconds: float
    bound: str

    @property
    def percent(self) -> float:
        """Percentage of the roofline."""
        return 100 * self.roofline_seconds / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the fields, those of the product among them, and the percentage."""
        fields = dataclasses.asdict(self)
        del fields["product"]
        return {**self.product.to_json(), **fields, "percent": self.percent}


def best_seconds(chip: Chip, product: Product, implementation: str) -> tuple[float, str]:
    """Return the least time that a data sheet allows, moving the packed weight, x and y once, and its limit."""
    m, n, k = product.m, product.n, product.k
    weight = 2.0 * n * k if implementation == "bf16" else roofline.packed_bytes(n, k)
    times = {
        "tensor": 2.0 * m * n * k / chip.bf16_flops,
        "memory": (weight + 2.0 * m * (n + k)) / chip.memory_bandwidth,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def operation(implementation: str, transposed: bool) -> Callable[[jax.Array, Any], jax.Array]:
    """Return the product as a function of x and a weight: a quantized one or, for "bf16", an array."""
    if implementation == "bf16":
        return lambda x, w: xla.multiply(x, w, axis=0 if transposed else 1)
    module = _IMPLEMENTATIONS[implementation]
    return module.matmul_transposed if transposed else module.matmul


def random_operands(product: Product, implementation: str, copies: int, seed: int = 0) -> tuple[jax.Array, list[Any]]:
    """Return random x in bfloat16 and `copies` weights: NF4 with double quantization, or bfloat16 for "bf16"."""
    keys = iter(jax.random.split(jax.random.key(seed), 1 + 5 * copies))
    x = jax.random.normal(next(keys), (product.m, product.contracted), jnp.bfloat16)
    if implementation == "bf16":
        return x, [jax.random.normal(next(keys), (product.n, product.k), jnp.bfloat16) for _ in range(copies)]

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(next(keys), leaf.shape, jnp.uint8)
        return jax.random.uniform(next(keys), leaf.shape, leaf.dtype, 0.5, 1.5)

    abstract = abstract_quantized((product.n, product.k))
    return x, [jax.tree.map(fill, abstract) for _ in range(copies)]


def repeated(function: Callable[[jax.Array, Any], jax.Array], trips: int) -> Callable[..., Any]:
    """Return a function (x, weights) that multiplies x with every weight, `trips` times over, in one program.

    Several weights, so that they come from memory as in a model, not from a cache that still holds them. The barriers
    keep XLA from leaving a call out and from moving it out of the loop.
    """

    def run(x: jax.Array, weights: Sequence[Any]) -> Any:
        def body(_: Any, carry: Any) -> Any:
            x, weights, results = carry
            for i in range(len(weights)):
                result = function(x, weights[i])
                x, weights, results = lax.optimization_barrier((x, weights, [*results[:i], result, *results[i + 1 :]]))
            return x, weights, results

        shape = jax.eval_shape(function, x, weights[0])
        empty = [jnp.zeros(shape.shape, shape.dtype) for _ in weights]
        return lax.fori_loop(0, trips, body, (x, list(weights), empty))[2]

    return run


def repeats(chip: Chip, product: Product, implementation: str) -> tuple[int, int]:
    """Return weights to cycle through, twice the level-two cache between two uses of one, and trips through them."""
    n, k = product.n, product.k
    size = 2.0 * n * k if implementation == "bf16" else roofline.packed_bytes(n, k)
    copies = max(1, min(8, math.ceil(2 * chip.l2_bytes / size)))
    expected = max(best_seconds(chip, product, implementation)[0], roofline.LAUNCH)
    return copies, max(1, min(500, round(_SECONDS_A_CALL / (expected * copies))))


def check(product: Product, implementation: str, chip: Chip) -> None:
    """Raise RuntimeError if an implementation differs from XLA's on random operands."""
    if implementation in ("xla", "bf16"):
        return
    x, (w,) = random_operands(product, implementation, 1)
    want, got = (
        np.asarray(jax.jit(operation(name, product.transposed))(x, w), np.float32) for name in ("xla", implementation)
    )
    worst = float(np.abs(got - want).max() / np.abs(want).max())
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"{implementation} is wrong on {chip.title} for {product}: off by {worst:.3g} of the largest"
        )


def seconds_of(product: Product, implementation: str, chip: Chip) -> float:
    """Median seconds of one call: compiled once, warmed up, then repeated within one program."""
    copies, trips = repeats(chip, product, implementation)
    x, weights = random_operands(product, implementation, copies)
    run = jax.jit(repeated(operation(implementation, product.transposed), trips))
    jax.block_until_ready(run(x, weights))
    taken = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) / (trips * copies)


def tuned(measurements: Iterable[Measurement]) -> list[timings_cache.Timing]:
    """Return the timings that `auto` uses."""
    return [
        timings_cache.Timing(measurement.product, measurement.implementation, measurement.seconds)
        for measurement in measurements
        if measurement.implementation in ("fused", "unfused") and math.isfinite(measurement.seconds)
    ]


def measure(
    chip: Chip,
    shapes: dict[tuple[int, int], str],
    *,
    rows: Sequence[int] = ROWS,
    directions: Sequence[bool] = (False, True),
    implementations: Sequence[str] = IMPLEMENTATIONS,
) -> Iterator[Measurement]:
    """Check and time every combination on the default device, one measurement after another.

    Args:
        chip: the data sheet of the device.
        shapes: (N, K) of a weight -> name of a layer that has it.
        rows: M.
        directions: values of `transposed`.
        implementations: of `IMPLEMENTATIONS`.

    Raises:
        RuntimeError: a kernel differs from XLA.
    """
    for (n, k), layer in shapes.items():
        for transposed in directions:
            for m in rows:
                product = Product(m, n, k, transposed)
                for implementation in implementations:
                    try:
                        check(product, implementation, chip)
                        seconds = seconds_of(product, implementation, chip)
                    except jax.errors.JaxRuntimeError as error:
                        if "RESOURCE_EXHAUSTED" not in str(error):
                            raise
                        seconds = math.inf
                    best, bound = best_seconds(chip, product, implementation)
                    yield Measurement(layer, product, implementation, seconds, best, bound)
