"""Produce tests/golden/optimizers.npz: 20 steps of bitsandbytes' and transformers' optimizers on small matrices.

Run it where torch, transformers and bitsandbytes 0.50.2 are installed (not needed by the library or its tests):

    python tests/reference/make_optimizer_golden.py tests/golden/optimizers.npz

bitsandbytes runs on the CPU, where its optimizers are written in PyTorch. Its compiled CPU library stores a moment as
the nearest of 65536 equally spaced points before it looks up the code, which its CUDA kernels do not and which spoils
the small decades of the map: zero becomes 2e-5 of the scale. So it is run without that library, which it supports: its
portable implementation looks up the nearest code. Of a run with the library, the last two steps are under "library/".

First parameters and gradients are not stored: the test makes them again. Of later parameters every 29th entry is, and
so of the codes before the last two steps.
"""

import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import sys
from unittest import mock

import numpy as np

OPTIMIZERS = ("adamw_8bit", "lion_8bit", "adamw_32bit", "adafactor", "sgd")
SHAPES = ((16, 576), (64, 257), (8, 100))
WEIGHT_DECAYS = (0.0, 0.1)
B1, B2, EPS = 0.9, 0.99, 1e-8
STEPS = 20
RECORDED = (1, 5, STEPS)
STRIDE = 29
LIBRARY_SHAPE = (20, 257)
LIBRARY_RECORDED = (STEPS - 1, STEPS)


def learning_rate(step: int) -> float:
    """Return the learning rate of step 0, 1, ..."""
    return 1e-3 * (1 - step / 40)


def make_parameter(shape: tuple[int, int]) -> np.ndarray:
    """Return the float32 matrix to start from."""
    return np.float32(0.02) * np.random.default_rng([0, *shape]).standard_normal(shape, dtype=np.float32)


def make_gradient(shape: tuple[int, int], step: int) -> np.ndarray:
    """Return the float32 gradient of step 0, 1, ...: sizes over three decades, zeros, and a block that starts late."""
    sizes = np.random.default_rng([1, *shape]).integers(-16, -6, shape)
    gradient = np.ldexp(np.random.default_rng([2, step, *shape]).standard_normal(shape, dtype=np.float32), sizes)
    flat = gradient.reshape(-1)
    flat[::11] = 0
    if step < 3:
        flat[256:512] = 0
    return gradient


def record(
    optimizers: tuple[str, ...], shapes: tuple[tuple[int, int], ...], recorded: tuple[int, ...], library: bool
) -> dict[str, np.ndarray]:
    """Run the optimizers, with or without bitsandbytes' compiled library, and return what is stored of them."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    load = ctypes.CDLL if library else mock.Mock(side_effect=OSError)
    with mock.patch.object(ctypes.cdll, "LoadLibrary", load):
        import bitsandbytes
    from transformers.optimization import Adafactor

    settings = {"betas": (B1, B2)}
    make = {
        "adamw_8bit": lambda p, decay: bitsandbytes.optim.AdamW8bit([p], eps=EPS, weight_decay=decay, **settings),
        "lion_8bit": lambda p, decay: bitsandbytes.optim.Lion8bit([p], weight_decay=decay, **settings),
        "adamw_32bit": lambda p, decay: bitsandbytes.optim.AdamW([p], eps=EPS, weight_decay=decay, **settings),
        "adafactor": lambda p, decay: Adafactor(
            [p], lr=1.0, weight_decay=decay, scale_parameter=False, relative_step=False, warmup_init=False
        ),
        "sgd": lambda p, decay: torch.optim.SGD([p], lr=1.0, weight_decay=decay),
    }
    maps = {"signed": True, "unsigned": False}
    arrays = {f"map/{key}": bitsandbytes.functional.create_dynamic_map(signed).numpy() for key, signed in maps.items()}
    for name in optimizers:
        for shape in shapes:
            for decay in WEIGHT_DECAYS:
                parameter = torch.nn.Parameter(torch.from_numpy(make_parameter(shape)))
                optimizer = make[name](parameter, decay)
                for step in range(STEPS):
                    optimizer.param_groups[0]["lr"] = learning_rate(step)
                    parameter.grad = torch.from_numpy(make_gradient(shape, step))
                    optimizer.step()
                    if step + 1 not in recorded:
                        continue
                    case = f"{name}/{shape[0]}x{shape[1]}/{decay}/{step + 1}"
                    arrays[f"{case}/parameter"] = parameter.detach().numpy().reshape(-1)[::STRIDE].copy()
                    if decay or "8bit" not in name:  # the moments do not depend on the decay
                        continue
                    for key, value in optimizer.state[parameter].items():
                        if key.startswith("state"):
                            stride = 1 if step + 1 in LIBRARY_RECORDED else STRIDE
                            arrays[f"{case}/{key}"] = value.numpy().reshape(-1)[::stride].copy()
                        elif key.startswith("absmax"):
                            arrays[f"{case}/{key}"] = value.numpy().copy()
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {**arrays, "versions": np.array(json.dumps(versions))}


def main(path: str) -> None:
    """Run everything and write the file."""

    def run(*arguments: object) -> dict[str, np.ndarray]:
        # A process of its own: whether the library is used is settled when bitsandbytes is imported.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(record, *arguments).result()

    library = run(("adamw_8bit", "lion_8bit"), (LIBRARY_SHAPE,), LIBRARY_RECORDED, True)
    library = {f"library/{key}": value for key, value in library.items()}
    np.savez_compressed(path, **run(OPTIMIZERS, SHAPES, RECORDED, False), **library)


if __name__ == "__main__":
    main(sys.argv[1])
