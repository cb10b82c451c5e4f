"""AMX in compiled code: tile configuration and the product of bf16 tiles, 16 rows at a time.

An AMX product adds 32 k in one instruction, in an order the hardware fixes for each element of C whatever the
number of rows, so bits depend on the row alone; they differ from those of cpu_product.py.
oneDNN keeps what it last configured in a variable of each thread and trusts it: whoever uses tiles here must
save the configuration first and restore it after (`save_tiles`, `restore_tiles`).
"""

import ctypes
import platform
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu_lanes import call, clear, emitted, pointer, put_u8, put_u16
from engine.kernels.cpu_native import inner

TILE = 1024  # bytes: 16 rows of 64
CONFIGURATION_BYTES = 64
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_VOID = ir.VoidType()


def amx_available() -> bool:
    """Whether this machine multiplies bf16 tiles and the kernel lets this process use them (asked for here)."""
    found = get_host_cpu_features()
    if not (found.get("amx-bf16") and found.get("amx-tile")) or platform.system() != "Linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


@emitted(types.void, types.int64)
def save_tiles(builder: Any, address: Any) -> None:
    """Writes this thread's tile configuration to 64 bytes."""
    call(builder, "llvm.x86.sttilecfg", _VOID, pointer(builder, address))


@emitted(types.void, types.int64)
def restore_tiles(builder: Any, address: Any) -> None:
    """Configures this thread's tiles from 64 bytes; all zeros releases them."""
    call(builder, "llvm.x86.ldtilecfg", _VOID, pointer(builder, address))


@inner
def configure_tiles(address: int, rows: int) -> None:
    """C in tiles 0-3 and A in tile 4 get `rows` rows (1 to 16), B in 5-7 gets 16. `address`: room for 64 bytes."""
    clear(address, CONFIGURATION_BYTES)
    put_u8(address, 1)
    for tile in range(8):
        put_u16(address + 16 + 2 * tile, 64)
        put_u8(address + 48 + tile, rows if tile < 5 else 16)
    restore_tiles(address)


@inner
def configure_square(address: int, upper: int, lower: int) -> None:
    """For `square`: C in tiles 0-3, A in 4 and 5, B in 6 and 7; `upper` rows of 0, 1, 4, `lower` of 2, 3, 5."""
    clear(address, CONFIGURATION_BYTES)
    put_u8(address, 1)
    for tile in range(8):
        put_u16(address + 16 + 2 * tile, 64)
        put_u8(address + 48 + tile, 16)
    for tile in (0, 1, 4):
        put_u8(address + 48 + tile, upper)
    for tile in (2, 3, 5):
        put_u8(address + 48 + tile, lower)
    restore_tiles(address)


_C, _A, _B = (0, 1, 2, 3), 4, (5, 6, 7)


class _Tiles:
    """Emits C[rows, 16 * groups] for up to four groups, C held in tiles while k runs, 32 of it at a time."""

    def __init__(self, builder: Any, groups: int, along: bool) -> None:
        self.builder, self.groups, self.along = builder, groups, along

    def emit(self, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, count: Any) -> None:
        builder = self.builder
        for group in range(self.groups):
            if self.along:
                self._move("tileloadd64", _C[group], self._plus(c, 64 * group), c_row)
            else:
                call(builder, "llvm.x86.tilezero", _VOID, ir.Constant(_I8, _C[group]))
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            column = builder.add(a, builder.mul(loop.index, ir.Constant(_I64, 64)))
            self._move("tileloadd64", _A, column, a_row)
            for group in range(self.groups):
                tile = _B[group % len(_B)]
                self._move("tileloadd64", tile, self._start(b, loop.index, group), b_row)
                numbers = [ir.Constant(_I8, number) for number in (_C[group], _A, tile)]
                call(builder, "llvm.x86.tdpbf16ps", _VOID, *numbers)
        for group in range(self.groups):
            self._move("tilestored64", _C[group], self._plus(c, 64 * group), c_row)

    def _start(self, b: Any, k: Any, group: int) -> Any:
        """Along k: a start for each k, groups adjacent. Else: a start for each group, tiles of k adjacent."""
        builder = self.builder
        if self.along:
            entry = builder.add(b, builder.mul(k, ir.Constant(_I64, 8)))
            return self._plus(builder.load(pointer(builder, entry), typ=_I64, align=8), 64 * group)
        start = builder.load(pointer(builder, self._plus(b, 8 * group)), typ=_I64, align=8)
        return builder.add(start, builder.mul(k, ir.Constant(_I64, TILE)))

    def _plus(self, address: Any, offset: int) -> Any:
        return self.builder.add(address, ir.Constant(_I64, offset))

    def _move(self, name: str, tile: int, address: Any, row: Any) -> None:
        number = ir.Constant(_I8, tile)
        call(self.builder, f"llvm.x86.{name}", _VOID, number, pointer(self.builder, address), row)


def _multiply(groups: int, along: bool) -> Any:
    def multiply(
        context: Any, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, count: Any
    ) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            _Tiles(builder, groups, along).emit(*values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return intrinsic(multiply)


score_4, score_1 = _multiply(4, along=False), _multiply(1, along=False)
"""`score_n(a, a_row, b, b_row, c, c_row, count)`: C[rows, 16 n] = A · B over 32 * count k. `b` is the address of
the groups' start addresses; a group's tiles of k follow one another. Row distances are bytes."""

weigh_4, weigh_1 = _multiply(4, along=True), _multiply(1, along=True)
"""The same, added to C; `b` is the address of a start address for every 32 k, groups lie 64 bytes apart."""


def _square() -> Any:
    def square(context: Any, a: Any, a_row: Any, b: Any, b_far: Any, c: Any, count: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            _emit_square(builder, *values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return intrinsic(square)


def _emit_square(builder: Any, a: Any, a_row: Any, b: Any, b_far: Any, c: Any, count: Any) -> None:
    def constant(number: int) -> Any:
        return ir.Constant(_I64, number)

    def move(name: str, tile: int, address: Any, row: Any) -> None:
        call(builder, f"llvm.x86.{name}", _VOID, ir.Constant(_I8, tile), pointer(builder, address), row)

    for tile in range(4):
        call(builder, "llvm.x86.tilezero", _VOID, ir.Constant(_I8, tile))
    lower = builder.add(a, builder.mul(a_row, constant(16)))
    with cgutils.for_range(builder, count, intp=_I64) as loop:
        column = builder.mul(loop.index, constant(64))
        step = builder.add(b, builder.mul(loop.index, constant(TILE)))
        move("tileloadd64", 4, builder.add(a, column), a_row)
        move("tileloadd64", 6, step, constant(64))
        move("tileloadd64", 7, builder.add(step, b_far), constant(64))
        move("tileloadd64", 5, builder.add(lower, column), a_row)
        for numbers in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            call(builder, "llvm.x86.tdpbf16ps", _VOID, *(ir.Constant(_I8, number) for number in numbers))
    for tile in range(4):
        at = builder.add(c, constant(tile // 2 * 16 * 128 + tile % 2 * 64))
        move("tilestored64", tile, at, constant(128))


square = _square()
"""`square(a, a_row, b, b_far, c, count)`: C[32, 32] (float32, contiguous) = A[32, k] · B over 32 * count k. B is two
panels of 16 columns, `b_far` bytes apart, tiles of k adjacent in each."""
