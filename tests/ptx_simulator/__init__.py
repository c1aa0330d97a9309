"""Executes compiler-emitted NVIDIA PTX on the CPU, as a functional verification oracle for kernels.

    import ptx_simulator
    ptx.run(text, "kernel", grid=(2,), block=(128,), args=[x, w, out], dynamic_shared=40960)

`args` follow the PTX parameter order: numpy arrays (global memory, written in place), Python or numpy scalars, or
TensorMap / list[TensorMap] for `.align 64 .b8` by-value descriptor parameters. For a JAX Mosaic GPU dump,
`mosaic_args(directory)` recovers parameter order, grid, block, shared memory and descriptors from the host code.
`python -m ptx --list f.ptx` (in tests/) lists what is not modelled.

Strictness: an opcode / modifier / type that is not modelled raises NotImplementedError when the kernel is decoded,
i.e. before anything runs. Errors (PtxError) carry thread id, PTX line and text: out-of-bounds or misaligned accesses,
reads of uninitialised shared/local memory, deadlock, and

* shared-memory races: FastTrack-style vector clocks, one per warp, joined by bar.sync and mbarrier. Every shared byte
  remembers its last writer and last reader per warp, so a missing barrier is an error whatever the schedule. Lanes of
  one warp are taken as ordered by program order.
* cp.async / TMA / wgmma / tcgen05 are asynchronous: the data moves only at wait_group (or, for TMA and
  tcgen05.commit, when no warp can run any more); until then touching the bytes or registers in flight is an error.
* tensor memory is checked like shared memory: allocation, initialisation, missing waits, and races.

Execution model: registers are numpy vectors over the threads of one CTA. A bundle (default: one warp;
`warps_per_bundle` joins several for speed) runs until it blocks; inside a bundle the group of threads with the lowest
pc runs first, so diverged threads reconverge. CTAs run one after another.

Numerics: f32/f64/f16/bf16 add, sub, mul, div, sqrt, cvt and f32/f16/bf16 fma are exactly rounded (fma through
round-to-odd in binary64, see `numerics.fma64`); add/mul without .rn are not contracted, though ptxas may. mma, wgmma
and tcgen05.mma sum the exact products and the accumulator in binary64 and round once to f32; hardware only promises
"at least single precision" in an unspecified order. ex2/lg2/rcp/rsqrt/sqrt/sin/cos/tanh/div .approx are evaluated
accurately: compare with tolerance.

Not modelled: global-memory races, inter-CTA communication, clusters > 1, calls, timing, bank conflicts, register
limits; lane-level races inside one warp (a missing __syncwarp is not seen); a missing
tcgen05.fence::before_thread_sync. Of tcgen05: cta_group::2, cp, shift, kinds other than f16, M = 64, scaling,
sparsity.

Names in quotation marks in docstrings, such as "Constants", are sections of NVIDIA's PTX ISA manual.

Modules, each using only those before it: errors, numerics, parsing (text to instructions), memory (state spaces and
race detection), tensor_memory, tensor_map, machine (execution of one thread block), operands, decode (instructions to
functions), instructions (by family), launch (`run`), mosaic (Mosaic GPU dumps).
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
