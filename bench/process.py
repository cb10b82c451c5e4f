"""A peer's process, from the bench's side: start it, ask it, end it."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bench.peers.wire import Job, Setup, Trace

ROOT = Path(__file__).parents[1]
LAST_LINES = 12


class PeerFailed(Exception):
    """A peer ended instead of answering: its last lines say why. One not installed fails at its start."""


@dataclass(frozen=True, slots=True)
class Program:
    """A peer's name, the Python that has it, and the module that runs it."""

    name: str
    python: str
    module: str


class PeerProcess:
    """Loads at once (seconds to a minute). Raises PeerFailed, or OSError when there is no such Python."""

    def __init__(self, program: Program, setup: Setup) -> None:
        self.name = program.name
        command = [program.python, "-m", program.module, json.dumps(asdict(setup))]
        with contextlib.ExitStack() as undo:
            self._errors: IO[bytes] = undo.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            undo.callback(self.close)
            self.facts: dict[str, Any] = self._answer("ready")
            undo.pop_all()  # it is up: close() is the caller's from here on

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: Job) -> Sequence[Trace]:
        """One trace a stream. Raises PeerFailed."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died since: then no answer comes, and that says why
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
        return [Trace(**trace) for trace in self._answer("traces")]

    def _answer(self, key: str) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or what a process wrote before it was killed
            raise PeerFailed(f"{self.name} ended with code {self._process.wait()}:\n{self._last_words()}")
        return json.loads(line)[key]

    def _last_words(self) -> str:
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-LAST_LINES:])

    def close(self) -> None:
        """Ends its input, and the process itself if it does not heed that."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # closing writes what a dead peer did not take
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
