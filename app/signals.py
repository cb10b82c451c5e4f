"""Signals as bytes on a socket, for the event loop's thread to read.

A signal may be delivered to any thread, but Python runs handlers on the main one alone, and only once that returns
to the interpreter: while it waits for a step to run, it may never. So the handlers do nothing, and the byte that the
interpreter writes to its wake-up descriptor, from whichever thread was hit, is what counts.
"""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

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
