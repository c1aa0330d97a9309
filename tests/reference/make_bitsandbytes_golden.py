"""Produce tests/golden/bitsandbytes_quantization.npz: what bitsandbytes makes of a set of weights, as hashes and bytes.

Run it where torch and bitsandbytes 0.50.2 are installed (not needed by the library or its tests):

    python tests/reference/make_bitsandbytes_golden.py tests/golden/bitsandbytes_quantization.npz

The weights themselves are not stored: the test makes them again with `make_weight`, from raw Philox bits and exactly
rounded operations only.
"""

import hashlib
import itertools
import json
import sys

import numpy as np

KINDS = ("random", "heavy", "constant", "zero", "odd", "holes", "ties", "subnormal", "huge")
DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MEAN_SIZES = (
    *range(1, 100),
    127,
    128,
    511,
    1000,
    4095,
    4096,
    4097,
    16385,
    32768,
    65536,
    123457,
    704512,
    1 << 20,
    3000001,
)


def cases() -> list[dict]:
    """List the cases: every kind, dtype, type and nesting at block size 64, every block size on some, one large."""
    wide = itertools.product(KINDS, DTYPES, ("nf4", "fp4"), (64,), (False, True))
    sizes = itertools.product(("random", "odd"), ("bfloat16",), ("nf4", "fp4"), BLOCK_SIZES, (False, True))
    keys = ("kind", "dtype", "quant_type", "block_size", "double_quant")
    found = [dict(zip(keys, values, strict=True), shape=[64, 192]) for values in (*wide, *sizes)]
    for case in found:
        if case["kind"] == "odd":
            case["shape"] = [67, 131]
    large = dict(zip(keys, ("heavy", "bfloat16", "nf4", 64, True), strict=True), shape=[4096, 1024])
    return [*found, large]


def normal(n: int, seed: int = 0) -> np.ndarray:
    """Return float32[n], about N(0, 1): sums of four 16-bit uniforms, exact and the same on every machine."""
    raw = np.random.Philox(key=seed).random_raw(n).view(np.uint16).reshape(n, 4)
    return ((raw.astype(np.int32).sum(axis=1) - 131070) / 37837.0).astype(np.float32)


def make_weight(kind: str, shape: list[int]) -> np.ndarray:
    """Return the float32 weight of a case, to be rounded to its dtype."""
    n = int(np.prod(shape))
    values = normal(n)
    if kind == "random" or kind == "odd":
        values = values * np.float32(0.02)
    elif kind == "heavy":
        values = values * values * values * values * values * np.float32(0.001)
    elif kind == "constant":
        values = np.full(n, 0.01, np.float32)
    elif kind == "zero":
        values = np.zeros(n, np.float32)
    elif kind == "holes":
        values[np.abs(values) < 0.5] = 0
        values[64:320] = 0
        values[1::7] *= np.float32(-0.0)
    elif kind == "ties":
        values = np.round(values * 8) / np.float32(8)
    elif kind == "subnormal":
        values = values * np.float32(2.0**-130)
        values[::3] *= np.float32(2.0**-15)
        values[640:1280] = normal(640, 1)
        values[640:1280:2] *= np.float32(2.0**-126)
        values[1280] = 2.0**-149
    elif kind == "huge":
        values = values * np.float32(3e34)
    return values.reshape(shape)


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main(path: str) -> None:
    """Run bitsandbytes on every case and write the file."""
    import bitsandbytes
    import bitsandbytes.functional as bnb
    import torch
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    # The mean of the scales depends on the number of threads; one is the order that every machine can reproduce.
    torch.set_num_threads(1)
    arrays, results = {}, []

    def raw(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.contiguous().cpu()
        return tensor.view(torch.int16).numpy() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.numpy()

    for case in cases():
        weight = torch.from_numpy(make_weight(case["kind"], case["shape"])).to(getattr(torch, case["dtype"]))
        if not torch.isfinite(weight).all():
            continue
        kwargs = {"blocksize": case["block_size"], "quant_type": case["quant_type"]}
        packed, state = bnb.quantize_4bit(weight, compress_statistics=case["double_quant"], **kwargs)
        scales = state.absmax
        if state.nested:
            scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        code = bnb.get_4bit_type(case["quant_type"], device="cpu")
        # The equation, through bitsandbytes' generic implementation without torch.compile.
        values = _dequantize_4bit_compute.__wrapped__(
            packed.reshape(-1), scales, code, case["block_size"], weight.shape, weight.dtype
        )
        if case["shape"][-1] % case["block_size"] == 0 and case["kind"] != "subnormal":
            # bitsandbytes' own CPU kernel follows it too. (Where blocks straddle rows it reads wrong scales, and some
            # of its variants flush subnormals.)
            assert raw(bnb.dequantize_4bit(packed, state)).tobytes() == raw(values).tobytes(), case
        tensors = {"weight": packed, **state.as_dict(packed=True)}
        result = {"input": digest(raw(weight)), "dequantized": digest(raw(values))}
        result["tensors"] = {key: [str(raw(t).dtype), list(t.shape), digest(raw(t))] for key, t in tensors.items()}
        results.append({"case": case, **result})

    for dtype in DTYPES:
        weight = torch.from_numpy(make_weight("heavy", [67, 130])).to(getattr(torch, dtype))
        weight[3] = 0
        codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
        arrays[f"int8/{dtype}/codes"] = codes.numpy()
        arrays[f"int8/{dtype}/absmax"] = absmax.numpy()
        arrays[f"int8/{dtype}/dequantized"] = bnb.int8_vectorwise_dequant(codes, absmax).numpy()

    small = torch.from_numpy(make_weight("random", [32, 64]))
    packed, state = bnb.quantize_4bit(small, quant_type="nf4", compress_statistics=True)
    for key, tensor in {"weight": packed, **state.as_dict(packed=True)}.items():
        arrays[f"nf4/{key}"] = tensor.numpy()
    arrays["nf4/dequantized"] = bnb.dequantize_4bit(packed, state).numpy()
    arrays["fp4/quant_map"] = bnb.get_4bit_type("fp4", device="cpu").numpy()
    arrays["mean/sizes"] = np.array(MEAN_SIZES)
    arrays["mean/values"] = np.array(
        [torch.from_numpy(np.abs(normal(n))).mean().item() for n in MEAN_SIZES], np.float32
    )
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "numpy": np.__version__}
    np.savez_compressed(path, cases=json.dumps({"versions": versions, "results": results}), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
