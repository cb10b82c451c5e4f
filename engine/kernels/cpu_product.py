"""The register-tile product of compiled code: C += A · B for a few rows and a few groups of 16 columns.

Every element of C is one chain of fused multiply-adds over k in ascending order, whatever the tile's shape, so a
row's bits do not depend on the rows computed beside it. B is float32, or bf16 in pairs: the 32-bit word at
(k, lane) holds element 2k in its lower half and 2k + 1 in its upper one, the layout that AMX wants too.
Vectors are in cpu_lanes.py; the same product on AMX tiles, with another order, in cpu_amx.py.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu_lanes import F32_VECTOR, I32_VECTOR, LANES, call, pointer, spread

_I64 = ir.IntType(64)
_ROW = LANES * 4  # bytes of a group's k-th row


def _at(builder: Any, address: Any, *offsets: Any) -> Any:
    for offset in offsets:
        address = builder.add(address, offset if isinstance(offset, ir.Value) else ir.Constant(_I64, offset))
    return pointer(builder, address)


class _Tile:
    """Emits one product: rows x groups accumulators held in registers while k runs."""

    def __init__(self, builder: Any, rows: int, groups: int, packed: bool) -> None:
        self.builder, self.rows, self.groups, self.packed = builder, rows, groups, packed

    def emit(self, a: Any, a_row: Any, b: Any, b_step: Any, c: Any, c_row: Any, count: Any) -> None:
        builder = self.builder
        sums = [
            [cgutils.alloca_once(builder, F32_VECTOR) for _ in range(self.groups)] for _ in range(self.rows)
        ]
        a_rows = [builder.add(a, builder.mul(a_row, ir.Constant(_I64, row))) for row in range(self.rows)]
        c_rows = [builder.add(c, builder.mul(c_row, ir.Constant(_I64, row))) for row in range(self.rows)]
        starts = [builder.load(_at(builder, b, 8 * group), typ=_I64, align=8) for group in range(self.groups)]
        for row, group in self._elements():
            loaded = builder.load(_at(builder, c_rows[row], group * _ROW), typ=F32_VECTOR, align=4)
            builder.store(loaded, sums[row][group])
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            offset = builder.mul(loop.index, b_step)
            step = ir.Constant(_I64, 8 if self.packed else 4)
            column = builder.mul(loop.index, step)
            self._step(
                sums, [builder.add(row, column) for row in a_rows], [builder.add(s, offset) for s in starts]
            )
        for row, group in self._elements():
            summed = builder.load(sums[row][group], typ=F32_VECTOR)
            builder.store(summed, _at(builder, c_rows[row], group * _ROW), align=4)

    def _elements(self) -> list[tuple[int, int]]:
        return [(row, group) for row in range(self.rows) for group in range(self.groups)]

    def _step(self, sums: Any, a_rows: Any, b_groups: Any) -> None:
        builder = self.builder
        halves = [self._b(start) for start in b_groups]
        for half in range(2 if self.packed else 1):
            for row in range(self.rows):
                scalar = builder.load(_at(builder, a_rows[row], 4 * half), typ=ir.FloatType(), align=4)
                factor = spread(builder, scalar, F32_VECTOR)
                for group in range(self.groups):
                    before = builder.load(sums[row][group], typ=F32_VECTOR)
                    after = call(builder, "llvm.fma.v16f32", F32_VECTOR, factor, halves[group][half], before)
                    builder.store(after, sums[row][group])

    def _b(self, start: Any) -> list[Any]:
        builder = self.builder
        if not self.packed:
            return [builder.load(_at(builder, start), typ=F32_VECTOR, align=4)]
        words = builder.load(_at(builder, start), typ=I32_VECTOR, align=4)
        even = builder.shl(words, ir.Constant(I32_VECTOR, [16] * LANES))
        odd = builder.and_(words, ir.Constant(I32_VECTOR, [0xFFFF0000] * LANES))
        return [builder.bitcast(even, F32_VECTOR), builder.bitcast(odd, F32_VECTOR)]


def _emit_rows(builder: Any, rows: int, packed: bool, groups: Any, values: list[Any]) -> None:
    """All groups for a fixed number of rows: as many at a time as registers hold, then one by one."""
    a, a_row, b, b_step, c, c_row, count = values
    wide = 2 if rows == 8 else 4
    many = builder.udiv(groups, ir.Constant(_I64, wide))
    rest = builder.sub(groups, builder.mul(many, ir.Constant(_I64, wide)))
    done = builder.mul(many, ir.Constant(_I64, wide))
    for times, base, width in ((many, ir.Constant(_I64, 0), wide), (rest, done, 1)):
        with cgutils.for_range(builder, times, intp=_I64) as loop:
            group = builder.add(base, builder.mul(loop.index, ir.Constant(_I64, width)))
            starts = builder.add(b, builder.mul(group, ir.Constant(_I64, 8)))
            columns = builder.add(c, builder.mul(group, ir.Constant(_I64, _ROW)))
            _Tile(builder, rows, width, packed).emit(a, a_row, starts, b_step, columns, c_row, count)


def _product(packed: bool) -> Any:
    def product(
        context: Any,
        rows: Any,
        groups: Any,
        a: Any,
        a_row: Any,
        b: Any,
        b_step: Any,
        c: Any,
        c_row: Any,
        count: Any,
    ) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            for height in TILE_ROWS:
                chosen = builder.icmp_signed("==", values[0], ir.Constant(_I64, height))
                with builder.if_then(chosen):
                    _emit_rows(builder, height, packed, values[1], values[2:])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return intrinsic(product)


TILE_ROWS = (8, 4, 2, 1)

multiply = _product(packed=False)
"""`multiply(rows, groups, a, a_row, b, b_step, c, c_row, count)`: C[rows, 16 * groups] += A[rows, k] · B[k, …].

rows: one of TILE_ROWS. a, a_row: address and row distance (bytes) of float32 A. b: address of the groups' start
addresses (int64). b_step: bytes from one k to the next within a group. c, c_row: float32 C, groups adjacent.
count: how many k."""

multiply_packed = _product(packed=True)
"""The same for B in pairs of bf16; `count` counts pairs of k, `b_step` is the way from one pair to the next."""
