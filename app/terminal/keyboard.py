"""Reading what somebody types: lines, texts of several lines, and the history of them. Works on a pipe too."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

HISTORY = Path("~/.local/state/sluice/chat_history")
MOST_LINES = 1000
BLOCK = '"""'


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # not on every platform: then there are no arrow keys
        return None
    return readline


class Keyboard:
    """`keep`: what was typed is there the next time (a file that only its owner can read)."""

    def __init__(self, *, keep: bool, history: Path = HISTORY) -> None:
        self.by_hand = sys.stdin.isatty()
        self._history = history.expanduser() if keep and self.by_hand else None
        self._readline = _readline() if self.by_hand else None
        if self._readline and self._history:
            with suppress(OSError):  # there is none yet
                self._readline.read_history_file(self._history)

    def read(self) -> str | None:
        """A message; None at the end. Ctrl-C begins the line anew."""
        while True:
            try:
                return self._message()
            except EOFError:
                if self.by_hand:
                    sys.stdout.write("\n")
                return None
            except KeyboardInterrupt:
                sys.stdout.write("\n(Ctrl-D or /exit leaves)\n")

    def close(self) -> None:
        """Writes the history."""
        if self._readline and self._history:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.set_history_length(MOST_LINES)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.write_history_file(self._history)

    def _message(self) -> str:
        line = input(self._prompt(">"))
        if line.strip().startswith(BLOCK):
            return self._block(line.strip().removeprefix(BLOCK))
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(self._prompt("…"))
        return line

    def _block(self, first: str) -> str:
        lines = [first] if first else []
        while BLOCK not in (line := input(self._prompt("…"))):
            lines.append(line)
        return "\n".join([*lines, line.partition(BLOCK)[0]]).rstrip("\n")

    def _prompt(self, mark: str) -> str:
        """Colours in brackets that readline does not count; nothing on a pipe."""
        if not self.by_hand:
            return ""
        return f"\001\033[1;36m\002{mark}\001\033[0m\002 " if self._readline else f"{mark} "
