"""The kernels' own address arithmetic against the layouts that NVIDIA's PTX ISA manual documents."""

import inspect
import types

import numpy as np
import pytest
from ptx_simulator.tensor_map import swizzle

from qlora_jax.kernels.mosaic import ptx, tiles

THREADS = np.arange(128)


@pytest.fixture
def arithmetic(monkeypatch):
    """`ptx`'s index arithmetic on numbers, for all threads at once, instead of on what is being compiled."""
    operations = {
        "addi": np.add,
        "muli": np.multiply,
        "andi": np.bitwise_and,
        "xori": np.bitwise_xor,
        "shrui": np.right_shift,
        "divui": np.floor_divide,
        "remui": np.remainder,
    }
    monkeypatch.setattr(ptx, "arith", types.SimpleNamespace(**operations))
    monkeypatch.setattr(ptx, "const", int)
    monkeypatch.setattr(ptx, "thread_index", lambda: THREADS)
    # Without the group-time type checks of the tests.
    names = ("swizzled", "groups_of_thread", "groups_of_fragments")
    return types.SimpleNamespace(**{name: inspect.unwrap(getattr(ptx, name)) for name in names})


@pytest.mark.parametrize("row_bytes", [32, 64, 128])
def test_swizzle(arithmetic, row_bytes):
    """ "Swizzling Modes": the 16-byte chunks of a row change places, as the row's 128-byte line in its group says."""
    offset = np.arange(16 * 1024)
    chunks = row_bytes // 16
    line, chunk = offset // 128, offset // 16
    place = chunk // chunks * chunks + (chunk % chunks ^ line % 8 % chunks)
    documented = 16 * place + offset % 16
    for ours in (tiles.swizzled(offset, row_bytes), arithmetic.swizzled(offset, row_bytes), swizzle(offset, row_bytes)):
        np.testing.assert_array_equal(ours, documented)
    np.testing.assert_array_equal(np.sort(documented), offset)  # nothing lost
    np.testing.assert_array_equal(documented // row_bytes, offset // row_bytes)  # within its row
    # Atoms of 8 lines: tiles that begin at multiples of 1024 bytes are swizzled alike.
    np.testing.assert_array_equal(documented[1024:], documented[:-1024] + 1024)


def test_swizzle_written_out(arithmetic):
    """Positions of the first byte of each chunk of eight lines, copied from the manual's figures of each mode."""
    lines = {
        128: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
        64: ["01234567", "10325476", "23016745", "32107654"] * 2,
        32: ["01234567", "10325476"] * 4,
    }
    for row_bytes, figure in lines.items():
        offset = np.arange(0, 1024, 16)
        place = arithmetic.swizzled(offset, row_bytes) // 16
        assert ["".join(str(chunk % 8) for chunk in line) for line in place.reshape(8, 8)] == figure


@pytest.mark.parametrize("rows, columns", [(128, 64), (64, 128), (128, 128), (256, 64), (128, 256), (32, 256)])
def test_groups_of_threads(arithmetic, rows, columns):
    groups = columns // tiles.GROUP
    found = arithmetic.groups_of_thread(rows * groups, rows)
    assert len(found) == rows * groups // 128
    for j, (row, group) in enumerate(found):
        # As `WeightFormat.scale_layout` numbers them.
        np.testing.assert_array_equal(row + group * rows, THREADS + 128 * j)
        assert row.min() >= 0 and row.max() < rows and group.max() < groups


def lanes():
    """groupID and threadID_in_group of a warp."""
    return np.arange(32) >> 2, np.arange(32) % 4


def fragment_a(i):
    """Row and column of element i of a lane's part of A ("Matrix Fragments for mma.m16n8k16", floating point)."""
    group, thread = lanes()
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragment_b(i):
    """Row and column of element i of a lane's part of B."""
    group, thread = lanes()
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def test_groups_of_fragments(arithmetic):
    """A lane dequantizes codes of the rows, and of a quarter of the columns, that are its part of A."""
    found = arithmetic.groups_of_fragments(256, 16)
    taken = set()
    for half, (row, group) in enumerate(found):
        for warp in range(4):
            lane = slice(32 * warp, 32 * warp + 32)
            # Registers a0 a1 and a4 a5 are of one row, a2 a3 and a6 a7 of the row eight below.
            for i in (0, 1, 4, 5):
                a_row, a_column = fragment_a(i + 2 * half)
                np.testing.assert_array_equal(row[lane], a_row)
                np.testing.assert_array_equal(group[lane] % 4, a_column % 8 // 2)
            np.testing.assert_array_equal(group[lane] // 4, warp)
            taken |= set(zip(row[lane].tolist(), group[lane].tolist(), strict=True))
    assert len(taken) == 256  # every group of the tile once
    for size in ((128, 16), (256, 32)):
        with pytest.raises(ValueError, match="16 rows and 16 groups"):
            arithmetic.groups_of_fragments(*size)


def test_order_of_small_m_columns(arithmetic):
    """The four elements of a group that one instruction takes are the same in W (A) and in x (B), column by column."""
    (_, group), _ = arithmetic.groups_of_fragments(256, 16)
    by_column = {}
    for element in range(4):
        # A's two registers of a row hold elements 0 1 and 2 3; so do B's two registers.
        _, of_a = fragment_a(element if element < 2 else element + 2)
        of_b, _ = fragment_b(element)
        np.testing.assert_array_equal(of_a, of_b)
        for column, lane_group in zip(of_a.tolist(), (group[:32] % 4).tolist(), strict=True):
            assert by_column.setdefault(column, (lane_group, element)) == (lane_group, element)
    assert sorted(by_column) == list(range(16)) and len(set(by_column.values())) == 16
