"""Produce tests/golden/formats.npz: checkpoints' packed 4-bit tensors, and the weights their own programs make of them.

Run it in the reference environment (README.md says what to add to it):

    python tests/reference/make_format_golden.py --autoawq autoawq-0.2.9 tests/golden/formats.npz

Keys are `<case>/<tensor>`; a tensor has the name and layout of the checkpoint (float8 as its bytes), "float32",
"float16" and "bfloat16" (as its bits) are the dequantized weight as the reference orders it, from tensors of that
dtype. Codes are random bytes: every value occurs. Scales hold zero and the extremes of their type; e8m0 and e4m3 every
finite code.
"""

import argparse
import functools
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch

OUT = 16
HALVES = {"float32": torch.float32, "float16": torch.float16}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def raw(tensor: torch.Tensor) -> np.ndarray:
    """Return an array, of the bits where NumPy lacks the type."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.float8_e4m3fn else tensor.numpy()


def int4_tensors(group_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random words for qweight, as AWQ has it, and qzeros, and float16 scales of two groups."""
    random = np.random.default_rng(seed)
    words = random.integers(-(2**31), 2**31, (2 * group_size + 2, OUT // 8)).astype(np.int32)
    scales = random.uniform(0.001, 0.1, (2, OUT)).astype(np.float16)
    scales[0, :6] = 0, 2.0**-24, 2.0**-14, 4000, 1, 1023 * 2.0**-24
    tensors = {"qweight": words[:-2], "qzeros": words[-2:], "scales": scales}
    return {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}


def awq(source: Path, group_size: int) -> dict[str, torch.Tensor]:
    """Dequantize by AutoAWQ's awq/utils/packing_utils.py, whose package cannot be imported without a GPU."""
    spec = importlib.util.spec_from_file_location("packing_utils", source / "awq" / "utils" / "packing_utils.py")
    packing_utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing_utils)
    tensors = int4_tensors(group_size, seed=group_size)
    packed, zeros = tensors["qweight"], tensors["qzeros"]
    for name, dtype in HALVES.items():
        scales = tensors["scales"].to(dtype)
        tensors[name] = packing_utils.dequantize_gemm(packed, zeros, scales, bits=4, group_size=group_size)
    return tensors


def gptq(checkpoint_format: str, group_size: int) -> dict[str, torch.Tensor]:
    """Dequantize by GPTQModel's linear in PyTorch, for which it makes format "gptq" to "gptq_v2" in place."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    tensors = int4_tensors(group_size, seed=group_size)
    tensors["qweight"] = tensors["qweight"].reshape(-1, OUT)
    tensors["g_idx"] = torch.arange(2 * group_size, dtype=torch.int32) // group_size
    linear = TorchLinear(4, group_size, sym=False, desc_act=False, in_features=2 * group_size, out_features=OUT)
    stored = dict(tensors)
    for name, dtype in HALVES.items():
        for key, tensor in stored.items():
            setattr(linear, key, tensor.to(dtype) if key == "scales" else tensor.clone())
        if checkpoint_format == "gptq":
            convert_gptq_v1_to_v2_format_module(linear, bits=4, pack_dtype=torch.int32)
        tensors[name] = linear.dequantize_weight()
    return tensors


def gpt_oss() -> dict[str, torch.Tensor]:
    """Dequantize by transformers' conversion, of 2 experts [32, 128] whose scales take all values but NaN."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(1)
    blocks = torch.from_numpy(random.integers(0, 256, (2, 32, 4, 16), np.uint8))
    scales = torch.from_numpy(random.permutation(np.minimum(np.arange(256), 254).astype(np.uint8)).reshape(2, 32, 4))
    tensors = {"blocks": blocks, "scales": scales}
    for name, dtype in FLOATS.items():
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return tensors


def compressed_tensors(kind: str) -> dict[str, torch.Tensor]:
    """Dequantize by compressed-tensors: bfloat16 by the compressor, float32 by its function in that dtype."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    random = np.random.default_rng(2)
    rows, columns, block_size = (32, 256, 32) if kind == "mxfp4" else (32, 128, 16)
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="group" if kind == "mxfp4" else "tensor_group",
        group_size=block_size,
    )
    packed = torch.from_numpy(random.integers(0, 256, (rows, columns // 2), np.uint8))
    tensors, global_scale = {"weight_packed": packed}, None
    if kind == "mxfp4":
        codes = random.permutation(np.minimum(np.arange(256), 254).astype(np.uint8)).reshape(rows, -1)
        tensors["weight_scale"] = torch.from_numpy(codes)
        scales = decompress_mx_scale(tensors["weight_scale"])
        compressor = MXFP4PackedCompressor
    else:
        tensors["weight_scale"] = scales = torch.from_numpy(every_e4m3(random, rows)).view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = global_scale = torch.tensor([1234.567])
        compressor = NVFP4PackedCompressor
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    bfloat16 = compressor.decompress(dict(tensors), scheme)["weight"]
    values = unpack_fp4_from_uint8(packed, rows, columns, dtype=torch.float32)
    float32 = dequantize(values, scales.float(), args=args, dtype=torch.float32, global_scale=global_scale)
    return tensors | {"float32": float32, "bfloat16": bfloat16}


def modelopt() -> dict[str, torch.Tensor]:
    """Dequantize by modelopt's NVFP4QTensor."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    random = np.random.default_rng(3)
    packed = torch.from_numpy(random.integers(0, 256, (32, 64), np.uint8))
    scale = torch.from_numpy(every_e4m3(random, 32)).view(torch.float8_e4m3fn)
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.000123456)}
    for name, dtype in {**FLOATS, **HALVES}.items():
        tensors[name] = NVFP4QTensor((32, 128), dtype, packed).dequantize(
            dtype, scale=scale, double_scale=tensors["weight_scale_2"], block_sizes={-1: 16}
        )
    return tensors


