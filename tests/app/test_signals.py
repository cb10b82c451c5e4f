"""Signals reach the event loop's thread, whatever the main thread is waiting for; before there is one, they end all."""

import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import pytest

from app.signals import ending_at_once, stop_signals

REPOSITORY = Path(__file__).parents[2]


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
    with ending_at_once({signal.SIGINT: 130}):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_before_ready_is_a_line_and_an_exit_code_whoever_swallows_exceptions(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """Regression: Ctrl-C aborted torch's import, and was lost in numba's compiler. Here a plug-in is loaded."""
    text = f"import signal\ntry: signal.raise_signal({int(number)})\nexcept BaseException: pass\n"
    (tmp_path / "house_stopped.py").write_text(text)
    arguments = ["serve", "--set", "server.port=0", "--set", "policies.order=house_stopped:Order"]
    program = f"import sys; sys.path.append({str(tmp_path)!r}); from app.cli import main; main({arguments})"
    assert ended(program) == (code, f"sluice: ended by {number.name}\n")


def test_ctrl_c_while_a_profile_is_measured_is_a_line_and_exit_code_130() -> None:
    program = (
        "import signal; from app.cli import main; from app.profiling import measuring\n"
        "measuring.measure = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "main(['bench', 'profile'])\n"
    )
    assert ended(program) == (130, "sluice: ended by SIGINT\n")


def ended(program: str) -> tuple[int, str]:
    """Exit code and standard error."""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=False)
    return done.returncode, done.stderr.decode()
