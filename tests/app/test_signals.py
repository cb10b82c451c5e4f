"""Signals reach the event loop's thread, whatever the main thread is waiting for."""

import select
import signal
import threading
from queue import SimpleQueue

from app.signals import stop_signals


def test_a_signal_that_hits_another_thread_is_seen_while_the_main_thread_waits() -> None:
    """Regression: Ctrl-C on an idle server was lost when the kernel gave it to a thread of a library."""
    with stop_signals() as receiver:
        seen: SimpleQueue[bytes] = SimpleQueue()

        def hit_and_look() -> None:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            readable, _, _ = select.select([receiver], [], [], 10)
            seen.put(receiver.recv(16) if readable else b"")

        threading.Thread(target=hit_and_look).start()
        assert seen.get() == bytes([signal.SIGTERM])


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