def bitsandbytes_int4() -> torch.Tensor:
    """Return bitsandbytes' table, which it scales in place and so needs as floats in PyTorch's present versions."""
    from bitsandbytes import functional

    as_floats = functools.partial(torch.tensor, dtype=torch.float32)
    with mock.patch.object(functional.torch, "tensor", as_floats):
        return functional.get_4bit_type("int4", device="cpu")


def every_e4m3(random: np.random.Generator, rows: int) -> np.ndarray:
    """Return the bytes of 256 e4m3 scales [rows, 256 / rows], all of them but the two NaN."""
    codes = np.arange(256, dtype=np.uint8)
    codes[[127, 255]] = 126, 254
    return random.permutation(codes).reshape(rows, -1)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--autoawq", type=Path, required=True, help="AutoAWQ's unpacked source distribution")
    parser.add_argument("output", type=Path)
    flags = parser.parse_args()
    cases = {f"awq-{size}": awq(flags.autoawq, size) for size in (32, 64, 128)}
    cases |= {"gptq-64": gptq("gptq", 64), "gptq_v2-128": gptq("gptq_v2", 128)}
    cases |= {"gpt_oss": gpt_oss(), "compressed_tensors-mxfp4": compressed_tensors("mxfp4")}
    cases |= {"compressed_tensors-nvfp4": compressed_tensors("nvfp4"), "modelopt-nvfp4": modelopt()}
    cases |= {"bitsandbytes": {"int4": bitsandbytes_int4()}}
    packages = ("torch", "transformers", "compressed-tensors", "bitsandbytes")
    versions = {name: version(name) for name in packages} | {"autoawq": flags.autoawq.name}
    arrays = {f"{case}/{name}": raw(tensor) for case, tensors in cases.items() for name, tensor in tensors.items()}
    np.savez_compressed(flags.output, versions=json.dumps(versions), **arrays)


if __name__ == "__main__":
    main()
