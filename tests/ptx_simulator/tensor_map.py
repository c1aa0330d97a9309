"""TMA descriptors and the swizzles of shared memory."""

import dataclasses

import numpy as np

from ptx_simulator.numerics import i64


@dataclasses.dataclass
class TensorMap:
    """A tiled CUtensorMap.  sizes/strides/box are outermost first, strides in elements (last = 1);
    swizzle is the span in bytes (16 = none, 32, 64, 128)."""

    array: np.ndarray
    sizes: tuple
    strides: tuple
    box: tuple
    swizzle: int = 16
    offset: int = 0

    def __post_init__(self):
        self.w = self.array.itemsize
        if self.swizzle not in (16, 32, 64, 128):
            raise NotImplementedError(f"TMA swizzle {self.swizzle}")
        if self.strides[-1] != 1 or any(st * self.w % 16 for st in self.strides[:-1]):
            raise ValueError("TMA strides")
        if (
            self.box[-1] * self.w % 16
            or max(self.box) > 256
            or (self.swizzle > 16 and self.box[-1] * self.w > self.swizzle)
        ):
            raise ValueError("TMA box")

    def gather(self, coords):
        """(element offsets in the array, inside mask) for a box at coords (innermost first)."""
        off = np.full((1,) * len(self.box), self.offset, i64)
        ok = np.ones((1,) * len(self.box), bool)
        for d, c in enumerate(reversed(coords)):
            x = (int(c) + np.arange(self.box[d])).reshape([-1 if e == d else 1 for e in range(len(self.box))])
            off = off + x * self.strides[d]
            ok = ok & (x >= 0) & (x < self.sizes[d])
        return np.broadcast_to(off, self.box).reshape(-1), np.broadcast_to(ok, self.box).reshape(-1)


def swizzle(addr, span):
    """XORs 16-byte chunk bits with row bits: 128B Swizzle<3,4,3>, 64B <2,4,3>, 32B <1,4,3>."""
    return addr ^ ((addr >> 3) & {16: 0, 32: 0x10, 64: 0x30, 128: 0x70}[span])
