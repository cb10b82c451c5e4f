"""Memory on huge pages: for what a step reads in small pieces from all over, keys and values above all.

A block of one KV head is a page of 4 KiB or less, far from the next: on small pages nearly each one costs a walk
through the page tables, which takes longer than reading it.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on huge pages where the system has them, from HUGE bytes on; it holds what is touched, as elsewhere."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: small pages, the same numbers
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
