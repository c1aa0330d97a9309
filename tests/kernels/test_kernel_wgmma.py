import jax.numpy as jnp
import pytest
from fixtures.mosaic_helpers import check

from qlora_jax.kernels.mosaic import wgmma
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.mosaic.scale_operands import ScaleOperands


@pytest.mark.parametrize(
    "shape, config",
    [
        ((264, 136, 192), {}),  # edges in M and N; fewer steps than stages
        ((136, 264, 640), {"block_m": 128, "block_n": 256, "dequantized": 2}),  # the rings go round
        ((128, 128, 64), {"block_m": 128}),  # one step
    ],
)
def test_product(shape, config):
    check(wgmma, shape, **config)


@pytest.mark.parametrize(
    "shape, config",
    [
        ((264, 456, 256), {}),
        ((128, 328, 192), {"block_m": 128, "block_n": 64, "block_k": 128, "stages": 2}),  # K of 64 x an odd number
    ],
)
def test_transposed_product(shape, config):
    check(wgmma, shape, transposed=True, **config)


def test_other_weights():
    kind = {"quant_type": "fp4", "dtype": jnp.float16, "block_size": 32, "double_quant": False}
    check(wgmma, (128, 192, 192), block_m=128, **kind)
    kind = {"block_size": 128, "block_n": 64, "block_k": 128, "stages": 2}  # blocks that straddle rows
    check(wgmma, (128, 192, 192), transposed=True, block_m=128, **kind)


def test_no_races():
    # Output tiles that overlap at an edge are written twice, to the same bits, which counts as a race: whole tiles.
    check(wgmma, (128, 256, 640), races=True, block_m=128)
    check(wgmma, (128, 584, 256), races=True, block_m=128, transposed=True)


def test_sizes_that_do_not_fit():
    for config in ({"block_m": 64}, {"block_n": 64}, {"stages": 3}, {"dequantized": 1}, {"block_n": 256, "stages": 2}):
        with pytest.raises(ValueError):
            wgmma.Config(**config)
    for shape in ((132, 128, 64), (120, 128, 64), (128, 132, 64), (128, 64, 64), (128, 128, 96)):
        m, n, k = shape
        codes, scales = jnp.zeros((1, n, k // 2), jnp.uint8), jnp.ones((1, n * k // 32))
        w = PackedWeight(codes, ScaleOperands(scales), jnp.zeros(1, jnp.int32), "nf4", 32, n)
        with pytest.raises(ValueError, match=r"multiples of 8|less than a tile|not whole tiles"):
            wgmma.matmul(jnp.zeros((m, k), jnp.bfloat16), w, config=wgmma.Config(block_m=128))
    with pytest.raises(ValueError, match="128 columns"):
        w = PackedWeight(jnp.zeros((1, 128, 64), jnp.uint8), ScaleOperands(jnp.ones((1, 512))), w.layer, "nf4", 32, 128)
        wgmma.matmul(jnp.zeros((128, 64), jnp.bfloat16), w, config=wgmma.Config(block_m=128))
