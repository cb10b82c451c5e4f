"""`sluice chat` against the real application over a scripted runner; and Ctrl-C, with a server that is none."""

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from app.cli import main
from app.remote import Remote
from app.terminal.chat import Session
from app.terminal.command import EXIT_NO_SERVER
from app.terminal.conversation import Conversation
from app.terminal.keyboard import Keyboard
from tests.app.rig import STORY, rig

Typed = Callable[..., None]
ANSWER = STORY[23:35].decode()
"""Of the scripted runner, to a prompt of 23 tokens: "hello" alone."""


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """A server in this process would log to the output that is looked at."""
    with capture_logs():
        yield


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """What comes on standard input, a line each."""

    def type_(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return type_


async def chat(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["chat", "--max-tokens", "12", *arguments])


async def test_a_message_is_answered_and_the_conversation_goes_on(
    typed: Typed, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    typed("hello", "/undo", "hello", "", '"""', "two", 'lines"""', f"/save {saved}", "/exit", "never asked")
    async with rig() as server:
        assert await chat("--url", server.url, "--system", "be brief") == 0
    out = capsys.readouterr().out
    assert out.count("12 tokens") == 3
    assert "prompt tokens cached · cut at max_tokens" in out
    kept = json.loads(await asyncio.to_thread(saved.read_text))
    assert [each["content"] for each in kept["messages"][::2]] == ["hello", "two\nlines"]
    assert all(each["content"] in out for each in kept["messages"][1::2])
    assert kept["system"] == "be brief"


async def test_one_message_prints_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with rig() as server:
        assert await chat("--url", f"{server.url}/v1", "hello") == 0
    assert capsys.readouterr().out == ANSWER + "\n"


async def test_commands_tell_and_what_is_wrong_with_them_ends_nothing(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("/help", "/sytem x", "/model badger", "/model", "/set colour=1", "/set seed=3", "/set", "/load /nowhere",
          "/save", "/system be kind", "/retry", "/history", "/reset", "forbidden", "hello")  # fmt: skip
    async with rig() as server:
        assert await chat("--url", server.url) == 0
    out = capsys.readouterr().out
    for told in ("/system", "did you mean /system?", "'badger' is not served here; there is otter", "otter (in use)",
                 "'colour' cannot be set", "seed = 3", "No such file", "/save FILE", "system: be kind",
                 "nothing was asked yet", "a new conversation", "12 tokens"):  # fmt: skip
        assert told in out, told


async def test_an_error_of_the_server_is_told_and_not_remembered(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("forbidden", "/history", "hello")
    async with rig() as server:
        assert await chat("--url", server.url) == 0
    out = capsys.readouterr().out
    assert "the template refuses these messages" in out
    assert "user: forbidden" not in out
    assert ANSWER in out, "as if nothing had been asked before"


def test_without_a_server_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("chat", "ps"):
        assert main([command, "--url", "http://127.0.0.1:9"]) == EXIT_NO_SERVER
        error = capsys.readouterr().err
        assert "no server answers at http://127.0.0.1:9" in error
        assert "sluice serve" in error
        assert error.count("\n") == 1


class Interrupted(Remote):
    """Two pieces, then Ctrl-C; afterwards whole answers."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self.asked: list[dict[str, Any]] = []
        self.hung_up = False

    def lines(self, method: str, path: str, body: object = None) -> Iterator[bytes]:
        assert isinstance(body, dict)
        self.asked.append(body)
        try:
            for text in ("Once", " upon"):
                yield b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n"
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            yield b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n'
            yield b"data: [DONE]\n"
        finally:
            self.hung_up = True


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    """What had come is part of the conversation."""
    remote, out = Interrupted(), io.StringIO()
    session = Session(remote, Conversation("m"), Console(file=out))
    said = iter(["tell me", "go on", None])
    session.run(lambda: next(said))
    assert remote.hung_up
    assert "stopped" in out.getvalue()
    assert [each["content"] for each in remote.asked[1]["messages"]] == ["tell me", "Once upon", "go on"]


def test_a_line_that_ends_with_a_backslash_goes_on_and_the_end_of_input_is_the_end(typed: Typed) -> None:
    typed("one \\", "two", '"""three', "", "four", '"""')
    keyboard = Keyboard(keep=True)
    assert (keyboard.read(), keyboard.read(), keyboard.read()) == ("one \ntwo", "three\n\nfour", None)
    keyboard.close()
