"""Base tensors between checkpoint and model: checked, quantised one at a time, stacked, counted.

Memory: two tensors are in work while the consumer has the one before, and it decides how long that is kept. What is
quantised to 4 bits, and what is cast, is read in pieces: the checkpoint's own tensor is never whole in memory.
"""

import collections
import contextlib
import functools
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.ahead import results_ahead
from qlora_jax.checkpoints.host_memory import aligned_empty
from qlora_jax.checkpoints.model_files import check_finite
from qlora_jax.checkpoints.sources import TensorSource
from qlora_jax.errors import UserError
from qlora_jax.models import TensorSpec, family_of, ignored_tensors
from qlora_jax.quantization import Quantization, QuantizedTensor, abstract_quantized, quantize
from qlora_jax.quantization.blockwise import PIECE, QUANTIZED_IN_PIECES, quantize_pieces

TensorPath = tuple[str, ...]
Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""
Chunk = tuple[TensorPath, int | None, Any]
"""(path, first layer or None if not stacked, value of that layer or of several stacked on axis 0)."""
Places = Callable[[TensorPath, int | None, int | None], Any]
"""(path, first layer or None if not stacked, layers or None for one without their axis) -> a value whose arrays are
memory to put that value into, or None."""

# Tensors that threads read, and quantise or reorder, while the consumer is at work on the one before.
_AHEAD = 2
# Elements that are cast at a time, or compared with another tensor's.
_PIECE = PIECE

_LEAVES = ("codes", "absmax", "nested_absmax", "offset", "minimum", "scale_map")


def check_source(source: TensorSource, specs: list[TensorSpec], quantization: Quantization | None = None) -> None:
    """Compare the names, shapes and element types of a checkpoint with the base tensors its config asks for.

    Reads no tensor data. With `quantization`, rows must also be whole blocks.

    Raises:
        UserError: missing, unknown or mis-shaped tensors, or an element type that cannot be read; names the first few
            tensors, how many there are, and the file. A block size that does not divide a linear's inputs.
    """
    present = set(source.names())
    missing = [spec.name for spec in specs if spec.name not in present]
    if missing:
        raise UserError(
            f"{source.path} lacks {_listing(missing)} that its config.json asks for; download the complete model."
        )
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignored_tensors(source.config)) or r"(?!)")
    extra = sorted(present - {spec.name for spec in specs} - {name for name in present if ignored.fullmatch(name)})
    if extra:
        raise UserError(
            f"{source.location(extra[0])} holds {_listing(extra)} that a {source.config.architecture} with "
            f"this config.json does not have; leaving them out would make another model, so check that config and "
            f"weights belong together."
        )
    misshaped = [
        f"{spec.name} {list(source.shape(spec.name))} instead of {list(spec.shape)}"
        for spec in specs
        if source.shape(spec.name) != spec.shape
    ]
    if misshaped:
        first = next(spec.name for spec in specs if source.shape(spec.name) != spec.shape)
        raise UserError(
            f"{source.location(first)} has the wrong shape for {_listing(misshaped)}; check that config.json and "
            f"weights belong together."
        )
    for spec in specs:
        source.check_readable(spec.name)
    if quantization is not None:
        for spec in specs:
            if spec.quantized:
                quantization.of(spec.linear).check_rows(spec.shape[-1], spec.name)


def describe(source: TensorSource, specs: list[TensorSpec], quantization: Quantization) -> str:
    """Describe in one line for people what is read, what is made of it, and which parts of the model are left out."""
    said, linears = [source.description], [spec for spec in specs if spec.quantized]
    layers = collections.Counter(spec.linear for spec in linears)
    fates: dict[str, collections.Counter[str]] = {}
    for spec in linears:
        kind, wanted = source.quantized_type(spec.name), quantization.of(spec.linear)
        if kind is not None:
            kept = source.stored(spec.name) == wanted
            fate = f"{kind} kept" if kept else f"{kind} dequantised and stored as {wanted}"
            fates.setdefault(fate, collections.Counter())[spec.linear] += 1
    for fate, found in fates.items():
        names = (name if n == layers[name] else f"{name} ({n} of {layers[name]} layers)" for name, n in found.items())
        said.append(f"{fate} in {'all linears' if found == layers else ', '.join(names)}")
    packed = {spec.kind: source.quantized_type(spec.name) for spec in specs if not spec.quantized}
    said += [f"{kind} dequantised from {stored}" for kind, stored in packed.items() if stored is not None]
    left_out = [
        part
        for pattern, part in family_of(source.config).skipped.items()
        if any(re.fullmatch(pattern, name) for name in source.names())
    ]
    return "; ".join(said + ([f"left out: {', '.join(left_out)}"] if left_out else []))


