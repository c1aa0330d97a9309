import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.batches import array
from fixtures.pairwise import pairwise

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS
from qlora_jax.kernels import StackedWeight, dequantize, matmul, selection, xla
from qlora_jax.quantization import quantize

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# (N, K, block_size): whole blocks in a row; blocks that straddle rows; an odd number of elements.
SHAPES = [(96, 128, 64), (32, 100, 64), (7, 33, 32)]


def make(kind, n, k, block_size=64):
    if kind == "plain":
        return array(n, k, seed=1)
    return jax.tree.map(jnp.asarray, quantize(array(n, k, seed=1), quant_type=kind, block_size=block_size))


def tolerance(dtype, k):
    return {"rtol": 2 * float(jnp.finfo(dtype).eps), "atol": 4e-7 * k}


@pytest.fixture
def on_a6000(monkeypatch):
    """Choices as in a program that is compiled for an A6000."""
    monkeypatch.setattr(selection, "target_chip", lambda: CHIPS["a6000"])


IMPLEMENTATIONS = [
    "xla",
    "interpreted_fused",
    "interpreted_unfused",
    pytest.param("fused", marks=pytest.mark.gpu),
    pytest.param("unfused", marks=pytest.mark.gpu),
]


# M, N, K, block_size: few rows and rows that are tiled, on and off the tiles' edges; a small weight.
PRODUCTS = [(1, 192, 576, 64), (21, 136, 256, 32), (70, 200, 192, 64), (130, 24, 320, 512)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "kind", "double_quant", "product"),
    pairwise([jnp.bfloat16, jnp.float16], ["nf4", "fp4"], [True, False], PRODUCTS),
)
def test_product_and_gradient(implementation, dtype, kind, double_quant, product):
    m, n, k, block_size = product
    w = quantize(array(n, k, seed=1), quant_type=kind, block_size=block_size, double_quant=double_quant)
    w = jax.tree.map(jnp.asarray, w)
    x, dy = array(m, k, dtype=dtype), array(m, n, seed=2, dtype=dtype)
    y, vjp = jax.vjp(lambda x: matmul(x, w, implementation=implementation), x)
    (dx,) = vjp(dy)
    assert y.dtype == dx.dtype == dtype and y.shape == dy.shape and dx.shape == x.shape
    dequantized = np.asarray(dequantize(w, dtype, implementation="xla"), np.float64)
    np.testing.assert_array_equal(dequantize(w, dtype, implementation=implementation), dequantized)
    np.testing.assert_allclose(np.asarray(y, np.float64), np.float64(x) @ dequantized.T, **tolerance(dtype, k))
    np.testing.assert_allclose(np.asarray(dx, np.float64), np.float64(dy) @ dequantized, **tolerance(dtype, n))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [136, 131])  # whole eights lie in the stack as the kernels want them, others do not
