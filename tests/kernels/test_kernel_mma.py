import jax.numpy as jnp
import pytest
from fixtures.mosaic_helpers import check

from qlora_jax.kernels.mosaic import mma


@pytest.mark.parametrize(
    "shape, config", [((72, 136, 192), {}), ((33, 200, 256), {"block_m": 32, "block_n": 64, "block_k": 128})]
)
def test_product(shape, config):
    check(mma, shape, **config)


@pytest.mark.parametrize("shape, config", [((72, 200, 128), {}), ((65, 136, 192), {"block_n": 64, "block_k": 128})])
def test_transposed_product(shape, config):
    check(mma, shape, transposed=True, **config)


@pytest.mark.parametrize(
    "kind",
    [
        {"quant_type": "fp4", "dtype": jnp.float16, "double_quant": False},
        {"block_size": 32, "transposed": True},
        {"block_size": 128, "transposed": True},  # blocks that straddle rows
        {"block_size": 4096, "double_quant": False},
    ],
)
def test_kinds_of_weights(kind):
    config = {"block_n": 64, "block_k": 128} if "transposed" in kind else {}
    check(mma, (64, 128, 192), **kind, **config)


def test_no_races():
    # Output tiles that overlap at an edge are written twice, to the same bits, which counts as a race: whole tiles.
    check(mma, (64, 128, 320), races=True)
    check(mma, (64, 328, 128), races=True, transposed=True)
