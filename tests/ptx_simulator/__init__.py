"""Executes compiler-emitted NVIDIA PTX on the CPU, as a functional verification oracle for kernels.

    import ptx_simulator
    ptx_simulator.run(text, "kernel", grid=(2,), block=(128,), args=[x, w, out], dynamic_shared=40960)

`args` follow the PTX parameter order: numpy arrays (global memory, written in place), Python or numpy scalars, or
TensorMap / list[TensorMap] for `.align 64 .b8` by-value descriptor parameters. For a JAX Mosaic GPU dump,
`mosaic_args(directory)` recovers parameter order, grid, block, shared memory and descriptors from the host code.
`python -m ptx_simulator --list f.ptx` (in tests/) lists what is not modelled.

The README says what is modelled, how to add an instruction, and how the simulator itself is checked. Names in quotation
marks in docstrings, such as "Constants", are sections of NVIDIA's PTX ISA manual.
"""

from ptx_simulator.errors import DeadlockError, PtxError, RaceError
from ptx_simulator.launch import last_stats, run, unsupported
from ptx_simulator.mosaic import MosaicLaunch, mosaic_args
from ptx_simulator.tensor_map import TensorMap

__all__ = [
    "DeadlockError",
    "MosaicLaunch",
    "PtxError",
    "RaceError",
    "TensorMap",
    "last_stats",
    "mosaic_args",
    "run",
    "unsupported",
]
