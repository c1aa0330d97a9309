"""The model that chooses between fusing and dequantizing first, and the timings and records that overrule it."""

import dataclasses
import errno
import itertools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.pairwise import pairwise

from qlora_jax import kernels
from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS
from qlora_jax.kernels import Choice, roofline, selection, timings_cache, xla
from qlora_jax.kernels.product import Product
from qlora_jax.kernels.timings_cache import Timing
from qlora_jax.quantization import QuantizationConfig, abstract_quantized, quantize

ENTRY = {"m": 512, "n": 4096, "k": 4096, "transposed": False, "implementation": "fused", "seconds": 1.0}
# (N, K) of the linears of LLaMA-7B and 13B and Llama-3.1-8B, and of Llama-2-70B.
SHAPES = [
    (4096, 4096), (11008, 4096), (4096, 11008), (5120, 5120), (13824, 5120), (5120, 13824), (1024, 4096), (14336, 4096),
    (4096, 14336),
]  # fmt: skip
SHAPES_70B = [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]
TABLED = ("a6000", "rtx4090", "a100", "h100", "b200")


@pytest.fixture(autouse=True)
def timings_file(monkeypatch, tmp_path):
    """No timings of the person who runs the tests; where they would be."""
    monkeypatch.delenv(timings_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-jax" / "kernels.json"


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_more_rows_and_larger_weights_take_longer(name, transposed):
    rows = (1, 8, 16, 17, 33, 64, 65, 128, 300, 1024, 5000, 16384)
    for n, k in SHAPES + SHAPES_70B:
        found = [roofline.predict(CHIPS[name], Product(m, n, k, transposed)) for m in rows]
        for fewer, more in itertools.pairwise(found):
            assert 0 < fewer.fused <= more.fused
            assert 0 < fewer.unfused <= more.unfused
        larger = roofline.predict(CHIPS[name], Product(512, 2 * n, k, transposed))
        assert larger.fused >= roofline.predict(CHIPS[name], Product(512, n, k, transposed)).fused


@pytest.mark.parametrize("name", CHIPS)
def test_smaller_blocks_take_longer_where_dequantizing_is_the_bound(name):
    for m in (64, 512, 4096):
        storages = (QuantizationConfig(*of) for of in (("nvfp4", 16), ("mxfp4", 32), ("nf4", 64), ("nf4", 256)))
        found = [roofline.predict(CHIPS[name], Product(m, 4096, 4096, storage=storage)) for storage in storages]
        for smaller, larger in itertools.pairwise(found):
            assert smaller.fused >= larger.fused and smaller.unfused >= larger.unfused
        assert found[2].bound == "memory" or found[2].fused == found[3].fused
        if found[2].bound == "alu":
            assert found[0].fused > found[1].fused > found[2].fused


@pytest.mark.parametrize("name", CHIPS)
def test_no_prediction_beats_the_data_sheet(name):
    chip = CHIPS[name]
    for m, n, k in ((1, 4096, 4096), (100, 8192, 28672), (16384, 11008, 4096)):
        found = roofline.predict(chip, Product(m, n, k))
        flops = 2 * m * n * k / chip.bf16_flops
        assert found.fused > max(flops, (n * k / 2 + 2 * m * (n + k)) / chip.memory_bandwidth)
        assert found.unfused > flops + 2 * n * k / chip.memory_bandwidth


def test_reading_is_what_generating_a_token_takes_on_cards_with_slow_memory():
    n, k = 4096, 4096
    for name in ("a6000", "rtx4090"):
        found = roofline.predict(CHIPS[name], Product(1, n, k))
        assert (found.kernel, found.bound) == ("small_m", "memory")
        wanted = roofline.packed_bytes(n, k) / (CHIPS[name].memory_bandwidth * roofline.MEMORY_FRACTION)
        np.testing.assert_allclose(found.fused - roofline.LAUNCH, wanted, rtol=0.01)


@pytest.mark.parametrize(
    ("storage", "bits"),
    [
        (QuantizationConfig(), 4 + 8 / 64 + 32 / (64 * 256)),
        (QuantizationConfig("fp4", 128, False), 4 + 32 / 128),
        (QuantizationConfig("q4_0"), 4 + 16 / 32),
        (QuantizationConfig("q4_1"), 4 + 32 / 32),
        (QuantizationConfig("uint4", 128), 4 + (16 + 8) / 128),
        (QuantizationConfig("mxfp4"), 4 + 8 / 32),
        (QuantizationConfig("nvfp4"), 4 + 8 / 16),
    ],
    ids=str,
)
def test_a_product_reads_the_codes_scales_and_minima_of_its_format(storage, bits):
    n, k, chip = 4096, 4096, CHIPS["a6000"]
    assert 0 <= roofline.packed_bytes(n, k, storage) - bits * n * k / 8 <= 4 * 256  # a table, an offset
    found = roofline.predict(chip, Product(1, n, k, storage=storage))
    if found.bound == "memory":
        wanted = (bits * n * k / 8 + 2 * (n + k)) / (chip.memory_bandwidth * roofline.MEMORY_FRACTION)
        np.testing.assert_allclose(found.fused - roofline.LAUNCH, wanted, rtol=1e-3)


@pytest.mark.parametrize(("name", "shape", "transposed"), pairwise(TABLED, SHAPES_70B, (False, True)))
def test_one_row_is_fused_and_the_choice_turns_once_at_most(name, shape, transposed):
    chip, (n, k) = CHIPS[name], shape
    assert roofline.explain(chip, Product(1, n, k))[0] == "fused"
    crossing = roofline.crossover(chip, n, k, transposed=transposed)
    if crossing is not None:
        for m in (crossing, crossing + 16, 2 * crossing, roofline.LARGEST_M):
            assert roofline.explain(chip, Product(min(m, 16384), n, k, transposed))[0] == "unfused"
        if crossing > 16:
            assert roofline.explain(chip, Product(crossing - 16, n, k, transposed))[0] == "fused"


def test_dequantizing_first_pays_earlier_the_faster_the_tensor_cores():
    crossings = [roofline.crossover(CHIPS[name], 8192, 28672) or math.inf for name in ("rtx4090", "a6000", "h100")]
    assert crossings == sorted(crossings, reverse=True)
    assert math.isfinite(crossings[-1])


def timing(implementation, seconds, m=512, n=4096, k=4096, transposed=False):
    return Timing(Product(m, n, k, transposed), implementation, seconds)


def test_timings_overrule_the_model_near_what_was_timed(timings_file):
    chip = CHIPS["h100"]
    product, backward = Product(4000, 4096, 11008), Product(4000, 4096, 11008, True)
    assert roofline.explain(chip, product)[0] == "unfused"
    assert (
        timings_cache.save(chip.title, [timing("fused", 1e-4, m=4096), timing("unfused", 2e-4, m=4096)]) == timings_file
    )
    assert roofline.explain(chip, product) == ("fused", f"timings in {timings_file}")
    # Not for the other direction, another chip, or far from there.
    assert roofline.explain(chip, backward)[1] == "roofline model"
    assert roofline.explain(CHIPS["h200"], product)[1] == "roofline model"
    assert roofline.explain(chip, Product(64, 4096, 4096))[1] == "roofline model"
    # Written again: the later timing counts, the others stay, and the cache notices.
    timings_cache.save(chip.title, [timing("fused", 3e-4, m=4096)])
    assert roofline.explain(chip, product)[0] == "unfused"
    timings_cache.save(CHIPS["h200"].title, [timing("fused", 1e-4)])
    assert set(timings_cache.timings(chip.title)) == {timing("fused", 3e-4, m=4096), timing("unfused", 2e-4, m=4096)}
    # One implementation alone decides nothing; equal times are fused.
    assert timings_cache.nearest(CHIPS["h200"].title, Product(512, 4096, 4096)) is None
    timings_cache.save(CHIPS["h200"].title, [timing("unfused", 1e-4)])
    assert roofline.explain(CHIPS["h200"], Product(512, 4096, 4096))[0] == "fused"


def test_timings_are_of_one_format(timings_file):
    """Those of NF4 say nothing of NVFP4, whose tables are four times as many."""
    chip, nvfp4 = CHIPS["h100"], QuantizationConfig("nvfp4")
    product, other = Product(4000, 4096, 11008), Product(4000, 4096, 11008, storage=nvfp4)
    for storage, seconds in ((product.storage, 2e-4), (nvfp4, 3e-4)):
        timed = Product(4096, 4096, 11008, storage=storage)
        timings_cache.save(chip.title, [Timing(timed, "fused", 1e-4), Timing(timed, "unfused", seconds)])
        assert (timings_cache.nearest(chip.title, other) is None) == (storage != nvfp4)
    assert timings_cache.nearest(chip.title, product) == {"fused": 1e-4, "unfused": 2e-4}
    assert timings_cache.nearest(chip.title, other) == {"fused": 1e-4, "unfused": 3e-4}
    entries = json.loads(timings_file.read_text())["chips"][chip.title]
    assert {(entry["quant_type"], entry["block_size"]) for entry in entries} == {("nf4", 64), ("nvfp4", 16)}


def test_weights_of_one_shape_and_two_formats_have_a_choice_each(monkeypatch):
    monkeypatch.setattr(selection, "target_chip", lambda: CHIPS["h100"])

    def explain(chip, product, timings):
        return ("fused" if product.storage.quant_type == "nf4" else "unfused"), "why"

    monkeypatch.setattr(roofline, "explain", explain)
    weights = {"q_proj": abstract_quantized((128, 128)), "k_proj": abstract_quantized((128, 128), quant_type="nvfp4")}
    choices = kernels.resolve(weights, [64], jnp.bfloat16)
    assert kernels.describe(choices) == [
        "kernel: fused (auto: why) for q_proj 128x128 at M=64",
        "kernel: unfused (auto: why) for k_proj 128x128 at M=64",
    ]
    record = json.loads(json.dumps(kernels.choices_to_json(choices)))
    monkeypatch.setattr(roofline, "explain", None)
    with kernels.pinned(kernels.choices_from_json(record)):
        assert kernels.resolve(weights, [64], jnp.bfloat16) == choices
    # Records of earlier versions named no format.
    old = [{"m": 64, "n": 128, "k": 128, "transposed": t, "implementation": "unfused"} for t in (False, True)]
    with kernels.pinned(kernels.choices_from_json(old)):
        assert {choice.implementation for choice in kernels.resolve(weights, [64], jnp.bfloat16)} == {"unfused"}


def test_the_nearest_timed_shape_counts():
    title = CHIPS["a6000"].title
    timings_cache.save(title, [timing(i, s, m=m) for m, s in ((64, 1.0), (1024, 2.0)) for i in ("fused", "unfused")])
    for m, seconds in ((16, 1.0), (255, 1.0), (257, 2.0), (10000, 2.0)):
        assert timings_cache.nearest(title, Product(m, 4096, 4096)) == {"fused": seconds, "unfused": seconds}
    assert timings_cache.nearest(title, Product(3, 4096, 4096)) is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "cannot be used: Expecting property name"),
        ("[]", '"format" is not'),
        ("[" * 100_000, "cannot be used: maximum recursion depth"),
        ('{"format": "other"}', '"format" is not'),
        (json.dumps({"format": "qlora-jax kernel timings 1"}), "an entry is not a timing"),
        (json.dumps({"format": "qlora-jax kernel timings 1", "chips": {"x": [{"m": 1}]}}), "an entry is not a timing"),
        (
            json.dumps(
                {
                    "format": "qlora-jax kernel timings 1",
                    "chips": {"x": [{**ENTRY, "seconds": -1}]},
                }
            ),
            "an entry is not a timing",
        ),
    ],
)
def test_a_file_that_is_not_timings_is_told_by_name(content, why, timings_file):
    timings_file.parent.mkdir()
    timings_file.write_text(content)
    for attempt in (
        lambda: roofline.explain(CHIPS["h100"], Product(512, 4096, 4096)),
        lambda: timings_cache.save("x", [timing("fused", 1.0)]),
    ):
        with pytest.raises(UserError, match=f"{timings_file}.*{why}"):
            attempt()


