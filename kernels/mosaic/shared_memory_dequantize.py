"""Dequantization of a tile of codes in shared memory into a 16-bit tile in shared memory."""

from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from qlora_jax.kernels.mosaic import ptx, tiles


def dequantize_tile(weight_format: tiles.WeightFormat, codes: Any, scales: tuple[jax.Array, ...], out: Any) -> None:
    """Dequantize a tile of codes in shared memory into a 16-bit tile in shared memory, by one warpgroup.

    The caller puts barriers between the writer of `codes`, this, and the readers of `out`.

    Args:
        weight_format: of the weight.
        codes: uint8 [rows, columns / 2] with transforms `swizzle_of(columns / 2)`.
        scales: result of `scales.finish_scales`: scales and, of a format that has them, minima.
        out: weight_format.dtype [rows, columns] with `tile_transforms`.
    """
    rows, columns = out.shape
    row_bytes = columns // 2
    n_groups = rows * columns // tiles.GROUP
    layout = weight_format.scale_layout(n_groups)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(tiles.swizzle_of(row_bytes)),
            plgpu.RefType(tiles.tile_transforms(weight_format.dtype)),
            *[layout] * len(scales),
        )
    )
    def dequantize(_: Any, codes: ir.Value, out: ir.Value, *scales: Any) -> None:
        source, target = mgpu.utils.memref_ptr(codes), mgpu.utils.memref_ptr(out)
        for j, (row, group) in enumerate(ptx.groups_of_thread(n_groups, rows)):
            in_offset = arith.addi(
                arith.muli(row, ptx.const(row_bytes)), arith.muli(group, ptx.const(tiles.GROUP // 2))
            )
            words = []
            for half in range(2):
                words += ptx.load_shared(source, ptx.swizzled(arith.addi(in_offset, ptx.const(16 * half)), row_bytes))
            # Subtiles of 8 rows x 64 elements, 1024 bytes, one after another along the row.
            subtile = arith.addi(arith.muli(arith.shrui(row, ptx.const(3)), ptx.const(columns // tiles.GROUP)), group)
            in_subtile = arith.muli(arith.andi(row, ptx.const(7)), ptx.const(128))
            out_offset = arith.addi(arith.muli(subtile, ptx.const(1024)), in_subtile)
            words_per_scale = len(words) // weight_format.scales_per_group
            for i, word in enumerate(words):
                if i % words_per_scale == 0:
                    codebook = ptx.codebook_of(weight_format, scales, j, i // words_per_scale)
                offset = ptx.swizzled(arith.addi(out_offset, ptx.const(16 * i)), 128)
                ptx.store_shared(target, offset, ptx.dequantize_word(word, codebook))

    dequantize(codes, out, *scales)
