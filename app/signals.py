"""Signals as bytes on a socket, for the event loop's thread to read; before there is one, as the process's end.

A signal may be delivered to any thread, but Python runs handlers on the main one alone, and only once that returns
to the interpreter: while it waits for a step to run, it may never. So the handlers do nothing, and the byte that the
interpreter writes to its wake-up descriptor, from whichever thread was hit, is what counts.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[socket.socket]:
    """A non-blocking socket with a byte for each SIGTERM or SIGINT, while the block runs. On the main thread."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
        descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ending_at_once(
    exit_codes: Mapping[signal.Signals, int], last: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """While the block runs, each of these ends the process on the spot, after `last()` and a line. On the main thread.

    Not by an exception: one that comes while torch is imported aborts, and numba's compiler swallows it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        last()
        with suppress(OSError, ValueError):  # nobody may be there to read it
            os.write(sys.stderr.fileno(), f"sluice: ended by {signal.Signals(number).name}\n".encode())
        os._exit(exit_codes[signal.Signals(number)])

    before = {number: signal.signal(number, end) for number in exit_codes}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
