"""The paged optimizer: the placement of state changes no bit of training, and device memory stays within its bound."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.compile_in_child import call

from qlora_jax.device_memory import device_limit
from qlora_jax.optimizers import OPTIMIZERS, PagedOptimizer, TransferStats, transformation
from qlora_jax.training.config import TrainConfig

MiB = 2**20
RULES = ["adamw_32bit", "adamw_8bit", "lion_8bit", "adafactor", "sgd"]


def rule(name):
    schedule = optax.linear_schedule(1e-2, 1e-3, 50)
    return transformation(name, schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01)


def adapters(layers=6, width=64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (layers, 8, width), "up": {"a": (layers, 8, width), "b": (layers, 4 * width, 8)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def bits(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def train(optimizer, steps=50, needed=None):
    """Bits of adapters, masters and state after some steps, and the traffic of each; `needed(step)` as a program's."""
    lora, state = optimizer.init(adapters())
    traffic = []
    for step in range(steps):
        resident = optimizer.resident_chunks(0 if needed is None else needed(step))
        state, made_room = optimizer.evict(state, resident)
        gradients = adapters(seed=step + 1)
        finite = jnp.asarray(step != 7)
        lora, state, moved = optimizer.update(lora, gradients, state, jnp.float32(0.1), finite, resident)
        traffic.append(made_room + moved)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gradients))
        on_host = [any(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(one)) for one in state]
        assert on_host == [i >= resident and chunk.nbytes > 0 for i, chunk in enumerate(optimizer.chunks)]
    whole = optimizer.masters(lora, state), optimizer.gather(state)
    return (bits(lora), *map(bits, whole)), traffic


# By default three rules in one dtype each and both dtypes, in the tier e2e the others; the tier slow has the rest.
PLACED = [
    pytest.param(
        name,
        dtype,
        marks=pytest.mark.slow if (i + j) % 2 == 0 else pytest.mark.e2e if name in ("lion_8bit", "sgd") else [],
    )
    for i, name in enumerate(RULES)
    for j, dtype in enumerate(("float32", "bfloat16"))
]


