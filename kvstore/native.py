"""What compiled code needs of C and numba does not have: both work on addresses, and check nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Runs without the interpreter's lock; compiled once, and kept on disk for other starts."""
    made: F = numba.njit(nogil=True, cache=True)(function)
    return made


def emitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """For compiled code: `function` says which instructions a call of it is, given its arguments' types."""
    made: Callable[..., Any] = intrinsic(function)
    return made


@emitted
def memcpy(context: Any, target: Any, source: Any, size: Any) -> tuple[Any, Any]:
    """C's, between addresses: assigning one row to another is a loop over bytes, at a third of the speed."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in values[:2]]
        cgutils.raw_memcpy(builder, *pointers, values[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


preadv = types.ExternalFunction("preadv", types.intp(types.int32, types.intp, types.int32, types.int64))
"""The system's call: (file, address of iovec structures, how many, offset). Bytes read, or -1."""
