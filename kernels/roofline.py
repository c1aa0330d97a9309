"""A model of the time a product takes on a GPU, and the choice between fusing and dequantizing the weight first.

Every figure here follows from data sheets (`qlora_jax.gpus.chips`), from instructions counted in the machine code
(`alu_per_weight`; BENCHMARKS.md has the counts), from the assumptions of each kernel (its module's `COST`) and those
below. **Nothing is measured**: where `scripts/benchmark.py kernels` has timed a GPU, its file
(`qlora_jax.kernels.timings_cache`) is consulted first.

The fused kernel, with CTAs of block_m rows and block_n columns on S multiprocessors:

    waves    = ceil(ceil(M / block_m) * ceil(N_out / block_n) / S)         tiles of the busiest multiprocessor
    tensor   = waves * 2 * block_m * block_n * K_in / (bf16_flops / S * tensor_fraction)
    alu      = waves * block_n * K_in * alu_per_weight / (int32_ops / S * ALU_FRACTION)
    memory   = (codes + scales + x + y) / (memory_bandwidth * MEMORY_FRACTION)
    seconds  = LAUNCH + max(memory, max(tensor, alu) + (1 - overlap) * min(tensor, alu))

Dequantize, then multiply, two kernels one after the other:

    dequantize = LAUNCH + max((codes + scales + 2 N K) / bandwidth, N K * alu_per_weight / int32_ops)
    multiply   = LAUNCH + max(2 M N K / (bf16_flops * GEMM_FRACTION), (2 N K + x + y) / bandwidth)

Memory traffic counts every byte once: bytes that several CTAs read are left to the caches, whose bandwidth no sheet
gives. The dequantized weight is taken to go through device memory even where the level-two cache could hold it.
"""

import dataclasses
import functools
import math
from types import MappingProxyType

from qlora_jax.gpus import Chip
from qlora_jax.kernels import timings_cache
from qlora_jax.kernels.mosaic import dequantize, dispatch, tiles
from qlora_jax.kernels.product import NF4, Product
from qlora_jax.quantization import QuantizationConfig, abstract_quantized

# Assumptions, not measurements.
MEMORY_FRACTION = 0.85
"""Share of the sheet's bandwidth that a kernel reading or writing long rows reaches."""
ALU_FRACTION = 0.8
"""Share of the integer instructions a second. All ALU instructions are taken to go to the integer pipe, floats too."""
GEMM_FRACTION = 0.75
"""Share of the sheet's tensor throughput that XLA's product reaches: sheets count with a clock that no power limit
holds."""
MMA_SYNC_SHARE = MappingProxyType({"9.0": 0.6})
"""Share of the sheet's tensor throughput that mma.sync can reach at all, by compute capability, where the sheet counts
another instruction."""
LAUNCH = 3e-6
"""Seconds from one kernel to the next within a program."""
ALU_PER_TABLE = 0.5
"""ALU instructions a weight for each further table in a group of 64: 16 products, 8 conversions, 8 permutes."""
MARGIN = 1.1
"""Factor by which "unfused" must be predicted to be faster, for it takes 2 N K bytes of memory that fusion does not:
the model is not exact, the memory is certain."""

