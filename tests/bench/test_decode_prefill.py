"""The whole of `python -m bench.decode_prefill`, with made-up peers and a made-up limit."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import decode_prefill
from bench.cells import Cell, Kind
from engine.model.config import ModelConfig
from tests.bench.fakes import Peers


class MadeUpLimit:
    """Measures nothing: as many tokens a second as the cell has."""

    def __init__(self, config: ModelConfig, dtype: str, threads: int) -> None: ...

    def tokens_per_second(self, cell: Cell) -> float:
        return cell.tokens


SMALL = {
    "dtypes": ["float32"],
    "streams": ["1", "2"],
    "contexts": ["8"],
    "repeats": ["1"],
    "peers": ["sluice"],
}


class Command:
    """Runs the bench in this process, with every peer but vLLM (for which no Python is given) made up."""

    def __init__(self, peers: Peers, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peers = peers
        self.out = directory / "out"
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(decode_prefill, "Meter", MadeUpLimit)
        for name in ("sluice", "generate", "cb"):
            self.use(name)

    def use(self, name: str, **how: Any) -> None:
        module = self.peers.peer(name, **how).module
        self._monkeypatch.setitem(decode_prefill.MODULES, name, module)

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        """All lines written."""
        small = [word for name, values in SMALL.items() for word in (f"--{name}", *values)]
        self._monkeypatch.setattr(sys, "argv", ["bench", "--out", str(self.out), *small, *arguments])
        decode_prefill.main()
        return self.lines()

    def lines(self) -> list[dict[str, Any]]:
        (path,) = self.out.glob("*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def command(peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(peers, tmp_path, monkeypatch)


def rows(lines: list[dict[str, Any]], peer: str) -> list[tuple[str, int]]:
    return [(line["kind"], line["streams"]) for line in lines if line.get("peer") == peer]


CELLS = [("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2)]


def test_every_cell_has_a_limit_and_a_row_a_peer_and_repeat(
    command: Command, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = command.run("--models", str(model), "--peers", "sluice", "generate", "cb")
    assert lines[0]["machine"]["cores"] >= 1
    assert [line["peers"]["cb"] for line in lines if "peers" in line] == [{"version": "made up"}]
    for peer in ("limit", "sluice", "generate", "cb"):
        assert rows(lines, peer) == CELLS
    assert "model, float32: median tokens/s" in capsys.readouterr().out


def test_an_absent_peer_is_reported_and_the_others_are_measured(
    command: Command, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM has no Python here; the other one's does not have its package."""
    command.use("cb", loading="import no_engine")
    lines = command.run("--models", str(model), "--peers", "sluice", "vllm", "cb")
    assert {line.get("peer") for line in lines} == {None, "limit", "sluice"}
    printed = capsys.readouterr().out
    assert "vllm is absent from model, float32: no --vllm-python given" in printed
    assert "cb is absent from model, float32: cb ended with code 1" in printed
    assert "No module named 'no_engine'" in printed


def test_a_peer_that_dies_in_the_middle_is_reported_with_its_last_words_as_they_are(
    command: Command, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may look like markup."""
    command.use("cb", before="new_tokens == 1 or sys.exit('[/wrong] [bold]')")
    lines = command.run("--models", str(model), "--peers", "sluice", "cb")
    assert (rows(lines, "sluice"), rows(lines, "cb")) == (CELLS, CELLS[:2])
    assert (
        "cb is absent from model, float32: cb ended with code 1:\n[/wrong] [bold]" in capsys.readouterr().out
    )


def test_patience_is_an_option(command: Command, model: Path) -> None:
    """Eight tokens took 8 s: sixteen would take longer than ten."""
    command.use("sluice", first="1.0 * sum(map(len, prompts))")
    assert rows(command.run("--models", str(model), "--patience", "10"), "sluice") == CELLS[::2]


def test_a_model_that_is_written_meanwhile_ends_the_bench_and_what_was_measured_is_shown(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "trained"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    weights = str(other / "model.safetensors")
    command.use("sluice", loading=f"'trained' in setup.model and open({weights!r}, 'w').close()")
    with pytest.raises(SystemExit, match="trained was written while it was loaded: measure a copy"):
        command.run("--models", str(model), str(other))
    assert rows(command.lines(), "sluice") == CELLS
    assert "model, float32: median tokens/s" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_refused_before_any_other_is_measured(
    command: Command, model: Path
) -> None:
    with pytest.raises(SystemExit, match="no-such-directory"):
        command.run("--models", str(model), "no-such-directory")
    assert len(command.lines()) == 1


def test_limits_are_of_the_context_that_is_run(command: Command, model: Path) -> None:
    """A model of 128 positions leaves 64 to a context, since as many may be generated after it."""
    lines = command.run("--models", str(model), "--contexts", "500", "--streams", "1", "--peers", "cb")
    limits = {line["kind"]: line["tokens_per_second"] for line in lines if line.get("peer") == "limit"}
    contexts = {line["kind"]: line["job"]["context"] for line in lines if line.get("peer") == "cb"}
    assert limits == contexts == {Kind.PREFILL: 127, Kind.DECODE: 64}


def test_a_kv_cache_holds_the_decodes_contexts_and_a_prefill_however_large(
    command: Command, model: Path
) -> None:
    large = ["--streams", "4", "--contexts", "8000", "--prefill-tokens", "32000"]
    lines = command.run("--models", str(model), *large)
    (setup,) = [line["setup"] for line in lines if "setup" in line]
    assert setup["kv_tokens"] == 32000 + 4 * 64 + 32000


def test_only_the_kinds_asked_for_are_measured(command: Command, model: Path) -> None:
    assert rows(command.run("--models", str(model), "--kinds", "decode"), "limit") == CELLS[2:]
