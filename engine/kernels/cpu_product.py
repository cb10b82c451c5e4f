"""The register-tile product of compiled code: A · B for a few rows and a few groups of 16 columns.

Every element of C is one chain over k in ascending order, whatever the tile's shape, so a row's bits do not depend
on the rows computed beside it. B is float32, or bf16 in pairs: the 32-bit word at (k, lane) holds element 2k in its
lower half and 2k + 1 in its upper one, the layout that AMX wants too. A link of the chain is one fused multiply-add,
or, where the machine has an instruction for it, a pair's two of bf16: twice the rate, and A must be bf16 too.
Vectors are in cpu_lanes.py; the same product on AMX tiles, with another order, in cpu_amx.py.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu_lanes import (
    BF16_INSTRUCTIONS,
    BF16_VECTOR,
    F32_VECTOR,
    I32_VECTOR,
    LANES,
    call,
    fetch,
    pointer,
    spread,
)

PAIRED_A = 2 if BF16_INSTRUCTIONS else 4
"""Bytes of a number of A beside a B of pairs."""

RUN = 16  # of k that lie together when B is `along`

_I64, _I32 = ir.IntType(64), ir.IntType(32)
_ROW = LANES * 4  # bytes of a group's k-th row


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)


def _plus(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, _number(offset))


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, _number(factor))


class _Tile:
    """Emits one product: rows x groups accumulators held in registers while k runs."""

    def __init__(self, builder: Any, rows: int, groups: int, paired: bool) -> None:
        self.builder, self.rows, self.groups, self.paired = builder, rows, groups, paired
        self.sums = [[cgutils.alloca_once(builder, F32_VECTOR) for _ in range(groups)] for _ in range(rows)]

    def over(
        self, a: Any, a_row: Any, b: Any, b_step: Any, c: Any, c_row: Any, count: Any, ahead: Any, later: Any
    ) -> None:
        """C = A · B; `b` holds every group's start.

        Each step asks for a line of what is `ahead` (where, and bytes from one step to the next), if not None, and for
        what stands behind the starts at `later`.
        """
        builder = self.builder
        starts, wanted = self._starts(b), self._starts(later) if later else []
        rows = self._rows(a, a_row)
        for sums in self.sums:
            for place in sums:
                builder.store(ir.Constant(F32_VECTOR, [0.0] * LANES), place)
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            self._step(rows, starts, loop.index, b_step, wanted)
            if ahead is not None:
                fetch(builder, builder.add(ahead[0], builder.mul(loop.index, ahead[1])))
        self._store(c, c_row)

    def along(
        self, a: Any, a_row: Any, b: Any, first: Any, b_step: Any, c: Any, c_row: Any, count: Any, later: Any
    ) -> None:
        """C += A · B; `b` holds a start for every RUN of k, the tile's groups begin `first` bytes after it.

        It asks for what stands behind the starts at `later`, if not None.
        """
        builder = self.builder
        steps = RUN // 2 if self.paired else RUN
        self._load(c, c_row)
        with cgutils.for_range(builder, count, intp=_I64) as run:
            starts = self._run(b, run.index, first)
            wanted = self._run(later, run.index, first) if later else []
            skipped = _times(builder, run.index, steps * self._a_step)
            rows = self._rows(builder.add(a, skipped), a_row)
            with cgutils.for_range(builder, _number(steps), intp=_I64) as loop:
                self._step(rows, starts, loop.index, b_step, wanted)
        self._store(c, c_row)

    def _starts(self, b: Any) -> list[Any]:
        return [self._address(_plus(self.builder, b, 8 * group)) for group in range(self.groups)]

    def _run(self, b: Any, run: Any, first: Any) -> list[Any]:
        builder = self.builder
        start = builder.add(self._address(builder.add(b, _times(builder, run, 8))), first)
        return [_plus(builder, start, group * _ROW) for group in range(self.groups)]

    @property
    def _a_step(self) -> int:
        """Bytes of A that a step takes."""
        return 2 * PAIRED_A if self.paired else 4

    def _address(self, place: Any) -> Any:
        return self.builder.load(pointer(self.builder, place), typ=_I64, align=8)

    def _rows(self, start: Any, distance: Any) -> list[Any]:
        builder = self.builder
        return [builder.add(start, _times(builder, distance, row)) for row in range(self.rows)]

    def _load(self, c: Any, c_row: Any) -> None:
        for start, sums in zip(self._rows(c, c_row), self.sums, strict=True):
            for group, place in enumerate(sums):
                self.builder.store(self._vector(_plus(self.builder, start, group * _ROW), F32_VECTOR), place)

    def _store(self, c: Any, c_row: Any) -> None:
        builder = self.builder
        for start, sums in zip(self._rows(c, c_row), self.sums, strict=True):
            for group, place in enumerate(sums):
                to = pointer(builder, _plus(builder, start, group * _ROW))
                builder.store(builder.load(place, typ=F32_VECTOR), to, align=4)

    def _vector(self, address: Any, kind: Any) -> Any:
        return self.builder.load(pointer(self.builder, address), typ=kind, align=4)

    def _step(self, rows: list[Any], starts: list[Any], index: Any, b_step: Any, wanted: list[Any]) -> None:
        """The next k, or pair of k, of every element; asks for as much behind the addresses `wanted`."""
        builder = self.builder
        column, offset = _times(builder, index, self._a_step), builder.mul(index, b_step)
        for start in wanted:
            fetch(builder, builder.add(start, offset))
        groups = [self._b(builder.add(start, offset)) for start in starts]
        for row, sums in zip(rows, self.sums, strict=True):
            for half, factor in enumerate(self._a(builder.add(row, column))):
                for group, place in zip(groups, sums, strict=True):
                    before = builder.load(place, typ=F32_VECTOR)
                    builder.store(self._link(before, factor, group[half]), place)

    def _link(self, before: Any, a: Any, b: Any) -> Any:
        if a.type == BF16_VECTOR:
            return call(self.builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32_VECTOR, before, a, b)
        return call(self.builder, "llvm.fma.v16f32", F32_VECTOR, a, b, before)

    def _a(self, address: Any) -> list[Any]:
        builder = self.builder
        if self.paired and PAIRED_A == 2:
            word = builder.load(pointer(builder, address), typ=_I32, align=2)
            return [builder.bitcast(spread(builder, word, I32_VECTOR), BF16_VECTOR)]
        places = [pointer(builder, _plus(builder, address, 4 * half)) for half in range(1 + self.paired)]
        scalars = [builder.load(place, typ=ir.FloatType(), align=4) for place in places]
        return [spread(builder, scalar, F32_VECTOR) for scalar in scalars]

    def _b(self, address: Any) -> list[Any]:
        builder = self.builder
        if not self.paired:
            return [self._vector(address, F32_VECTOR)]
        words = self._vector(address, I32_VECTOR)
        if PAIRED_A == 2:
            return [builder.bitcast(words, BF16_VECTOR)]
        even = builder.shl(words, ir.Constant(I32_VECTOR, [16] * LANES))
        odd = builder.and_(words, ir.Constant(I32_VECTOR, [0xFFFF0000] * LANES))
        return [builder.bitcast(even, F32_VECTOR), builder.bitcast(odd, F32_VECTOR)]


def _emit_rows(
    builder: Any, rows: int, paired: bool, along: bool, asks: str, groups: Any, values: list[Any]
) -> None:
    """All groups for a fixed number of rows: as many at a time as registers hold, then one by one."""
    a, a_row, b, b_step, c, c_row, count, *more = values
    wide = 2 if rows == 8 else 4
    many = builder.udiv(groups, _number(wide))
    done = _times(builder, many, wide)
    for times, base, width in ((many, _number(0), wide), (builder.sub(groups, done), done, 1)):
        with cgutils.for_range(builder, times, intp=_I64) as loop:
            group = builder.add(base, _times(builder, loop.index, width))
            first = _times(builder, group, _ROW)
            columns = builder.add(c, first)
            tile = _Tile(builder, rows, width, paired)
            if along:
                later = more[0] if asks == "later" else None
                tile.along(a, a_row, b, first, b_step, columns, c_row, count, later)
            else:
                entry = _times(builder, group, 8)
                starts = builder.add(b, entry)
                ahead = _ahead(builder, more[0], builder.mul(loop.index, count)) if asks == "ahead" else None
                later = builder.add(more[0], entry) if asks == "later" else None
                tile.over(a, a_row, starts, b_step, columns, c_row, count, ahead, later)


def _ahead(builder: Any, place: Any, steps: Any) -> tuple[Any, Any]:
    """After so many steps: where the next line is, and bytes from one step to the next, of what `place` tells."""
    start, step = (
        builder.load(pointer(builder, _plus(builder, place, offset)), typ=_I64, align=8) for offset in (0, 8)
    )
    return builder.add(start, builder.mul(steps, step)), step


def _by_height(paired: bool, along: bool, asks: str = "") -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        for height in TILE_ROWS:
            chosen = builder.icmp_signed("==", values[0], _number(height))
            with builder.if_then(chosen):
                _emit_rows(builder, height, paired, along, asks, values[1], values[2:])
        return context.get_dummy_value()

    return codegen


def _product(paired: bool, along: bool) -> Any:
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
        return types.void(*[types.int64] * 9), _by_height(paired, along)

    return intrinsic(product)


def _product_asking(paired: bool, along: bool, asks: str) -> Any:
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
        wanted: Any,
    ) -> tuple[Any, Any]:
        return types.void(*[types.int64] * 10), _by_height(paired, along, asks)

    return intrinsic(product)


TILE_ROWS = (8, 4, 3, 2, 1)

multiply, multiply_paired = _product(paired=False, along=False), _product(paired=True, along=False)
"""`multiply(rows, groups, a, a_row, b, b_step, c, c_row, count)`: C[rows, 16 * groups] = A[rows, k] · B[k, …].