def test_one_of_a_stack(implementation, rows):
    weights = [jax.tree.map(jnp.asarray, quantize(array(rows, 192, seed=i))) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = array(40, 192, dtype=jnp.bfloat16)

    @jax.jit  # one program for the whole stack, one for what it is compared with
    def product(w):
        y, vjp = jax.vjp(lambda x: matmul(x, w, implementation=implementation), x)
        return y, vjp(y), dequantize(w, jnp.bfloat16, implementation=implementation)

    for layer, weight in enumerate(weights):
        of_stack = product(StackedWeight(stack, jnp.int32(layer)))
        jax.tree.map(np.testing.assert_array_equal, of_stack, product(weight))


@pytest.mark.parametrize("implementation", ["fused", "unfused", "interpreted_fused"])
def test_float32_activations_are_left_to_xla(implementation, on_a6000):
    w, x = make("nf4", 136, 192), array(40, 192)
    np.testing.assert_array_equal(matmul(x, w, implementation=implementation), matmul(x, w, implementation="xla"))


def test_a_kernel_that_cannot_run_says_why(on_a6000, monkeypatch):
    x = array(3, 64, dtype=jnp.bfloat16)
    for kind, why in (("int8", "the weight is int8, not 4-bit"), ("plain", "the weight is not quantized")):
        with pytest.raises(UserError, match=f"Kernel 'fused' cannot multiply here: {why}. Choose auto or xla."):
            matmul(x, make(kind, 8, 64), implementation="fused")
        assert matmul(x, make(kind, 8, 64)).shape == (3, 8)  # "auto" falls back
    with pytest.raises(UserError, match="no whole groups of 64 codes"):
        matmul(array(3, 96, dtype=jnp.bfloat16), make("nf4", 8, 96, 32), implementation="unfused")
    with pytest.raises(UserError, match="Kernel 'unfused' cannot dequantize here: it is a stack of weights"):
        stack = jax.tree.map(lambda leaf: leaf[None], make("nf4", 8, 64))
        dequantize(stack, jnp.bfloat16, implementation="unfused")
    monkeypatch.undo()
    if jax.default_backend() == "cpu":
        with pytest.raises(UserError, match=r"needs a CUDA GPU of compute capability .* runs on 'cpu': choose auto"):
            matmul(x, make("nf4", 8, 64), implementation="fused")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_xla_takes_every_weight(kind, dtype):
    for n, k, block_size in SHAPES:
        w = make(kind, n, k, block_size)
        x, dy = array(2, 5, k, dtype=dtype), array(2, 5, n, seed=2, dtype=dtype)
        y, vjp = jax.vjp(lambda x, w=w: matmul(x, w, implementation="xla"), x)
        (dx,) = vjp(dy)
        assert y.dtype == dx.dtype == dtype and y.shape == dy.shape and dx.shape == x.shape
        dequantized = np.asarray(dequantize(w, dtype), np.float64)
        np.testing.assert_allclose(np.asarray(y, np.float64), np.float64(x) @ dequantized.T, **tolerance(dtype, k))
        np.testing.assert_allclose(np.asarray(dx, np.float64), np.float64(dy) @ dequantized, **tolerance(dtype, n))


@pytest.mark.parametrize("kind", ["nf4", "int8", "plain"])
def test_jit_and_vectors(kind):
    w, x = make(kind, 64, 128), array(128)
    expected = np.asarray(dequantize(w, jnp.float32)) @ np.asarray(x)
    for f in (matmul, jax.jit(matmul)):  # by the automatic choice
        np.testing.assert_allclose(f(x, w), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(matmul, (0, None))(x[None], w)[0], expected, rtol=1e-5, atol=1e-4)


def test_weights_get_no_gradient():
    plain = make("plain", 8, 64)
    assert not jax.grad(lambda w: matmul(array(3, 64), w).sum())(plain).any()
    gradient = jax.grad(lambda q: matmul(array(3, 64), q).sum(), allow_int=True)(make("nf4", 8, 64))
    assert gradient.codes.dtype == gradient.absmax.dtype == jax.dtypes.float0
    assert not gradient.nested_absmax.any() and not gradient.offset.any()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_residuals_are_the_packed_weight(kind):
    w, x = make(kind, 64, 128), array(16, 128)
    _, vjp = jax.vjp(lambda x: matmul(x, w), x)
    # Not even the activations: everything kept is a buffer of the weight.
    kept = sorted((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(vjp) if leaf.size)
    assert kept == sorted((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(w))


@pytest.mark.parametrize("remat", [False, True])
def test_differentiating_a_scan_stores_neither_weights_nor_tables(remat):
    """Nothing of a weight's size may be among the values that the forward scan hands to the backward one."""
    layers, n = 3, 64
    weights = [make("nf4", n, n) for _ in range(layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)

    def loss(scale, stacked, x):
        def layer(h, inputs):
            w, s = inputs
            return jnp.tanh(matmul(h, w) * s), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (stacked, scale))[0].sum()

    args = (jnp.ones((layers, n)), stacked, array(4, n))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*args).jaxpr
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scans) == 2
    produced = [v.aval for e in jaxpr.eqns for v in e.outvars]
    assert all(aval.dtype != jnp.uint8 and aval.size < n * n for aval in produced), produced
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    np.testing.assert_allclose(compiled(*args), jax.grad(loss)(*args), rtol=1e-4, atol=1e-6)


def test_platforms_are_chosen_while_compiling():
    """Another platform's branches cannot run here; at least they must lower, and cost nothing."""
    q, x = make("nf4", 64, 128), array(4, 128, dtype=jnp.bfloat16)
    traced = jax.jit(lambda x, q: jax.grad(lambda x: matmul(x, q).sum())(x)).trace(x, q)
    traced.lower(lowering_platforms=("cuda",))
    assert " conditional(" not in traced.lower().compile().as_text()


def test_the_backward_pass_can_dequantize_later():
    q, dy = make("nf4", 64, 128), array(4, 64)
    for ours, theirs in zip(xla._after(dy, q), (dy, q), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_dequantize_takes_stacks_and_plain_weights():
    q = make("nf4", 8, 64)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
    assert dequantize(stack, jnp.bfloat16).shape == (2, 8, 64)
    assert dequantize(make("plain", 8, 64), jnp.bfloat16).dtype == jnp.bfloat16


def test_errors():
    q, x = make("nf4", 8, 64), array(3, 64)
    with pytest.raises(UserError, match="Unknown kernel 'fast'; choose one of auto, xla"):
        matmul(x, q, implementation="fast")
    with pytest.raises(ValueError, match=r"not \(3, 63\) and \(8, 64\)"):
        matmul(x[:, :63], q)
    with pytest.raises(ValueError, match="stack of"):
        matmul(x, jax.tree.map(lambda leaf: leaf[None], q))
