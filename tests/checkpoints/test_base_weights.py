"""Streams of a base's weights: what they keep in memory, and that they end what they began."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoint_helpers import random_tensors, write_hf
from fixtures.tiny_configs import LLAMA

from qlora_jax.checkpoints import base_weights
from qlora_jax.checkpoints import converted as converted_module
from qlora_jax.checkpoints.base_weights import BaseStorage, BaseWeights, open_base
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.converted import ConvertedBase
from qlora_jax.quantization import QuantizationConfig


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "hf", LLAMA, random_tensors(LLAMA))


@pytest.fixture(scope="module")
def converted(hugging_face: Path) -> Path:
    return convert(hugging_face, hugging_face.with_name("converted"), QuantizationConfig(), "bfloat16").directory


@pytest.fixture(params=["hugging_face", "converted"])
def base(request: pytest.FixtureRequest) -> BaseWeights:
    return open_base(request.getfixturevalue(request.param), "dequantized", BaseStorage())


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The iterators beneath those of bases, which have threads."""
    made: list[Any] = []

    def kept(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (made.append(original(*args, **options)), made[-1])[1]

    monkeypatch.setattr(base_weights, "stream_tensors", kept(base_weights.stream_tensors))
    monkeypatch.setattr(ConvertedBase, "chunks", kept(ConvertedBase.chunks))
    return made


def test_a_stream_that_is_left_is_closed(base: BaseWeights, streams: list[Any]):
    iterator: Any = base.weights()
    next(iterator)
    assert streams[0].gi_frame is not None
    iterator.close()
    assert streams[0].gi_frame is None


def test_a_stream_that_raises_is_closed(base: BaseWeights, streams: list[Any], monkeypatch: pytest.MonkeyPatch):
    def failing(value: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(base_weights, "_as_float", failing)
    with pytest.raises(MemoryError) as raised:
        list(base.weights())
    assert raised.traceback  # which holds the frames
    assert streams[0].gi_frame is None


def test_a_converted_bases_arrays_are_let_go(converted: Path, monkeypatch: pytest.MonkeyPatch):
    """When an array is read nothing of an earlier tensor is in memory."""
    before: dict[str, list[weakref.ref[Any]]] = {}
    read = converted_module._read_array

    def reading(part: Path, key: tuple[str, ...], declared: Any, tensor: str, place: None) -> Any:
        gc.collect(0)  # JAX lets go of arguments then
        alive = [name for name, arrays in before.items() if name != tensor and any(ref() is not None for ref in arrays)]
        assert not alive
        array = read(part, key, declared, tensor, place)
        before.setdefault(tensor, []).append(weakref.ref(array))
        return array

    monkeypatch.setattr(converted_module, "_read_array", reading)
    iterator: Iterator[Any] = open_base(converted, "dequantized", BaseStorage()).weights()
    while (each := next(iterator, None)) is not None:
        del each
    assert len(before) > 5