def test_a_file_named_by_hand_must_exist(monkeypatch, tmp_path):
    monkeypatch.setenv(timings_cache.VARIABLE, str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match=r"QLORA_JAX_TUNING names .*mine\.json, which does not exist"):
        timings_cache.timings("x")
    timings_cache.save("x", [timing("fused", 1.0)])
    assert timings_cache.timings("x") == (timing("fused", 1.0),)


def test_a_disk_that_is_full_keeps_the_earlier_timings(timings_file, monkeypatch):
    timings_cache.save("x", [timing("fused", 1.0)])

    def full(path, *_, **__):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; set QLORA_JAX_TUNING"):
        timings_cache.save("x", [timing("fused", 2.0)])
    assert timings_cache.timings("x") == (timing("fused", 1.0),)
    assert os.listdir(timings_file.parent) == [timings_file.name]


def test_files_written_before_a_rename_are_read(timings_file):
    timings_file.parent.mkdir()
    entries = [ENTRY, {**ENTRY, "implementation": "dequantize", "seconds": 0.5}]
    content = {"format": "qlora-jax kernel timings 1", "chips": {CHIPS["h100"].title: entries}}
    timings_file.write_text(json.dumps(content))
    assert timings_cache.nearest(CHIPS["h100"].title, Product(512, 4096, 4096)) == {"fused": 1.0, "unfused": 0.5}


