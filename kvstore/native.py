"""What compiled code needs of C and numba does not have: both work on addresses, and check nothing."""

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def memcpy(context: Any, target: Any, source: Any, size: Any) -> tuple[Any, Any]:
    """C's, between addresses: assigning one row to another is a loop over bytes, at a third of the speed."""

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in values[:2]]
        cgutils.raw_memcpy(builder, *pointers, values[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


preadv = types.ExternalFunction("preadv", types.intp(types.int32, types.intp, types.int32, types.int64))
"""The system's call: (file, address of iovec structures, how many, offset). Bytes read, or -1."""