@pytest.mark.parametrize(("name", "dtype"), PLACED)
def test_placement_changes_no_bit_of_training(name, dtype):
    limit = 10 * MiB
    make = lambda **kwargs: PagedOptimizer(rule(name), adapters(), dtype=dtype, **kwargs)  # noqa: E731
    want, traffic = train(make())
    assert set(traffic) == {TransferStats()}
    host, traffic = train(make(placement="host"))
    assert host == want
    optimizer = make(placement="auto", limit=limit)
    state_bytes = optimizer.state_bytes
    assert {(one.evicted_bytes, one.returned_bytes, one.paged_bytes) for one in traffic} == {(0, 0, 2 * state_bytes)}
    # All, none, half of it, and back, in no regular order.
    needed = [0, limit, limit - state_bytes // 2, 0, limit - state_bytes, limit - state_bytes // 3, limit + 1]
    order = np.random.default_rng(0).choice(needed, 50)
    auto, traffic = train(optimizer, needed=lambda step: int(order[step]))
    assert auto == want
    if state_bytes:
        total = sum(traffic, TransferStats())
        assert min(total.evicted_bytes, total.returned_bytes, total.paged_bytes) > state_bytes
        assert min(one.seconds for one in traffic if one.paged_bytes) > 0
        # The state began on the host: what has come back went, or is there.
        left = optimizer.resident_chunks(int(order[-1]))
        there = sum(chunk.nbytes for chunk in optimizer.chunks[:left])
        assert total.returned_bytes - total.evicted_bytes == there
        # Never more than it would cost to leave every chunk on the host.
        assert total.evicted_bytes + total.returned_bytes + total.paged_bytes <= 50 * 2 * state_bytes


def test_an_update_is_optax_for_each_matrix():
    lora = adapters()
    optimizer = PagedOptimizer(rule("adamw_32bit"), lora)
    (got, _, _), _ = train(optimizer, steps=3)
    leaves = []
    for index, leaf in enumerate(jax.tree.leaves(lora)):
        for layer in range(leaf.shape[0]):
            matrix = leaf[layer]
            state = rule("adamw_32bit").init(matrix)
            for step in range(3):
                gradient = jax.tree.leaves(adapters(seed=step + 1))[index][layer] * jnp.float32(0.1)
                updates, state = rule("adamw_32bit").update(gradient, state, matrix)
                matrix = optax.apply_updates(matrix, updates)
            leaves.append(matrix)
    got = np.concatenate([np.frombuffer(data, np.float32) for _, data in got])
    np.testing.assert_allclose(got, np.concatenate([np.ravel(leaf) for leaf in leaves]), rtol=1e-6, atol=1e-7)


def test_a_working_copy_is_its_master_rounded():
    (working, masters, _), _ = train(PagedOptimizer(rule("adamw_8bit"), adapters(), dtype="bfloat16"), steps=5)
    for (dtype, data), (_, master) in zip(working, masters, strict=True):
        assert dtype == jnp.bfloat16
        assert np.frombuffer(master, np.float32).astype(jnp.bfloat16).tobytes() == data
    # float32 all along, so small updates are not lost.
    assert masters == train(PagedOptimizer(rule("adamw_8bit"), adapters()), steps=5)[0][0]


def test_gradients_that_are_not_finite_change_nothing():
    optimizer = PagedOptimizer(rule("adamw_8bit"), adapters(), dtype="bfloat16", placement="host")
    lora, state = optimizer.init(adapters())
    want = bits((lora, optimizer.masters(lora, state), optimizer.gather(state)))
    poisoned = jax.tree.map(lambda leaf: leaf.at[:].set(jnp.nan), adapters())
    lora, state, _ = optimizer.update(lora, poisoned, state, jnp.float32(jnp.nan), jnp.asarray(False))
    assert bits((lora, optimizer.masters(lora, state), optimizer.gather(state))) == want


def equal_chunks(**kwargs):
    """32 layers of one matrix in chunks of 12 KiB, a layer each: three float32 of 1024 elements; no counters."""
    lora = {"a": jax.ShapeDtypeStruct((32, 8, 128), jnp.float32)}
    return PagedOptimizer(optax.scale_by_rss(), lora, dtype="bfloat16", **kwargs)


@pytest.mark.parametrize(
    ("placement", "limit", "needed", "resident"),
    [
        ("device", 100, 1000, 32),
        ("host", None, 0, 0),
        ("host", 10**9, 0, 0),
        ("auto", None, 10**12, 32),
        # In chunks: 32 of state; whatever does not stay passes through three.
        ("auto", 100, 60, 32),
        ("auto", 100, 68, 32),
        ("auto", 100, 69, 28),
        ("auto", 100, 70, 27),
        ("auto", 100, 96, 1),
        ("auto", 100, 97, 0),
        ("auto", 100, 99, 0),
        ("auto", 100, 200, 0),
    ],
)
def test_what_stays_on_the_device(placement, limit, needed, resident):
    """`limit` and `needed` count in chunks."""
    nbytes = equal_chunks().chunks[0].nbytes
    optimizer = equal_chunks(placement=placement, limit=None if limit is None else limit * nbytes)
    assert len(optimizer.chunks) == 32
    assert {chunk.nbytes for chunk in optimizer.chunks} == {nbytes}
    assert optimizer.resident_chunks(needed * nbytes) == resident
    # A program of unknown needs gets all that can be given.
    assert optimizer.resident_chunks(math.inf) == (32 if placement == "device" or (limit is None and resident) else 0)
    # Less room is never more chunks.
    counts = [optimizer.resident_chunks(needed * nbytes // 2) for needed in range(250)]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 50_000, 2**30])
def test_chunks_cover_the_state_once(chunk_bytes):
    lora = adapters(layers=30)
    optimizer = PagedOptimizer(rule("adamw_32bit"), lora, dtype="bfloat16", chunk_bytes=chunk_bytes)
    _, state = optimizer.init(adapters(layers=30))
    assert [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in state] == [c.nbytes for c in optimizer.chunks]
    assert sum(chunk.nbytes for chunk in optimizer.chunks) == optimizer.state_bytes
    covered = [
        (chunk.leaf, layer) for chunk in optimizer.chunks for layer in range(chunk.start, chunk.start + chunk.layers)
    ]
    assert covered == [(leaf, layer) for leaf in range(3) for layer in range(30)]
    bound = min(chunk_bytes, optimizer.state_bytes / 128)
    assert all(chunk.layers == 1 or chunk.nbytes <= bound for chunk in optimizer.chunks)


def test_at_most_a_twentieth_of_the_state_is_on_the_device(monkeypatch):
    """Counted where it could be most: of all live arrays, when an update has been sent off."""
    layers = 96
    optimizer = PagedOptimizer(rule("adamw_32bit"), adapters(layers), dtype="bfloat16", placement="host")
    lora, state = optimizer.init(adapters(layers))
    assert optimizer.host_bytes(state) == optimizer.state_bytes
    gradients = adapters(layers, seed=1)
    others = {id(leaf) for leaf in jax.live_arrays()}
    program, live = optimizer.update_program, []

    def spied(*args, **kwargs):
        leaf, one = program(*args, **kwargs)
        # bfloat16 is the working copy, new arrays in old places.
        arrays = [array for array in jax.live_arrays() if id(array) not in others and array.dtype != jnp.bfloat16]
        live.append(sum(array.nbytes for array in arrays if array.sharding.memory_kind == "device"))
        return leaf, one

    monkeypatch.setattr(optimizer, "update_program", spied)
    lora, state, traffic = optimizer.update(lora, gradients, state, jnp.float32(1), jnp.asarray(True))
    assert len(live) == len(optimizer.chunks) > 128
    largest = max(chunk.nbytes for chunk in optimizer.chunks)
    assert largest < max(live) <= 3 * largest
    assert 2 * largest < traffic.peak_bytes <= optimizer.paging_bytes == 3 * largest
    temporary = max(
        program.lower(*optimizer.abstract_update(chunk), layers=chunk.layers)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for chunk in {chunk._replace(start=0): chunk for chunk in optimizer.chunks}
    )
    assert optimizer.paging_bytes + temporary <= 0.05 * optimizer.state_bytes
    assert optimizer.host_bytes(state) == optimizer.state_bytes


def test_one_program_a_kind_of_leaf():
    """An update is compiled once for each shape and chunk length, however often the state changes its place."""
    optimizer = PagedOptimizer(rule("adamw_32bit"), adapters(), placement="auto", limit=10 * MiB)
    train(optimizer, steps=6, needed=lambda step: (0, 10 * MiB)[step % 2])
    kinds = {(optimizer.abstract_update(chunk)[0].shape, chunk.layers) for chunk in optimizer.chunks}
    assert optimizer.update_program._cache_size() == len(kinds) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RULES)
def test_a_leaf_without_layers_counts_as_one_layer(name, dtype):
    """A trained head [rows, columns] beside stacked adapters, wherever the state lies, saved and restored."""
    rng = np.random.default_rng(3)
    head, lora = rng.normal(size=(80, 64)).astype(np.float32), rng.normal(size=(4, 8, 64)).astype(np.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def run(head, placement):
        values = {"head": head, "lora": lora}
        optimizer = PagedOptimizer(rule(name), values, dtype=dtype, placement=placement)
        working, state = optimizer.init(jax.tree.map(jnp.asarray, values))
        for step in range(4):
            gradients = jax.tree.map(lambda leaf: jnp.sin(leaf + step), values)  # noqa: B023
            working, state, _ = optimizer.update(working, gradients, state, jnp.float32(1), jnp.asarray(True))
            if step == 1:
                saved = jax.tree.map(np.array, (optimizer.masters(working, state), optimizer.gather(state)))
                working, state = optimizer.scatter(*saved, jax.tree.map(lambda _: sharding, values))
        assert jax.tree.map(jnp.shape, working) == jax.tree.map(np.shape, values)
        assert [leaf.shape for leaf in jax.tree.leaves(optimizer.abstract())] == list(
            map(np.shape, jax.tree.leaves(saved))
        )
        return optimizer.state_bytes, (working, optimizer.masters(working, state), optimizer.gather(state))

    nbytes, of_one_layer = run(head[None], "device")
    results = []
    for placement in ("device", "host"):
        state_bytes, result = run(head, placement)
        assert state_bytes == nbytes
        for got, want in zip(jax.tree.leaves(result[:2]), jax.tree.leaves(of_one_layer[:2]), strict=True):
            # XLA may fuse the same arithmetic of other shapes in another way.
            np.testing.assert_allclose(np.ravel(got), np.ravel(want), rtol=1e-5, atol=1e-6)
        results.append(bits(result))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit"])
def test_gathered_and_scattered_into_other_chunks(name, dtype):
    def optimizer(**kwargs):
        return PagedOptimizer(rule(name), adapters(), dtype=dtype, **kwargs)

    def steps(optimizer, lora, state, first, last):
        for step in range(first, last):
            gradients = adapters(seed=step)
            lora, state, _ = optimizer.update(lora, gradients, state, jnp.float32(1), jnp.asarray(True))
        return lora, state

    host = optimizer(placement="host")
    lora, state = steps(host, *host.init(adapters()), 0, 3)
    saved = jax.tree.map(np.array, (host.masters(lora, state), host.gather(state)))
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(saved)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(host.abstract())
    ]
    want = bits(steps(host, lora, state, 3, 6)[0])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: sharding, adapters())
    for other in (optimizer(), optimizer(placement="auto", limit=MiB), optimizer(placement="host", chunk_bytes=1)):
        assert bits(steps(other, *other.scatter(*saved, shardings), 3, 6)[0]) == want


def test_every_flag_value_is_an_optimizer():
    hints = typing.get_type_hints(TrainConfig)
    assert set(typing.get_args(hints["optim"])) == set(OPTIMIZERS)
    field = {field.name: field for field in dataclasses.fields(TrainConfig)}["optim"]
    assert field.default == "paged_adamw_32bit"


def test_a_cpu_has_no_limit():
    assert device_limit(jax.devices("cpu")[0]) is None


@pytest.mark.compile
def test_gradients_of_micro_batches_add_up_in_one_buffer():
    """Compiled for a GPU: four micro-batches take no more memory than one, and no second tree of gradients."""
    result = call("fixtures.compiled_programs:gradient_bytes", "a6000", "wide", [1, 4])
    one, four = result["temporary_bytes"]
    tree, other = result["output_bytes"]
    elements = 2 * 24 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert tree == other >= 4 * elements
    # What is scheduled beside what differs a little; a second tree would be one more.
    assert abs(four - one) < tree / 2


@pytest.mark.compile
@pytest.mark.parametrize("name", RULES)
def test_an_update_on_a_gpu_is_in_place(name):
    """A chunk's update writes adapters and state where they were; its temporaries are below a chunk."""
    result = call("fixtures.compiled_programs:paged_update", "a6000", name)
    for program in result["programs"]:
        assert program["alias_bytes"] >= program["leaf_bytes"] + program["chunk_bytes"]
        assert 3 * program["chunk_bytes"] + program["temporary_bytes"] <= 0.05 * result["state_bytes"]