def weights_named(**shapes):
    return {name: abstract_quantized(shape) for name, shape in shapes.items()}


def test_describing_choices(monkeypatch):
    weights = {**weights_named(q_proj=(128, 128), down_proj=(128, 256)), "norm": jnp.zeros(4)}

    def lines(rows, dtype):
        return kernels.describe(kernels.resolve(weights, rows, dtype))

    if jax.default_backend() == "cpu":
        (line,) = lines([512], jnp.bfloat16)
        assert line == "kernel: xla (auto: this runs on cpu) for 2 of 2 linears, forward and backward, at M=512"
    monkeypatch.setattr(selection, "target_chip", lambda: CHIPS["h100"])
    at_64, at_32 = lines([64, 32], jnp.bfloat16)
    assert at_64 == "kernel: fused (auto: roofline model) for 2 of 2 linears, forward and backward, at M=64"
    assert at_32.endswith("at M=32")
    (line,) = lines([64], jnp.float32)
    assert "xla (auto: the activations are float32" in line
    assert kernels.describe(kernels.resolve({}, [64], jnp.float32)) == []

    def explain(chip, product, timings):
        return "fd"[product.transposed and product.k > 128], "why"

    monkeypatch.setattr(roofline, "explain", explain)
    assert lines([64], jnp.bfloat16) == [
        "kernel: f (auto: why) for q_proj 128x128; down_proj 128x256 forward at M=64",
        "kernel: d (auto: why) for down_proj 128x256 backward at M=64",
    ]