rows: one of TILE_ROWS. a, a_row: address and row distance (bytes) of A, float32 or numbers of PAIRED_A bytes.
b: address of the groups' start addresses (int64). b_step: bytes from one k (or pair) to the next within a group.
c, c_row: float32 C, groups adjacent. count: how many k, or pairs."""

multiply_ahead = _product_asking(paired=False, along=False, asks="ahead")
multiply_paired_ahead = _product_asking(paired=True, along=False, asks="ahead")
"""The same with a last argument `ahead`, the address of an address and a number of bytes: every step also asks for a
line from there on, each so many bytes after the one before, to have it in the cache when the next product is of it."""

multiply_later = _product_asking(paired=False, along=False, asks="later")
multiply_paired_later = _product_asking(paired=True, along=False, asks="later")
"""The same with a last argument `later`, start addresses like those at `b`: of what the next product is of. Each load
of B asks for its like there. (Asked for in one go, ahead of the product, memory and arithmetic waited in turns.)"""

weigh, weigh_paired = _product(paired=False, along=True), _product(paired=True, along=True)
"""The same added to C, for B whose groups lie side by side: `b` is the address of a start address for every RUN of
k, `count` counts runs."""

weigh_later = _product_asking(paired=False, along=True, asks="later")
weigh_paired_later = _product_asking(paired=True, along=True, asks="later")
"""`weigh` with a last argument `later`."""
