"""Temporaries of compiled programs attributed to named scopes."""

import time

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.planner.scopes import OTHER, scope_of, temporaries_by_scope


@pytest.mark.parametrize(
    ("operation", "scope"),
    [
        ("jit(gradients)/jvp(mlp)/while/body/gate_proj/dot_general", "mlp/gate_proj"),
        ("jit(gradients)/transpose(jvp(mlp))/gate_proj/transpose(jvp(adapter))/mul", "mlp/gate_proj/adapter"),
        ("jit(f)/head/jit(g)/head/branch_1_fun/checkpoint/rematted_computation/td,vd->tv/dot", "head"),
        ("jit(gradients)/jvp()/while/body/eval_jaxpr/cond/branch_0_fun/custom_vjp_call/add", OTHER),
        ("jit(f)/shard_map/attention/dot_product_attention_fwd_wrapper/a<lambda>/custom-call",
         "attention/dot_product_attention_fwd_wrapper"),
        ("", OTHER),
    ],
)  # fmt: skip
def test_scopes_of_operations(operation, scope):
    assert scope_of(operation) == scope


def test_temporaries_are_those_of_the_fullest_moment(tmp_path):
    """Sorting cannot be fused, so its operand and its result exist: two arrays in the narrow scope, two in the wide."""

    new = float(time.time_ns() % 1_000_003)  # a program out of a cache would write nothing

    def function(x):
        with jax.named_scope("narrow"):
            x = x + new
            y = jnp.sort(jnp.sort(x, axis=0) @ x.T, axis=0)
        with jax.named_scope("wide"):

            def body(_, h):
                return jnp.sort(jnp.sin(h), axis=1) @ h.T @ h

            return jax.lax.fori_loop(0, 3, body, jnp.tile(y, (1, 8))).sum()

    lowered = jax.jit(function).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    found = temporaries_by_scope(tmp_path, compiled.as_text())
    heap = compiled.memory_analysis().temp_size_in_bytes
    array = 8 * 64 * 64 * 4
    assert 0.9 * heap <= sum(found.values()) <= heap
    assert found["wide"] > 2 * array > 0.5 * heap
    assert "narrow" not in found  # over by then


def test_a_program_of_which_nothing_was_written_has_no_scopes(tmp_path):
    assert temporaries_by_scope(tmp_path, "HloModule m") == {}
