"""Vectors of 16 floats inside compiled code: loads, stores, arithmetic, 2**x, and the register-tile product.

LLVM splits a vector where the machine's registers are narrower, so this file is portable and the order of every
sum is fixed by what is written here: no fast-math, every multiply-add fused. A row's bits can therefore not
depend on the tile it is computed in. Addresses are plain int64; bf16 is handled as 16-bit integers.
Threads and caching are in cpu_native.py; AMX tiles in cpu_tiles.py.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from engine.kernels.cpu_native import inner, target

LANES = 16
_LOWEST = np.float32(-127.0)
_EXP2 = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))  # Taylor's: 1 at 0, exactly

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
F32_VECTOR = ir.VectorType(_F32, LANES)
I32_VECTOR = ir.VectorType(_I32, LANES)
_SHORT = ir.VectorType(ir.IntType(16), LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite is untyped, and has no name for this type of LLVM's
    """LLVM's bfloat."""

    def _to_string(self) -> str:
        return "bfloat"


BF16_VECTOR = ir.VectorType(_BFloat(), 2 * LANES)
BF16_INSTRUCTIONS = "+avx512bf16" in target()[2].split(",")
"""Whether the machine rounds to bf16, and multiplies pairs of it, in one instruction."""


class _Lanes(types.Type):  # type: ignore[misc]  # numba is untyped
    """Sixteen float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


class _Words(types.Type):  # type: ignore[misc]  # numba is untyped
    """Sixteen int32 in a register: pairs of bf16, or a mask's makings."""

    def __init__(self) -> None:
        super().__init__(name="Words")


Lanes, Words = _Lanes(), _Words()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, F32_VECTOR)


@register_model(_Words)
class _WordsModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, I32_VECTOR)


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """Calls LLVM's intrinsic function `name`."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def pointer(builder: Any, address: Any) -> Any:
    """An address as a pointer, in a function where address 0 is as good as any other.

    Without the attribute LLVM drops stores. numba optimises an `inner` function alone and again inside its kernel;
    the first round turns base + offset into a pointer of the offset, indexed by the base, and when the second
    unrolls a loop whose offset starts at 0, it sees an access based on null: undefined, so the value becomes
    poison. (Seen with numba 0.68, LLVM 22, -O3, only in kernels loaded from the cache: a fresh process runs the
    function compiled alone.) llvmlite has no name for the attribute, hence the plain set's `add`.
    """
    set.add(builder.function.attributes, "null_pointer_is_valid")
    return builder.inttoptr(address, ir.PointerType())


def emitted(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function of compiled code, of fixed types, whose body is what `emit(builder, *values)` builds."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            produced = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else produced

        found = result(*kinds), codegen
        by_arity = {
            1: lambda context, a: found,
            2: lambda context, a, b: found,
            3: lambda context, a, b, c: found,
        }
        return intrinsic(by_arity[len(kinds)])

    return decorate


# Memory. A bf16 is the upper half of a float32; storing rounds to nearest, ties to even, and keeps NaN a NaN.


@emitted(Lanes, types.int64)
def load(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address), typ=F32_VECTOR, align=4)


@emitted(types.void, types.int64, Lanes)
def store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address), align=4)


@emitted(Words, types.int64)
def load_words(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address), typ=I32_VECTOR, align=4)


@emitted(types.void, types.int64, Words)
def store_words(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address), align=4)


def _mask(builder: Any, count: Any) -> Any:
    """The first `count` lanes."""
    index = ir.Constant(I32_VECTOR, list(range(LANES)))
    return builder.icmp_signed("<", index, spread(builder, builder.trunc(count, _I32), I32_VECTOR))


def spread(builder: Any, value: Any, vector: Any) -> Any:
    """A scalar in every lane."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(I32_VECTOR, [0] * LANES)
    )


def _load_masked(builder: Any, address: Any, count: Any, vector: Any, name: str) -> Any:
    zeros = ir.Constant(vector, [0] * LANES)
    mask = _mask(builder, count)
    kind = ir.FunctionType(vector, [ir.PointerType(), _I32, _MASK, vector])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{name}.p0")
    return builder.call(function, [pointer(builder, address), ir.Constant(_I32, 2), mask, zeros])


def _store_masked(builder: Any, address: Any, count: Any, value: Any, name: str) -> None:
    kind = ir.FunctionType(ir.VoidType(), [value.type, ir.PointerType(), _I32, _MASK])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{name}.p0")
    builder.call(function, [value, pointer(builder, address), ir.Constant(_I32, 2), _mask(builder, count)])


@emitted(Lanes, types.int64, types.int64)
def load_f32_some(builder: Any, address: Any, count: Any) -> Any:
    return _load_masked(builder, address, count, F32_VECTOR, "v16f32")