def test_a_name_that_was_is_understood(monkeypatch):
    monkeypatch.setattr(selection, "target_chip", lambda: CHIPS["h100"])
    assert kernels.check_implementation("dequantize") == "unfused"
    choices = kernels.resolve(weights_named(q=(128, 128)), [64], jnp.bfloat16, implementation="dequantize")
    assert {choice.implementation for choice in choices} == {"unfused"}
    with pytest.raises(UserError, match="choose one of auto, xla, fused, unfused"):
        kernels.check_implementation("decode")


def test_pinned_choices_stand_in_for_the_file_of_timings(monkeypatch, timings_file):
    chip, weights = CHIPS["h100"], weights_named(q_proj=(4096, 4096), up_proj=(11008, 4096))
    monkeypatch.setattr(selection, "target_chip", lambda: chip)
    rows = (1, 512)
    begun = kernels.resolve(weights, rows, jnp.bfloat16)
    record = json.loads(json.dumps(kernels.choices_to_json(begun)))
    assert kernels.choices_from_json(record) == tuple(sorted(begun, key=lambda c: dataclasses.astuple(c.product)))

    # Somebody benchmarks: every product would be computed in the other way.
    swapped = {"fused": "unfused", "unfused": "fused"}
    for choice in begun:
        other = swapped[choice.implementation]
        timings_cache.save(
            chip.title, [Timing(choice.product, choice.implementation, 2.0), Timing(choice.product, other, 1.0)]
        )
    after = kernels.resolve(weights, rows, jnp.bfloat16)
    assert all(a.implementation == swapped[b.implementation] for a, b in zip(after, begun, strict=True))

    with kernels.pinned(kernels.choices_from_json(record)):
        resumed = kernels.resolve(weights, rows, jnp.bfloat16)
        # A product that the record does not know depends on the GPU alone.
        (unknown, *_) = kernels.resolve(weights, [500], jnp.bfloat16)
        # What the kernels cannot take is XLA's, whatever the record says.
        assert {c.implementation for c in kernels.resolve(weights, rows, jnp.float32)} == {"xla"}
        named = kernels.resolve(weights, rows, jnp.bfloat16, implementation="unfused")
        assert {choice.implementation for choice in named} == {"unfused"}
    assert resumed == begun and {choice.reason for choice in resumed} == {"auto: recorded choice"}
    assert unknown.reason == "auto: roofline model"
    assert kernels.resolve(weights, rows, jnp.bfloat16) == after