def nowhere(path: TensorPath, first_layer: int | None, layers: int | None) -> None:
    """`Places` of values that get memory of their own."""


def stream_tensors(
    source: TensorSource,
    specs: list[TensorSpec],
    quantization: Quantization,
    dtype: np.dtype,
    start: int = 0,
    places: Places = nowhere,
) -> Generator[tuple[TensorSpec, QuantizedTensor | np.ndarray]]:
    """Yield the base tensors from `specs[start]` on as a model stores them, for a source that `check_source` accepts.

    Linear weights that the checkpoint stores as they are wanted are taken over byte for byte, their scales checked to
    be finite; others are quantised from the checkpoint's own precision. Norms are float32; embedding, head, biases and,
    for quant_type "none", linear weights are cast to `dtype`. Threads that read ahead end with the iterator: close it.

    Raises:
        UserError: while streaming, for a tensor that is not finite or does not fit `dtype`, or a head that is stored
            beside the embedding it is tied to and differs from it; names the tensor.
    """
    threads = threading.local()

    def stored(spec: TensorSpec) -> QuantizedTensor | np.ndarray:
        if not hasattr(threads, "scratch"):
            # Once: what is allocated for each tensor goes back to the system, and is cleared each time.
            threads.scratch = aligned_empty((8 * PIECE,), np.uint8)
        value = places(spec.path, spec.layer, None)
        if value is None:
            value = jax.tree.map(_empty, abstract_tensor(spec, quantization, dtype, ()))
        if isinstance(value, QuantizedTensor):
            keep = source.stored(spec.name) == quantization.of(spec.linear)
            _fill_quantized(value, source, spec, None if keep else threads.scratch)
        else:
            _fill(value, source, spec)
        return value

    reads = (functools.partial(stored, spec) for spec in specs[start:])
    with contextlib.closing(results_ahead(reads, _AHEAD)) as read:
        for spec, value in zip(specs[start:], read, strict=True):
            if spec.kind == "embedding":  # before it is given away: whoever has it may go on after it another time
                check_tied_head(source, specs, spec)
            yield spec, value
            del value  # or it would be in memory beside the next


def check_tied_head(source: TensorSource, specs: list[TensorSpec], embedding: TensorSpec) -> None:
    """Refuse a head that config.json says is the embedding, where the two differ: it would be left out."""
    used = {spec.name for spec in specs}
    for name in source.names():
        if name in used or not re.fullmatch(r"(.*\.)?lm_head\.weight", name):
            continue
        if source.shape(name) != embedding.shape or not _equal(source, name, embedding.name):
            raise UserError(
                f"{source.location(name)} holds a {name} that differs from {embedding.name}, although config.json ties "
                "the two; set tie_word_embeddings to false there."
            )


def _equal(source: TensorSource, name: str, other: str) -> bool:
    """Compare two matrices of one shape by pieces: an embedding may be the largest tensor of a model."""
    pieces = zip(source.pieces(name, _PIECE), source.pieces(other, _PIECE), strict=True)
    return all(np.array_equal(one, another) for one, another in pieces)


def abstract_tensor(spec: TensorSpec, quantization: Quantization, dtype: np.dtype, stack: tuple[int, ...]) -> Any:
    """Declare what `stream_tensors` makes of a base tensor: `jax.ShapeDtypeStruct` for every array.

    Args:
        spec: the base tensor.
        quantization: how linear weights are stored.
        dtype: element type of all other weights but norms.
        stack: shape in front of the tensor's own.
    """
    storage = quantization.of(spec.linear)
    if spec.quantized and storage.quant_type != "none":
        return abstract_quantized(
            spec.shape,
            quant_type=storage.quant_type,
            block_size=storage.block_size,
            double_quant=storage.double_quant,
            dtype=dtype.name,
            stack=stack,
        )
    return jax.ShapeDtypeStruct((*stack, *spec.shape), _stored_dtype(spec, dtype))