@emitted(types.void, types.int64, Lanes, types.int64)
def store_f32_some(builder: Any, address: Any, value: Any, count: Any) -> None:
    _store_masked(builder, address, count, value, "v16f32")


@emitted(Lanes, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    return _widen(builder, builder.load(pointer(builder, address), typ=_SHORT, align=2))


@emitted(Lanes, types.int64, types.int64)
def load_bf16_some(builder: Any, address: Any, count: Any) -> Any:
    return _widen(builder, _load_masked(builder, address, count, _SHORT, "v16i16"))


@emitted(types.void, types.int64, Lanes, types.int64)
def store_bf16_some(builder: Any, address: Any, value: Any, count: Any) -> None:
    _store_masked(builder, address, count, _narrow(builder, value), "v16i16")


def _widen(builder: Any, halves: Any) -> Any:
    words = builder.zext(halves, I32_VECTOR)
    return builder.bitcast(builder.shl(words, ir.Constant(I32_VECTOR, [16] * LANES)), F32_VECTOR)


def _narrow(builder: Any, value: Any) -> Any:
    """To bf16, nearest, ties to even: one instruction where the machine has it (it flushes what is below normal)."""
    if BF16_INSTRUCTIONS:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat(), LANES)), _SHORT)
    return _narrow_by_integers(builder, value)


def _narrow_by_integers(builder: Any, value: Any) -> Any:
    """For machines without the instruction: LLVM would call a function there that no library brings."""

    def all_of(number: int) -> Any:
        return ir.Constant(I32_VECTOR, [number] * LANES)

    bits = builder.bitcast(value, I32_VECTOR)
    odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, all_of(0x7FFF))), all_of(16))
    quiet = builder.or_(
        builder.lshr(bits, all_of(16)), all_of(0x40)
    )  # rounding could carry a NaN into infinity
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet, rounded), _SHORT)


@emitted(Lanes, Lanes)
def as_bf16(builder: Any, value: Any) -> Any:
    """Rounded to bf16, as float32."""
    return _widen(builder, _narrow(builder, value))


@emitted(types.void, types.int64, Lanes)
def store_bf16(builder: Any, address: Any, value: Any) -> None:
    builder.store(_narrow(builder, value), pointer(builder, address), align=2)


@inner
def load_some(address: int, count: int, element: int) -> Any:
    """The first `count` numbers at an address, of `element` bytes (2: bf16, 4: float32) each; zeros after them.

    A mask costs time, in stores most of all, so that whole vectors go without.
    """
    if count >= LANES:
        return load_bf16(address) if element == 2 else load(address)
    return load_bf16_some(address, count) if element == 2 else load_f32_some(address, count)


@inner
def store_some(address: int, value: Any, count: int, element: int) -> None:
    if count >= LANES:
        if element == 2:
            store_bf16(address, value)
        else:
            store(address, value)
    elif element == 2:
        store_bf16_some(address, value, count)
    else:
        store_f32_some(address, value, count)


# Scalars in memory.


@emitted(types.float32, types.int64)
def get_f32(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address), typ=_F32, align=4)


@emitted(types.void, types.int64, types.float32)
def put_f32(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address), align=4)


@emitted(types.int64, types.int64)
def get_i32(builder: Any, address: Any) -> Any:
    return builder.sext(builder.load(pointer(builder, address), typ=_I32, align=4), ir.IntType(64))


@emitted(types.int64, types.int64)
def get_i64(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address), typ=ir.IntType(64), align=8)


@emitted(types.void, types.int64, types.int64)
def put_i64(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer(builder, address), align=8)


@emitted(types.void, types.int64, types.int64)
def put_i32(builder: Any, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, _I32), pointer(builder, address), align=4)


@emitted(types.int64, types.int64)
def get_u16(builder: Any, address: Any) -> Any:
    return builder.zext(builder.load(pointer(builder, address), typ=ir.IntType(16), align=2), ir.IntType(64))


@emitted(types.void, types.int64, types.int64)
def put_u16(builder: Any, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, ir.IntType(16)), pointer(builder, address), align=2)


@emitted(types.void, types.int64, types.int64)
def put_u8(builder: Any, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, ir.IntType(8)), pointer(builder, address), align=1)


@emitted(types.void, types.int64, types.int64)
def clear(builder: Any, address: Any, count_bytes: Any) -> None:
    cgutils.memset(builder, pointer(builder, address), count_bytes, 0)