def test_pinned_choices_reach_compiled_functions(monkeypatch):
    """A jitted function is traced again for other choices, and its backward pass follows them too."""
    traced = []
    monkeypatch.setattr(selection, "target_chip", lambda: CHIPS["a6000"])

    class Recorder:
        def __init__(self, name):
            self.name = name

        def matmul(self, x, w):
            traced.append((self.name, False))
            return xla.matmul(x, w)

        def matmul_transposed(self, dy, w):
            traced.append((self.name, True))
            return xla.matmul_transposed(dy, w)

    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", {name: Recorder(name) for name in ("xla", "fused", "unfused")})
    w = jax.tree.map(jnp.asarray, quantize(np.ones((128, 64), np.float32)))
    x = jnp.ones((4, 64), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda x, w: kernels.matmul(x, w).sum().astype(jnp.float32), allow_int=True))
    for forward, backward in (("fused", "unfused"), ("unfused", "fused"), ("fused", "unfused")):
        choices = [Choice(Product(4, 128, 64, t), name) for t, name in ((False, forward), (True, backward))]
        with kernels.pinned(choices):
            step(x, w)
        assert traced in ([], [(forward, False), (backward, True)])
        traced.clear()


@pytest.mark.parametrize(
    "value",
    [
        {"m": 1},
        [1],
        [{"m": 1}],
        [{**ENTRY, "m": 0}],
        [{**ENTRY, "transposed": []}],
        [{**ENTRY, "implementation": "magic"}],
        [{**ENTRY, "quant_type": "nf5", "block_size": 64, "double_quant": True}],
        [{**ENTRY, "quant_type": "nf4", "block_size": 64, "double_quant": []}],
        [{**ENTRY, "quant_type": "nf4"}],
    ],
    ids=str,
)
def test_a_damaged_record_of_choices_is_refused(value):
    with pytest.raises(UserError, match="recorded kernel choice"):
        kernels.choices_from_json(value)
