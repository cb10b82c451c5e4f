"""A conversation in the terminal: what was said, and how it is asked for. No terminal and no network here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBERS = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
"""What /set takes, and of which kind."""

Message = dict[str, str]


class CannotRead(Exception):
    """A file that is no saved conversation."""


@dataclass(slots=True)
class Conversation:
    """`settings`: of each request, those of NUMBERS that are set."""

    model: str
    system: str = ""
    settings: dict[str, float | int] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def asking(self, text: str) -> dict[str, Any]:
        """The request's body. What was asked is remembered when it is answered."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.messages, {"role": "user", "content": text}]
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": messages, **self.settings, **streamed}

    def answered(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def undo(self) -> str | None:
        """Forgets the last exchange; what was asked, or None where there was none."""
        if not self.messages:
            return None
        asked = self.messages[-2]["content"]
        del self.messages[-2:]
        return asked

    def set(self, text: str) -> str:
        """`name=number`, or `name=` to leave it to the server. Raises ValueError."""
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in NUMBERS:
            raise ValueError(f"{name!r} cannot be set; known: {', '.join(NUMBERS)}")
        if not value:
            self.settings.pop(name, None)
            return f"{name} is the server's own"
        try:
            self.settings[name] = NUMBERS[name](value)
        except ValueError as error:
            raise ValueError(f"{name} is no {NUMBERS[name].__name__}: {value!r}") from error
        return f"{name} = {self.settings[name]}"

    def save(self, path: Path) -> None:
        """Raises OSError."""
        kept = {
            "model": self.model,
            "system": self.system,
            "settings": self.settings,
            "messages": self.messages,
        }
        path.expanduser().write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """All but the model, which is the server's matter. Raises OSError, CannotRead."""
        try:
            kept = json.loads(path.expanduser().read_text(encoding="utf-8"))
            system, messages = str(kept["system"]), [_message(each) for each in kept["messages"]]
            settings = {str(name): NUMBERS[name](value) for name, value in kept["settings"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotRead(f"{path} is no conversation that /save wrote") from error
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise CannotRead(f"{path}: user and assistant do not take turns")
        self.system, self.messages, self.settings = system, messages, settings


def _message(found: dict[str, Any]) -> Message:
    return {"role": str(found["role"]), "content": str(found["content"])}
