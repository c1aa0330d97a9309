"""The undocumented parts of JAX that nn/jax_internals.py relies on."""

import jax
import jax.numpy as jnp

from qlora_jax.nn import jax_internals


def test_accumulators_say_what_is_asked_and_where_it_goes():
    seen = {}

    @jax.custom_vjp
    def double(x, y):
        return 2 * x + y

    def backward(_, cotangent, for_x, for_y):
        for name, accumulator in (("x", for_x), ("y", for_y)):
            seen[name] = jax_internals.is_asked(accumulator), jax_internals.given_ref(accumulator) is not None
        if (ref := jax_internals.given_ref(for_x)) is None:
            for_x.accum(2 * cotangent)
        else:
            ref[...] += 2 * cotangent

    double.defvjp_with_accums(lambda x, y: (double(x, y), None), backward)

    assert jax.grad(double)(3.0, 1.0) == 2.0
    assert seen == {"x": (True, False), "y": (False, False)}

    @jax.jit
    def into(x):
        total = jax.new_ref(jnp.ones(()))
        _, vjp = jax.vjp(lambda x: double(x, 1.0), x)
        vjp.with_refs(total)(1.0)
        return jax.freeze(total)

    assert into(3.0) == 3.0
    assert seen == {"x": (True, True), "y": (False, False)}
