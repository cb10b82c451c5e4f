"""`sluice chat`: a conversation with a running server. Ctrl-C stops an answer, Ctrl-D ends the program.

What is said is conversation.py's, the answer answers.py's, the reading of lines keyboard.py's.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from app.config_sources import nearest
from app.remote import NoServer, Remote, ServerRefuses
from app.terminal.answers import Answer
from app.terminal.conversation import CannotRead, Conversation
from app.terminal.keyboard import Keyboard


def chat(remote: Remote, options: argparse.Namespace) -> int:
    """Raises NoServer, ServerRefuses where it cannot begin."""
    settings = {
        name: value
        for name in ("temperature", "max_tokens", "seed")
        if (value := getattr(options, name)) is not None
    }
    conversation = Conversation(options.model or models(remote)[0], options.system, settings)
    session = Session(remote, conversation, Console())
    if options.message is not None:
        return session.once(options.message)
    keyboard = Keyboard(keep=not options.no_history)
    if keyboard.by_hand:
        session.greet()
    with closing(keyboard):
        session.run(keyboard.read)
    return 0


def models(remote: Remote) -> list[str]:
    """Raises NoServer, ServerRefuses."""
    listed = remote.one("GET", "/v1/models").get("data")
    names = [str(each.get("id")) for each in listed] if isinstance(listed, list) else []
    if not names:
        raise NoServer(f"{remote.url} lists no model")
    return names


class Session:
    """One run of the program."""

    def __init__(self, remote: Remote, conversation: Conversation, console: Console) -> None:
        self._remote = remote
        self._talk = conversation
        self._console = console
        self._ended = False

    def greet(self) -> None:
        self._console.print(
            f"[bold]{escape(self._talk.model)}[/] at {self._remote.url}. [dim]/help says what there is; "
            "Ctrl-C stops an answer, Ctrl-D leaves.[/]",
            highlight=False,
        )

    def run(self, read: Callable[[], str | None]) -> None:
        """Until /exit, or `read` has nothing more (None)."""
        while not self._ended and (text := read()) is not None:
            if text.startswith("/"):
                self._obey(text)
            elif text.strip():
                self._ask(text)

    def once(self, text: str) -> int:
        """The answer alone, for scripts. Raises NoServer, ServerRefuses."""
        for piece in Answer(self._remote, self._talk.asking(text)):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0

    def _ask(self, text: str) -> None:
        answer = Answer(self._remote, self._talk.asking(text))
        stopped = False
        try:
            with closing(iter(answer)) as pieces:
                for piece in pieces:
                    self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            stopped = True
        except (NoServer, ServerRefuses) as error:
            self._console.print(f"\n[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
            return
        self._console.print()
        self._talk.answered(text, answer.text)
        account = "stopped; /undo forgets it" if stopped else answer.account()
        self._console.print(f"[dim]{account}[/]\n", highlight=False, soft_wrap=True)

    def _obey(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            near = nearest(name, COMMANDS)
            hint = f"did you mean /{near}?" if near else "/help lists what there is"
            self._say(f"there is no /{name}; {hint}")
            return
        try:
            command(self, rest.strip())
        except (CannotRead, OSError, ValueError, NoServer, ServerRefuses) as error:
            self._say(str(error))

    def _say(self, text: str) -> None:
        self._console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)

    # --- commands: each docstring is its line of /help ------------------------------------------------------------

    def _help(self, rest: str) -> None:
        """this"""
        for name, command in COMMANDS.items():
            self._console.print(f"  [bold]/{name}[/] {escape(command.__doc__ or '')}", highlight=False)
        self._console.print(
            '[dim]A line that ends with \\ goes on; """ begins and ends a text of several lines.[/]'
        )

    def _reset(self, rest: str) -> None:
        """forget the conversation; the system text stays"""
        self._talk.messages.clear()
        self._say("a new conversation")

    def _system(self, rest: str) -> None:
        """[TEXT|-]: show, set or (-) drop what goes before the conversation"""
        if rest:
            self._talk.system = "" if rest == "-" else rest
        self._say(f"system: {self._talk.system or '(none)'}")

    def _model(self, rest: str) -> None:
        """[NAME]: show the models, or talk to another"""
        known = models(self._remote)
        if rest and rest not in known:
            raise ValueError(f"{rest!r} is not served here; there is {', '.join(known)}")
        self._talk.model = rest or self._talk.model
        self._say(", ".join(f"{name} (in use)" if name == self._talk.model else name for name in known))

    def _set(self, rest: str) -> None:
        """NAME=NUMBER: temperature, top_p, max_tokens or seed; without a number the server's own"""
        if rest:
            self._say(self._talk.set(rest))
        else:
            self._say(
                ", ".join(f"{name} = {value}" for name, value in self._talk.settings.items()) or "nothing set"
            )

    def _undo(self, rest: str) -> None:
        """forget the last question and its answer"""
        asked = self._talk.undo()
        self._say("there is nothing to undo" if asked is None else f"forgotten: {asked}")

    def _retry(self, rest: str) -> None:
        """ask the last question again"""
        asked = self._talk.undo()
        if asked is None:
            self._say("nothing was asked yet")
        else:
            self._ask(asked)

    def _history(self, rest: str) -> None:
        """show the conversation"""
        for message in self._talk.messages:
            self._console.print(f"[bold]{message['role']}[/]: {escape(message['content'])}", highlight=False)

    def _save(self, rest: str) -> None:
        """FILE: write the conversation (JSON)"""
        path = _path(rest, "/save")
        self._talk.save(path)
        self._say(f"{len(self._talk.messages)} messages written to {path}")

    def _load(self, rest: str) -> None:
        """FILE: go on with a conversation that was saved"""
        path = _path(rest, "/load")
        self._talk.load(path)
        self._say(f"{len(self._talk.messages)} messages read from {path}")

    def _exit(self, rest: str) -> None:
        """leave"""
        self._ended = True


def _path(rest: str, command: str) -> Path:
    """Raises ValueError."""
    words = shlex.split(rest)
    if len(words) != 1:
        raise ValueError(f"{command} FILE")
    return Path(words[0])


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": Session._help,
    "reset": Session._reset,
    "system": Session._system,
    "model": Session._model,
    "set": Session._set,
    "undo": Session._undo,
    "retry": Session._retry,
    "history": Session._history,
    "save": Session._save,
    "load": Session._load,
    "exit": Session._exit,
}
