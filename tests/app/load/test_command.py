"""`sluice bench serve` as a whole: against the real application over a scripted runner, and a server that is late."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from app.cli import main
from app.load import command
from app.load.compare import ratios
from app.load.figures import figures
from app.load.generator import Sample
from app.load.report import Result, attainments
from app.load.running import Target
from app.simulate.figures import Objectives
from app.workload.trace import TraceRequest
from tests.app.rig import rig

SHORT = ("--requests", "6", "--input-tokens", "20-40", "--output-tokens", "3-9", "--ids", "40-120")


async def bench(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["bench", "serve", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_rates_on_one_server_give_tables_rows_charts_and_a_capacity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_measure", _outside_of_signals(command._measure))
    async with rig() as server:
        code = await bench("--url", server.url, *SHORT, "--rate", "50,100", "--ttft", "60", "--tpot", "60",
                           "--api-key", "hush", "--output", str(tmp_path))  # fmt: skip
    out, err = capsys.readouterr()
    assert code in (0, command.EXIT_VOID), err  # a busy machine may be late, and says so
    facts, *runs = lines(tmp_path / "runs.jsonl")
    assert "hush" not in json.dumps(facts)
    assert [(run["rate"], run["answered"], run["attainment"]) for run in runs] == [
        (50.0, 6, 1.0),
        (100.0, 6, 1.0),
    ]
    assert "capacity (highest rate with ≥ 90 % attainment)" in out
    rows = lines(tmp_path / "requests.jsonl")
    assert len(rows) == 12
    assert all(row["output_tokens"] == row["output_tokens_asked"] for row in rows)
    assert all(row["prompt_tokens"] == row["prompt_tokens_asked"] for row in rows)
    assert {name for name in os.listdir(tmp_path) if name.endswith(".png")} == {
        "latency.png", "capacity.png", "timeline-01.png", "timeline-02.png",
    }  # fmt: skip


def _ignored(*_: object) -> None:
    pass


def _outside_of_signals(measure: Any) -> Any:
    """Signals are the main thread's; a test that runs the command on another has none."""

    async def measured(*arguments: Any) -> None:
        loop = asyncio.get_running_loop()
        with patch.multiple(loop, add_signal_handler=_ignored, remove_signal_handler=_ignored):
            await measure(*arguments)

    return measured


async def test_two_servers_are_compared_and_a_refusal_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second refuses every third request; it sends no usage."""
    monkeypatch.setattr(command, "_measure", _outside_of_signals(command._measure))
    async with rig() as server, TestServer(_other()) as other:
        url = str(other.make_url("")).rstrip("/")
        code = await bench(
            "--compare", server.url, url, *SHORT, "--rate", "60", "--prompts", "chat", "--warmup", "1"
        )
    out, err = capsys.readouterr()
    assert code in (0, command.EXIT_VOID), err
    assert "B ÷ A" in out
    assert "2 of http_429, as in: later" in out
    assert "the server sent no usage with 4 answers; tokens are its chunks" in out


def _other() -> web.Application:
    asked = 0

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "other"}]})

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked % 3 == 0:
            return web.json_response({"error": {"message": "later"}}, status=429)
        response = web.StreamResponse()
        await response.prepare(request)
        for text, reason in (("a", None), ("b", None), ("", "length")):
            choice = {"delta": {"content": text}, "finish_reason": reason}
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    return app


def result(server: str, rate: float, lag: float = 0.0, ttft: float = 1.0, repeat: int = 0) -> Result:
    sample = Sample(TraceRequest(0, "a", 0.0, 9, 2), 0.0, lag, [ttft, ttft + 1], 2, "usage", error="")
    return Result(server, rate, repeat, [sample], figures([sample], Objectives(ttft=1.5)))


def test_ratios_are_of_medians_over_repeats() -> None:
    results = [result("a", 1.0, ttft=t, repeat=n) for n, t in enumerate((1.0, 2.0, 9.0))]
    table = ratios([*results, result("b", 1.0, ttft=3.0)], "a", "b")
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("1", "time to first token, s, mean", "2", "3", "1.500") in cells


def test_a_rate_is_met_only_if_each_repeat_meets_it() -> None:
    results = [result("a", 2.0), result("a", 2.0, ttft=2.0, repeat=1), result("a", 1.0)]
    assert attainments(results) == {"a": [(1.0, 1.0), (2.0, 0.0)]}


def test_a_generator_that_was_late_says_so_and_ends_with_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(targets: Any, traces: Any, asking: Any, options: Any, results: list[Result]) -> None:
        results.append(result("http://a", 1.0, lag=0.02))

    monkeypatch.setattr(command, "_measure", late)
    assert main(["bench", "serve", "--rate", "1"]) == command.EXIT_VOID
    assert "VOID" in capsys.readouterr().out


def test_ctrl_c_prints_what_was_measured_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers one request, and at the second one interrupts us and hangs."""
    measure = command._measure

    async def with_server(targets: Any, *rest: Any) -> None:
        async with TestServer(_interrupting()) as server:
            target = Target(str(server.make_url("")).rstrip("/"), model="m")
            await measure([target], *rest)

    monkeypatch.setattr(command, "_measure", with_server)
    code = main(["bench", "serve", "--rate", "50", "--requests", "2", "--warmup", "0"])
    out = capsys.readouterr().out
    assert code == command.EXIT_INTERRUPTED
    assert "interrupted; requests that ran then are attempted" in out
    assert "1 of unfinished" in out


def _interrupting() -> web.Application:
    asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        response = web.StreamResponse()
        await response.prepare(request)
        choice = {"text": "a", "finish_reason": "length"}
        if asked == 2:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        await response.write(f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    return app


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "poisson arrivals need a --rate"),
        (["--arrivals", "recorded"], "needs a --trace"),
        (["--rate", "1", "--url", "localhost:1"], "is no URL"),
        (["--rate", "1", "--extra", "{"], "--extra is not JSON"),
        (["--rate", "1", "--trace", "/nowhere.csv"], "nowhere"),
        (["--rate", "1", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_used_is_a_line_and_exit_code_2(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *arguments]) == command.EXIT_USAGE
    error = capsys.readouterr().err
    assert why in error
    assert "Traceback" not in error


async def test_an_output_that_cannot_be_written_is_refused_before_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: it was a traceback, after everything was measured."""
    (tmp_path / "file").touch()
    app, asked = _other(), []

    async def noted(request: web.Request, response: web.StreamResponse) -> None:
        asked.append(request.path)

    app.on_response_prepare.append(noted)
    async with TestServer(app) as server:
        for place in (tmp_path / "file", tmp_path / "file" / "in it", Path("/proc/none")):
            code = await bench("--url", str(server.make_url("")), "--rate", "9", "--output", str(place))
            assert code == command.EXIT_USAGE
            assert capsys.readouterr().err.startswith(f"sluice: --output {place} cannot be written: ")
    assert not asked


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_rows_that_find_no_room_are_a_line_after_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(targets: Any, traces: Any, asking: Any, options: Any, results: list[Result]) -> None:
        results.append(result("http://a", 1.0))

    (tmp_path / "runs.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(command, "_measure", measured)
    assert main(["bench", "serve", "--rate", "1", "--output", str(tmp_path)]) == command.EXIT_USAGE
    out, err = capsys.readouterr()
    assert "http://a" in out
    assert err == f"sluice: --output {tmp_path} cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--rate", "1,x"], ["--input-tokens", "9-3"]])
def test_malformed_arguments_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", *arguments])
    assert end.value.code == command.EXIT_USAGE
