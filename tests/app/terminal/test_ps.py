"""`sluice ps`: beside the real application with requests at hand; and speeds between two looks."""

import asyncio
import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from app.cli import main
from app.terminal.command import EXIT_NO_SERVER
from app.terminal.ps import MOST_ROWS, Speeds, shown
from tests.app.rig import Rig, rig


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """A server in this process would log to the output that is looked at."""
    with capture_logs():
        yield


async def held(server: Rig, count: int) -> list["asyncio.Task[tuple[int, dict[str, object]]]"]:
    """Requests that cannot go on: the gate is shut."""
    server.worker.gate.clear()
    tasks = [
        asyncio.ensure_future(server.post("/v1/completions", prompt="hello", max_tokens=5))
        for _ in range(count)
    ]
    await server.until(running=count)
    return tasks


async def ps(server: Rig, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["ps", "--url", server.url, *arguments])


async def test_requests_at_hand_are_shown_once_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    async with rig(max_sequences=2) as server:
        tasks = await held(server, 3)
        assert await ps(server, "--once") == 0
        table = capsys.readouterr().out
        assert await ps(server, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        server.worker.gate.set()
        await asyncio.gather(*tasks)
        assert await ps(server, "--once") == 0
        idle = capsys.readouterr().out
    ids = {each["id"] for each in found["requests"]}
    assert len(ids) == 3
    assert all(name in table for name in ids)
    assert "otter" in table
    assert "waiting" in table
    assert found["state"]["kv_blocks"] == 64
    assert "no request is running or waiting" in idle


async def test_several_replicas_have_a_line_each_and_requests_say_where_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with rig(replicas=3) as server:
        server.engine.drain_replica(2, draining=True)
        for worker in server.workers:
            worker.gate.clear()
        tasks = await held(server, 2)
        (moved, _) = server.engine.requests()
        name, target = str(moved["id"]), 1 - int(str(moved["replica"]))
        server.engine.migrate(name, target)
        assert await ps(server, "--once") == 0
        table = capsys.readouterr().out
        for worker in server.workers:
            worker.gate.set()
        await asyncio.gather(*tasks)
    lines = table.splitlines()
    told = [line.split(None, 3)[1:3] for line in lines if line.startswith("replica ")]
    assert told == [["0", "up:"], ["1", "up:"], ["2", "draining:"]]
    head = next(line for line in lines if line.startswith("id")).split()
    row = next(line for line in lines if name in line).split()
    assert row[head.index("replica")] == str(target)
    assert row[head.index("moves")] == "1"


def test_speeds_are_tokens_between_two_looks() -> None:
    now = iter([10.0, 12.0])
    speeds = Speeds(lambda: next(now))
    assert speeds.of([{"id": "a", "output_tokens": 4}]) == {}
    requests = [{"id": "a", "output_tokens": 10}, {"id": "new", "output_tokens": 1}]
    assert speeds.of(requests) == {"a": 3.0}


def test_more_requests_than_a_screen_has_are_counted() -> None:
    state = {
        "model": "m[red]", "alive": False, "draining": True, "running": 1, "waiting": 2, "preemptions": 3,
        "kv_used_blocks": 1, "kv_blocks": 2, "kv_cached_blocks": 0, "policies": {"order": "fcfs"},
        "tiers": {"host": {"up": True, "blocks": 1, "capacity_blocks": 2}, "disk": {"up": False}},
    }  # fmt: skip
    requests = [
        {"id": str(n), "state": "waiting", "arrived": n, "output_tokens": 0} for n in range(MOST_ROWS + 5)
    ]
    out = io.StringIO()
    Console(file=out, width=120).print(shown({"state": state, "requests": requests}, None))
    told = out.getvalue()
    assert "and 5 more" in told
    assert "m[red]" in told
    assert "its engine has died" in told
    assert "host KV" in told
    assert "disk KV" not in told


async def test_an_address_beside_the_api_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig() as server:
        code = await asyncio.to_thread(main, ["ps", "--once", "--url", server.url + "/nowhere"])
    assert code == EXIT_NO_SERVER