def fetch(builder: Any, address: Any) -> None:
    """Asks for the 64 bytes around an address, and does not wait for them."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer(builder, address), *(ir.Constant(_I32, n) for n in (0, 2, 1))])


prefetch = emitted(types.void, types.int64)(fetch)


@emitted(types.int64, types.int64)
def claim(builder: Any, address: Any) -> Any:
    """Takes the next number of the counter at an address: no two threads get the same."""
    one = ir.Constant(ir.IntType(64), 1)
    return builder.atomic_rmw("add", pointer(builder, address), one, "monotonic")


# Arithmetic.


def _operators() -> None:
    """+ - * / of Lanes."""
    instructions = {
        operator.add: lambda builder, a, b: builder.fadd(a, b),
        operator.sub: lambda builder, a, b: builder.fsub(a, b),
        operator.mul: lambda builder, a, b: builder.fmul(a, b),
        operator.truediv: lambda builder, a, b: builder.fdiv(a, b),
    }
    for symbol, instruction in instructions.items():
        _overload_binary(symbol, emitted(Lanes, Lanes, Lanes)(instruction))


def _overload_binary(symbol: Any, function: Any) -> None:
    @overload(symbol)  # type: ignore[untyped-decorator]  # numba is untyped
    def typed(a: Any, b: Any) -> Any:
        def combined(a: Any, b: Any) -> Any:
            return function(a, b)

        return combined if a is Lanes and b is Lanes else None


_operators()


@emitted(Lanes, types.float32)
def splat(builder: Any, value: Any) -> Any:
    return spread(builder, value, F32_VECTOR)


@emitted(Lanes, Lanes, Lanes, Lanes)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", F32_VECTOR, a, b, c)


@emitted(Lanes, Lanes, Lanes)
def greater(builder: Any, a: Any, b: Any) -> Any:
    """The greater of each pair; b where a is not a number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@emitted(Lanes, Lanes, Lanes)
def smaller(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of each pair; b where a is not a number."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@emitted(Lanes, Lanes, types.int64)
def only_first(builder: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes, minus infinity in the others."""
    return builder.select(_mask(builder, count), value, ir.Constant(F32_VECTOR, [float("-inf")] * LANES))


@emitted(Lanes, Lanes, types.int64)
def except_first(builder: Any, value: Any, count: Any) -> Any:
    """Minus infinity in the first `count` lanes, the others as they are."""
    return builder.select(_mask(builder, count), ir.Constant(F32_VECTOR, [float("-inf")] * LANES), value)


def _halve(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduces 16 lanes to one by a tree: lane i with i + 8, then + 4, + 2, + 1."""
    width = LANES
    while width > 1:
        width //= 2
        order = [*range(width, 2 * width), *range(width, LANES)]
        mask = ir.Constant(I32_VECTOR, (order + [0] * LANES)[:LANES])
        vector = combine(vector, builder.shuffle_vector(vector, vector, mask))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@emitted(types.float32, Lanes)
def total(builder: Any, value: Any) -> Any:
    return _halve(builder, value, builder.fadd)


@emitted(types.float32, Lanes)
def greatest(builder: Any, value: Any) -> Any:
    return _halve(builder, value, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@emitted(types.float32, Lanes)
def first(builder: Any, value: Any) -> Any:
    return builder.extract_element(value, ir.Constant(_I32, 0))


@emitted(Lanes, Lanes)
def _nearest(builder: Any, value: Any) -> Any:
    return call(builder, "llvm.rint.v16f32", F32_VECTOR, value)


@emitted(Lanes, Lanes, Lanes)
def _times_power_of_two(builder: Any, value: Any, power: Any) -> Any:
    """value * 2**power for whole powers that keep it normal; 0 where the power is -127 or less."""
    whole = builder.fptosi(power, I32_VECTOR)
    bits = builder.add(
        builder.bitcast(value, I32_VECTOR), builder.shl(whole, ir.Constant(I32_VECTOR, [23] * LANES))
    )
    tiny = builder.fcmp_ordered("<=", power, ir.Constant(F32_VECTOR, [-127.0] * LANES))
    return builder.select(tiny, ir.Constant(F32_VECTOR, [0.0] * LANES), builder.bitcast(bits, F32_VECTOR))


@inner
def exp2(x: Any) -> Any:
    """2**x for x <= 127: relative error below 3e-7; exactly 1 at 0, exactly 0 from -127 down.

    A polynomial of degree 6 on [-1/2, 1/2], then the power of two by its exponent bits.
    """
    x = greater(x, splat(_LOWEST))
    whole = _nearest(x)
    f = x - whole
    y = splat(_EXP2[6])
    y = fma(y, f, splat(_EXP2[5]))
    y = fma(y, f, splat(_EXP2[4]))
    y = fma(y, f, splat(_EXP2[3]))
    y = fma(y, f, splat(_EXP2[2]))
    y = fma(y, f, splat(_EXP2[1]))
    y = fma(y, f, splat(_EXP2[0]))
    return _times_power_of_two(y, whole)
