"""Few rows of x, as in decoding: every code is read once, straight into the registers that decode it.

A CTA owns 16 rows of W. Its four warps take turns along K, 256 columns at a time, multiply with mma.sync (W as the left
operand, x as the right one, so that eight rows of x are enough to fill it) and add their sums at the end. Reading takes
most of the time: the codes and scales of a step are on their way while the step before is decoded.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import machine
from qlora_jax.kernels.mosaic.operands import Operands

MAX_ROWS = 16
# Rows of W of one CTA, and columns of one step.
BLOCK_N, BLOCK_K = 16, 1024


def matmul(x: jax.Array, w: Operands, *, seam: ModuleType = machine, interpret: Any = None) -> jax.Array:
    """Return x @ W^T [M, N] in x.dtype, summed in float32.

    Args:
        x: [M, K], bfloat16 or float16, M <= 16.
        w: the weight, N >= 16. The last CTA's rows are moved back inside.
        seam: `machine`, or `reference` in interpret mode.
        interpret: Pallas interpret parameters.
    """
    m, k = x.shape
    n, _ = w.shape
    m_tiles = -(-m // 8)
    steps = -(-k // BLOCK_K)
    decoding = w.decoding(x.dtype)

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, partial, scale_scratch = refs
        layer = layer_ref[0]
        row = lax.min(lax.axis_index("n") * BLOCK_N, n - BLOCK_N)
        scales = seam.Scales.of(decoding, (BLOCK_N, BLOCK_K), layer, scale_refs, scale_scratch, fragments=True)
        layer_codes = codes.at[layer]

        def read(step: Any) -> Any:
            column = step * BLOCK_K
            return seam.stream_codes(decoding, layer_codes, row, column), scales.fetch(row, column)

        def body(step: Any, carry: Any) -> Any:
            acc, (words, scale) = carry
            upcoming = read(lax.min(step + 1, steps - 1))
            acc = seam.stream_multiply(decoding, acc, words, scales.finish(scale), x_ref, step * BLOCK_K)
            return acc, upcoming

        first = read(jnp.int32(0))
        seam.barrier()  # the table of scales is in place
        acc, _ = lax.fori_loop(0, steps, body, (seam.zero_fragments(m_tiles), first))
        seam.store_fragments(acc, partial, out, row)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(-(-n // BLOCK_N),),
        grid_names=("n",),
        scratch_types=[
            plgpu.SMEM((4, BLOCK_N, 8 * m_tiles), jnp.float32),
            plgpu.SMEM((256,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, *w.arrays)