SHAPES = MappingProxyType(
    {
        "7b": {"q k v o": (4096, 4096), "gate up": (11008, 4096), "down": (4096, 11008)},
        "13b": {"q k v o": (5120, 5120), "gate up": (13824, 5120), "down": (5120, 13824)},
        "8b": {"q o": (4096, 4096), "k v": (1024, 4096), "gate up": (14336, 4096), "down": (4096, 14336)},
        "70b": {"q o": (8192, 8192), "k v": (1024, 8192), "gate up": (28672, 8192), "down": (8192, 28672)},
    }
)
"""(N, K) of the linears of LLaMA-7B, LLaMA-13B, Llama-3.1-8B and Llama-2/3-70B."""
LARGEST_M = 16384


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one product.

    Attributes:
        fused: of the fused kernel.
        unfused: of dequantizing the weight and multiplying.
        kernel: the fused kernel, a name of `dispatch.KERNELS`.
        bound: the resource the fused kernel takes most time for: "tensor", "alu" or "memory".
    """

    fused: float
    unfused: float
    kernel: str
    bound: str


@functools.lru_cache(maxsize=256)
def packed_bytes(n: int, k: int, storage: QuantizationConfig = NF4) -> int:
    """Bytes of the codes, scales and minima of a 4-bit (N, K) weight, which a product reads once."""
    return abstract_quantized(
        (n, k), quant_type=storage.quant_type, block_size=storage.block_size, double_quant=storage.double_quant
    ).nbytes


def predict(chip: Chip, product: Product) -> Prediction:
    """Predict the seconds of both implementations by the model above, for a 4-bit weight used in bfloat16."""
    storage = product.storage or NF4
    more = ALU_PER_TABLE * (max(1, tiles.GROUP // storage.block_size) - 1)
    m, n, k = product.m, product.n, product.k
    bandwidth = chip.memory_bandwidth * MEMORY_FRACTION
    int32_ops = chip.int32_ops * ALU_FRACTION
    packed, dequantized, activations = packed_bytes(n, k, storage), 2.0 * n * k, 2.0 * m * (n + k)

    choice = dispatch.select_kernel(chip, product)
    cost, config = choice.kernel.COST, choice.config
    fraction = cost.tensor_fraction * (MMA_SYNC_SHARE.get(chip.compute_capability, 1.0) if cost.mma_sync else 1.0)
    waves = math.ceil(math.ceil(m / config.block_m) * math.ceil(product.n_out / config.block_n) / chip.n_sms)
    weights = waves * config.block_n * product.contracted * chip.n_sms
    times = {
        "tensor": 2.0 * config.block_m * weights / (chip.bf16_flops * fraction),
        "alu": weights * (cost.alu_per_weight + more) / int32_ops,
        "memory": (packed + activations) / bandwidth,
    }
    shorter, longer = sorted((times["tensor"], times["alu"]))
    fused = LAUNCH + max(times["memory"], longer + (1 - cost.overlap) * shorter)

    first = max((packed + dequantized) / bandwidth, n * k * (dequantize.ALU_PER_WEIGHT + more) / int32_ops)
    then = max(2.0 * m * n * k / (chip.bf16_flops * GEMM_FRACTION), (dequantized + activations) / bandwidth)
    return Prediction(fused, 2 * LAUNCH + first + then, choice.name, max(times, key=lambda name: times[name]))


def explain(chip: Chip, product: Product, *, timings: bool = True) -> tuple[str, str]:
    """Return "fused" or "unfused", the faster by timings of this GPU or by the model with a `MARGIN`, and the reason.

    Args:
        chip: the GPU.
        product: what is multiplied.
        timings: consult the file of timings.

    Raises:
        UserError: the file of timings cannot be used; names it.
    """
    if timings and (timed := timings_cache.nearest(chip.title, product)):
        return ("unfused" if timed["unfused"] < timed["fused"] else "fused"), f"timings in {timings_cache.path()}"
    return _by_model(chip, product), "roofline model"


def _by_model(chip: Chip, product: Product) -> str:
    seconds = predict(chip, product)
    return "unfused" if seconds.unfused * MARGIN < seconds.fused else "fused"


def crossover(chip: Chip, n: int, k: int, *, transposed: bool = False, largest: int = LARGEST_M) -> int | None:
    """Smallest M from which on the model chooses "unfused" of NF4, up to `largest`; None if it is fused there.

    In steps of 16 rows: tiles round M up anyway.
    """
    found = None
    for m in range(largest - largest % 16, 0, -16):
        if _by_model(chip, Product(m, n, k, transposed)) == "fused":
            break
        found = m
    return found
