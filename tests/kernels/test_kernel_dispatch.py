"""Choice of kernel and tile sizes for every chip and shape: nothing that a real model has is refused."""

import jax
import jax.numpy as jnp
import pytest
from fixtures.batches import array
from fixtures.pairwise import pairwise

from qlora_jax.gpus import CHIPS
from qlora_jax.kernels.mosaic import dequantize, dispatch, interpret, mma, small_m, tiles
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product
from qlora_jax.quantization import abstract_quantized, quantize

# (N, K) of linears: SmolLM2, TinyLlama, LLaMA 7B 13B 33B 65B, Llama 3 8B and 70B; and of models for tests.
SHAPES = [
    (576, 576), (192, 576), (1536, 576), (576, 1536), (256, 2048), (4096, 4096), (11008, 4096), (4096, 11008),
    (5120, 13824), (17920, 6656), (6656, 17920), (22016, 8192), (1024, 4096), (28672, 8192), (1024, 8192), (64, 64),
    (32, 128), (100, 192), (132, 320),
]  # fmt: skip
ROWS = [1, 17, 100, 129, 16384]


# One of each architecture and size of shared memory.
CHIP_NAMES = ["a100", "a6000", "h100", "b200"]


def assert_has_a_kernel(chip, shape, rows, transposed):
    """Tracing runs every check on shapes that the kernels make."""
    n_in, n_out = (shape[0], shape[1]) if transposed else (shape[1], shape[0])

    def product(x, w):
        return dispatch.matmul(x, dispatch.pack(w), transposed=transposed, chip=CHIPS[chip])

    y = jax.eval_shape(product, jax.ShapeDtypeStruct((rows, n_in), jnp.bfloat16), abstract_quantized(shape))
    assert y.shape == (rows, n_out)


def test_every_shape_has_a_kernel():
    """Every shape meets every chip, every number of rows and both directions."""
    for chip, shape, rows, transposed in pairwise(CHIP_NAMES, SHAPES, ROWS, [False, True]):
        assert_has_a_kernel(chip, shape, rows, transposed)


@pytest.mark.e2e
@pytest.mark.parametrize("chip", CHIP_NAMES)
def test_every_shape_and_number_of_rows_has_a_kernel_on_a_chip(chip):
    for shape, rows, transposed in pairwise(SHAPES, ROWS, [False, True]):
        assert_has_a_kernel(chip, shape, rows, transposed)


def test_every_shape_is_dequantized():
    for shape in SHAPES:
        w = abstract_quantized(shape)
        dequantized = jax.eval_shape(lambda w: dispatch.dequantize(dispatch.pack(w), jnp.bfloat16), w)
        assert dequantized.shape == shape


def test_the_kernel_follows_the_chip():
    chips = {"a100": "mma", "rtx5090": "mma", "h100": "wgmma", "h200": "wgmma", "b200": "tcgen05"}
    for name, kernel in chips.items():
        for transposed in (False, True):
            assert dispatch.select_kernel(CHIPS[name], Product(512, 4096, 4096, transposed)).name == kernel
            few_rows = dispatch.select_kernel(CHIPS[name], Product(32, 4096, 4096, transposed))
            assert few_rows.name == ("tcgen05" if name == "b200" else "mma")
        assert dispatch.select_kernel(CHIPS[name], Product(16, 4096, 4096)).name == "small_m"
        assert dispatch.select_kernel(CHIPS[name], Product(16, 4096, 4096, True)).name != "small_m"


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 5, 8), (8, 3, 4), (11, 7, 4), (9, 1, 8)])
def test_every_tile_is_placed_once_and_in_blocks(rows, columns, width):
    places = [tiles.rasterize(cta, rows, columns, grid_tile_width=width) for cta in range(rows * columns)]
    placed = [tuple(map(int, place)) for place in places]
    assert sorted(placed) == [(row, column) for row in range(rows) for column in range(columns)]
    # While one strip is gone through, no row outside of it is begun.
    for cta, (row, _) in enumerate(placed):
        assert row // width == cta // (width * columns)


def test_two_tiles_share_an_sm():
    """The portable kernel's tiles leave room for a second CTA in shared memory (a CTA's limit is near the SM's)."""
    for chip in CHIPS.values():
        config = mma.config_for(chip, Product(4096, 4096, 4096))
        x, codes, w = (
            block * config.block_k for block in (2 * config.block_m, config.block_n // 2, 2 * config.block_n)
        )
        assert 2 * (config.stages * (x + codes) + w + 1024) <= chip.shared_memory_bytes


def _weights(n, k):
    return PackedWeight.of(jax.tree.map(jnp.asarray, quantize(array(n, k))))


def test_few_rows_and_dequantizing_have_no_races():
    # Whole tiles: what is moved back inside at an edge is written twice, to the same bits, which counts as a race.
    execution = interpret.execution(detect_races=True)
    x = jnp.ones((3, 1088), jnp.bfloat16)
    assert small_m.matmul(x, _weights(32, 1088), config=small_m.Config(), execution=execution).shape == (3, 32)
    assert dequantize.dequantize(_weights(128, 512), jnp.bfloat16, execution=execution).shape == (128, 512)
