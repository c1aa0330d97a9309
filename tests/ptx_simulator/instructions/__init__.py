"""The instructions by family. Importing this package fills the table of builders in `ptx_simulator.decode`."""

from ptx_simulator.instructions import (
    async_copy,
    compare,
    control,
    convert,
    floating,
    integer,
    load_store,
    mbarrier,
    mma,
    tcgen05,
    warp,
    wgmma,
)

__all__ = [
    "async_copy",
    "compare",
    "control",
    "convert",
    "floating",
    "integer",
    "load_store",
    "mbarrier",
    "mma",
    "tcgen05",
    "warp",
    "wgmma",
]