def abstract_stacks(
    specs: list[TensorSpec], quantization: Quantization, dtype: np.dtype
) -> dict[TensorPath, QuantizedTensor | jax.ShapeDtypeStruct]:
    """Declare all tensors of a loaded base model: the layers of one path stacked on axis 0."""
    by_path: dict[TensorPath, list[TensorSpec]] = {}
    for spec in specs:
        by_path.setdefault(spec.path, []).append(spec)
    return {
        path: abstract_tensor(layers[0], quantization, dtype, () if layers[0].layer is None else (len(layers),))
        for path, layers in by_path.items()
    }


def inventory(tensors: Mapping[TensorPath, Any] | Iterable[Any]) -> dict[str, int]:
    """Count bytes of real buffers by class: base_packed (codes), scales (absmax and its own scales), unquantised."""
    counts = {"base_packed": 0, "scales": 0, "unquantised": 0}
    values: Iterable[Any] = tensors.values() if isinstance(tensors, Mapping) else tensors
    for value in values:
        if isinstance(value, QuantizedTensor):
            counts["base_packed"] += value.codes.nbytes
            counts["scales"] += sum(leaf.nbytes for name, leaf in quantized_leaves(value).items() if name != "codes")
        else:
            counts["unquantised"] += value.nbytes
    return counts


def quantized_leaves(value: QuantizedTensor) -> dict[str, Any]:
    """Map the arrays of a quantised tensor by field name, without those it does not have."""
    leaves = {name: getattr(value, name) for name in _LEAVES}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def _listing(items: list[str], limit: int = 3) -> str:
    shown = ", ".join(items[:limit])
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''} ({shown}{', ...' if len(items) > limit else ''})"


def _empty(declared: jax.ShapeDtypeStruct) -> np.ndarray:
    return aligned_empty(declared.shape, declared.dtype)


def _fill_quantized(place: QuantizedTensor, source: TensorSource, spec: TensorSpec, scratch: np.ndarray | None) -> None:
    """Fill the arrays of a linear weight: quantised, with memory for a piece, or without as it is stored."""
    file = source.location(spec.name)
    called = f"{spec.name} in {file}"
    if scratch is None:
        value = source.read_stored(spec.name, place)
        for leaf in quantized_leaves(value).values():
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                check_finite(leaf, spec.name, file)
    elif place.quant_type in QUANTIZED_IN_PIECES:
        pieces = (_quantizable(piece, source, spec) for piece in source.pieces(spec.name, PIECE, scratch))
        quantize_pieces((_with_rest(piece, scratch) for piece in pieces), place, called)
        return
    else:
        value = quantize(_quantizable(source.read(spec.name), source, spec), quant_type=place.quant_type, name=called)
    for leaf, own in zip(jax.tree.leaves(value), jax.tree.leaves(place), strict=True):
        if not np.may_share_memory(leaf, own):
            own[...] = leaf


def _with_rest(piece: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Return a piece that begins `scratch` with what comes after it, up to `PIECE` elements: it is not copied then."""
    whole = scratch[: PIECE * piece.itemsize].view(piece.dtype)
    return whole if np.may_share_memory(piece, whole) else piece


def _quantizable(weight: np.ndarray, source: TensorSource, spec: TensorSpec) -> np.ndarray:
    """Cast float64, which is not quantised, to float32."""
    if weight.dtype != np.float64:
        return weight
    cast = np.empty(weight.shape, np.float32)
    _cast(weight, cast, source, spec)
    return cast


def _fill(place: np.ndarray, source: TensorSource, spec: TensorSpec) -> None:
    """Read a tensor into an array of the type that it is to have."""
    flat, done = place.reshape(-1), 0
    for piece in source.pieces(spec.name, _PIECE, flat):
        _cast(piece, flat[done : done + piece.size], source, spec)
        done += piece.size


def _cast(weight: np.ndarray, into: np.ndarray, source: TensorSource, spec: TensorSpec) -> None:
    file = source.location(spec.name)
    check_finite(weight, spec.name, file)
    if np.may_share_memory(weight, into):
        return
    with np.errstate(over="ignore"):
        np.copyto(into, weight, casting="unsafe")
    # Only a type with fewer exponent bits can overflow; looking at the others would cost a pass over the tensor.
    narrows = jnp.finfo(into.dtype).maxexp < jnp.finfo(weight.dtype).maxexp
    if narrows and not np.isfinite(into).all():
        raise UserError(f"tensor {spec.name} in {file} has values that do not fit {into.dtype.name}; use bfloat16.")


def _stored_dtype(spec: TensorSpec, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if spec.kind == "norm" else dtype
