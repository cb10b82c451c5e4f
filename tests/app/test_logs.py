"""The log: one line a finished request, JSON off a terminal, and nothing that clients wrote."""

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from app.config import LogSection
from app.logging import MAX_UNWRITTEN, logging_to
from tests.app.rig import rig

TEXT = "/v1/completions"


@asynccontextmanager
async def logged(stream: io.StringIO) -> AsyncIterator[None]:
    """Starting and ending the writing thread waits for it, so that is not done on the loop's thread."""
    logging_on = logging_to(stream, LogSection())
    await asyncio.to_thread(logging_on.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(logging_on.__exit__, None, None, None)


def lines(stream: io.StringIO, event: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


async def test_a_finished_request_is_one_line_with_its_accounts() -> None:
    stream = io.StringIO()
    async with (
        logged(stream),
        rig() as server,
        server.client.post(
            TEXT, json={"prompt": "secret words", "max_tokens": 7, "n": 2}, headers={"x-request-id": "mine"}
        ) as response,
    ):
        answer = await response.json()
    (line,) = lines(stream, "request_finished")
    expected = {
        "id": answer["id"],
        "client_id": "mine",
        "endpoint": TEXT,
        "model": "otter",
        "choices": 2,
        "prompt_tokens": 12,
        "cached_tokens": 0,
        "output_tokens": 14,
        "finish_reason": "length",
        "preemptions": 0,
        "recomputed_tokens": 0,
        "level": "info",
    }
    assert {name: line[name] for name in expected} == expected
    assert line["queued_seconds"] >= 0
    assert 0 <= line["ttft_seconds"] <= line["e2e_seconds"]
    assert "secret" not in stream.getvalue()
    assert "otter —" not in stream.getvalue()


async def test_a_refused_request_has_no_line() -> None:
    stream = io.StringIO()
    async with logged(stream), rig() as server:
        assert (await server.post(TEXT, prompt="x", max_tokens=9999))[0] == 400
    assert lines(stream, "request_finished") == []


async def test_a_bug_of_ours_is_logged_and_answered_with_500(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    async with logged(stream), rig() as server:

        def broken(text: str, add_special_tokens: bool = True) -> list[int]:
            raise AssertionError("a bug")

        monkeypatch.setattr(server.served.model.tokenizer, "encode", broken)
        status, answer = await server.post(TEXT, prompt="x")
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "a bug" not in answer["error"]["message"]
    (line,) = lines(stream, "internal_error")
    assert line["exception"][0]["exc_type"] == "AssertionError"


def test_the_level_holds_for_libraries_too() -> None:
    stream = io.StringIO()
    with logging_to(stream, LogSection(level="warning")):
        logging.getLogger("somebody").info("hidden")
        logging.getLogger("somebody").warning("shown")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["shown"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_no_json_unless_asked() -> None:
    stream = Terminal()
    with logging_to(stream, LogSection()):
        structlog.stdlib.get_logger("here").info("hello", name="you")
    assert "\x1b[" in stream.getvalue()
    with logging_to(stream, LogSection(format="json")):
        logging.getLogger("there").info("plain")
    assert json.loads(stream.getvalue().splitlines()[-1])["event"] == "plain"


def test_tracebacks_show_no_local_variables() -> None:
    """They would show prompts."""
    for section in (LogSection(), LogSection(format="console")):
        stream = io.StringIO()
        with logging_to(stream, section):
            _fail_with(prompt="secret" + " words")
        assert "ZeroDivisionError" in stream.getvalue()
        assert "secret words" not in stream.getvalue()


def _fail_with(prompt: str) -> None:
    try:
        assert len(prompt) // 0
    except ZeroDivisionError:
        structlog.stdlib.get_logger("here").exception("failed")


class Stuck(io.StringIO):
    """A terminal that nobody reads, until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, text: str) -> int:
        self.gate.wait()
        return super().write(text)


def test_a_log_that_nobody_reads_blocks_nobody() -> None:
    stream = Stuck()
    with logging_to(stream, LogSection()):
        for _ in range(MAX_UNWRITTEN + 100):
            logging.getLogger("talkative").warning("something")
        stream.gate.set()
    assert MAX_UNWRITTEN <= stream.getvalue().count("something") <= MAX_UNWRITTEN + 1
