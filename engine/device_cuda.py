"""What the overlapped runner needs of a device: copies that wait for nothing, marks in time, captured work.

`StreamedDevice` is the border; `CudaDevice` is the card: one stream of its own, pinned memory, events,
graphs. Everything on it runs in the order it was queued, and only a Mark is ever waited for. Not yet run on a
card. Not here: what is queued (runner_cuda.py), kernels (kernels/).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WARM_UP_RUNS = 2
"""Runs of a work before its capture: compilers, autotuners and workspaces must have settled."""


class Mark(Protocol):
    """A moment in the device's queue."""

    def wait(self) -> None:
        """Blocks this thread, the interpreter lock released, until all that was queued before is done."""

    def seconds_since(self, earlier: Any) -> float:
        """Device time between two marks that have passed."""


class StreamedDevice(Protocol):
    def queue(self) -> AbstractContextManager[None]:
        """While it is entered, tensors' operations are queued here. Entered by one thread at a time."""

    def upload(self, array: NDArray[np.int64]) -> Tensor: ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, to be read once a later mark has passed."""

    def mark(self) -> Mark: ...

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Work over fixed tensors, to be queued again at a small cost.

        Its result is overwritten by the next run.
        """


class CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's omission
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: "CudaMark") -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaDevice:
    """A StreamedDevice.

    Other threads may read finished results on the default stream: this one never blocks it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's omission
        self._graph_pool = (
            torch.cuda.graph_pool_handle()
        )  # graphs run one at a time: they share their scratch
        self._stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way

    def queue(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)

    def upload(self, array: NDArray[np.int64]) -> Tensor:
        # torch's caching allocator keeps the pinned memory until the copy is done
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> CudaMark:
        return CudaMark(self._stream)

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        for _ in range(WARM_UP_RUNS):
            work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._graph_pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
