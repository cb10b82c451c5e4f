"""A model's pass over so many rows as a list of calls: noted once, then done without a line of Python in between.

While calls are noted, nothing is computed: each call's arguments are copied, and results stand in an arena, whose
pieces are lent again when nobody looks at them any more, as a memory allocator would. A pass done again therefore uses
the same addresses in the same order. Who runs the calls is in cpu_team.py; what stands in them in cpu.py.
"""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.cpu_native import Clock, Native
from engine.kernels.cpu_team import EVERYBODY, team


class Arena:
    """Memory for results, shared by a runner's passes: one runs at a time. Sizes are powers of two for that."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._buffers: dict[int, NDArray[np.uint8]] = {}

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, whose memory is lent again when its last view has gone."""
        size = 1 << (prod(shape) * dtype.itemsize - 1).bit_length()
        free = self._free[size]
        buffer = free.pop() if free else self._buy(size)
        lent = buffer[:]  # torch keeps it as long as it has the memory
        weakref.finalize(lent, free.append, buffer).atexit = False
        return _tensor(lent, shape, dtype)

    def same_memory(self, tensor: Tensor) -> Tensor:
        """A tensor like one that begins a lent piece, which does not keep the piece from being lent again."""
        return _tensor(self._buffers[tensor.data_ptr()], tuple(tensor.shape), tensor.dtype)

    def _buy(self, size: int) -> NDArray[np.uint8]:
        buffer = torch.empty(size, dtype=torch.uint8).numpy()
        self._buffers[buffer.ctypes.data] = buffer
        return buffer


def _tensor(memory: NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(memory)[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Program:
    """Calls in their order."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._words: list[int] = []
        self._kept: list[object] = []

    def add(self, kernel: Native, arguments: ctypes.Structure, alone: bool) -> None:
        """Notes a call, with what its arguments are now. `alone`: one thread is enough."""
        own: Any = type(arguments).from_buffer_copy(arguments)
        own.counters = ctypes.addressof(own)
        self._kept.append(own)
        self._words += (kernel.address, ctypes.addressof(own), 1 if alone else EVERYBODY)

    def keep(self, owner: object) -> None:
        """Of memory that calls read or write."""
        self._kept.append(owner)

    def ready(self, result: Tensor) -> None:
        """All calls are noted."""
        self._calls = (ctypes.c_int64 * len(self._words))(*self._words)
        self._result = self._arena.same_memory(result)

    def run(self, clock: Clock) -> Tensor:
        """Does it all. The result is good until another program runs."""
        team().run_calls(self._calls, clock)
        return self._result


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Notes what torch computes itself while a program is made: no program would do it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.computed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.computed.append(str(func))
        return func(*args, **(kwargs or {}))


def noted(program: Program, forward: Callable[[], Tensor]) -> Program | None:
    """The program with the calls of `forward`; None when torch computes a part of it itself."""
    with Watch() as watch:
        result = forward()
    if watch.computed:
        return None
    program.keep(forward)
    program.ready(result)
    return program
