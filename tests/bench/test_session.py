"""One model with all its peers: what is measured, what is left out and why."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bench.cells import Cell, Kind
from bench.peers.wire import Setup
from bench.process import Program
from bench.session import Effort, ModelChanged, Session, weights_state
from tests.bench.fakes import Peers

PREFILL, DECODE = Cell(Kind.PREFILL, 2, 16), Cell(Kind.DECODE, 2, 16)
EFFORT = Effort(repeats=2, seconds=4.0)


@dataclass
class Loaded:
    session: Session
    notes: list[str]

    def rows(self, *cells: Cell) -> list[dict[str, Any]]:
        return [row for cell in cells for row in self.session.rows(cell)]

    def noted(self, text: str) -> bool:
        return any(text in note for note in self.notes)


@contextmanager
def loaded(
    setup: Setup, programs: Sequence[Program], effort: Effort = EFFORT, max_positions: int = 128
) -> Iterator[Loaded]:
    notes: list[str] = []
    with closing(Session(setup, max_positions, effort, os.getpid(), notes.append)) as session:
        session.load(programs)
        yield Loaded(session, notes)


def speeds(rows: list[dict[str, Any]]) -> set[float]:
    return {round(row["tokens_per_second"], 6) for row in rows}


def test_rows_are_the_figures_of_each_peer_and_repeat(peers: Peers, setup: Setup) -> None:
    with loaded(setup, [peers.peer("sluice"), peers.peer("generate")]) as run:
        prefills, decodes = run.rows(PREFILL), run.rows(DECODE)
    assert [row["peer"] for row in prefills] == ["sluice", "generate", "generate", "sluice"]  # turned round
    assert speeds(prefills) == {1000}  # 32 tokens in 32 ms
    assert speeds(decodes) == {8}  # 2 streams, 0.25 s a step
    assert {row["agrees"] for row in prefills + decodes} == {1.0}
    assert {row["job"]["new_tokens"] for row in decodes} == {16}  # 4 s aimed at
    assert all(row["others_cores"] >= 0 for row in prefills + decodes)


def test_prefills_never_see_a_prompt_twice_and_decodes_always_the_same(peers: Peers, setup: Setup) -> None:
    """Also where a model is too short for two contexts, which are then measured alike."""
    with loaded(setup, [peers.peer("sluice")], max_positions=100) as run:
        prefills = run.rows(PREFILL, Cell(Kind.PREFILL, 2, 200), Cell(Kind.PREFILL, 2, 300))
        decodes = run.rows(DECODE, Cell(Kind.DECODE, 2, 200))
    assert [row["job"]["context"] for row in prefills] == [16, 16, 99, 99, 99, 99]
    assert len({row["job"]["seed"] for row in prefills}) == 6
    assert [row["job"]["context"] for row in decodes] == [16, 16, 36, 36]
    assert {row["job"]["seed"] for row in decodes} == {0}


def test_tokens_are_compared_with_the_reference_only_if_there_is_one(peers: Peers, setup: Setup) -> None:
    with loaded(setup, [peers.peer("sluice")]) as run:
        assert {row["agrees"] for row in run.rows(PREFILL)} == {None}


def test_a_peer_that_cannot_be_started_is_absent_and_the_others_are_measured(
    peers: Peers, setup: Setup
) -> None:
    programs = [Program("vllm", "/no/such/python", "vllm"), peers.peer("cb", loading="import no_engine")]
    with loaded(setup, [*programs, peers.peer("sluice")]) as run:
        assert {row["peer"] for row in run.rows(PREFILL)} == {"sluice"}
        assert list(run.session.facts) == ["sluice"]
        assert "/no/such/python" in run.session.absent["vllm"]
        assert "no_engine" in run.session.absent["cb"]


def test_a_peer_that_dies_in_the_middle_is_absent_from_then_on(peers: Peers, setup: Setup) -> None:
    """Its earlier rows count, the others' do too, and its last words are kept."""
    dies = "self.jobs = getattr(self, 'jobs', 0) + 1; self.jobs < 3 or sys.exit('killed')"
    with loaded(setup, [peers.peer("cb", before=dies), peers.peer("sluice")]) as run:
        rows = run.rows(PREFILL, DECODE)
        assert "killed" in run.session.absent["cb"]
    assert [(row["kind"], row["peer"]) for row in rows] == [
        *[("prefill", "cb"), ("prefill", "sluice"), ("prefill", "sluice")],
        *[("decode", "sluice"), ("decode", "sluice")],
    ]


def test_a_peer_that_dies_of_the_untimed_run_has_no_rows(peers: Peers, setup: Setup) -> None:
    with loaded(setup, [peers.peer("cb", before="sys.exit('killed')")]) as run:
        assert run.rows(DECODE) == []
        assert "killed" in run.session.absent["cb"]


@pytest.mark.parametrize("kind", Kind)
def test_a_peer_leaves_out_cells_that_try_the_patience(peers: Peers, setup: Setup, kind: Kind) -> None:
    """By the speed that it showed: the first cell is always run. It is not absent for that."""
    slow = peers.peer("generate", first="1.0 * sum(map(len, prompts))")
    long = Cell(kind, 2, 64)
    with loaded(setup, [slow, peers.peer("sluice")], replace(EFFORT, patience_seconds=100)) as run:
        assert {row["peer"] for row in run.rows(Cell(kind, 2, 16))} == {"generate", "sluice"}
        assert {row["peer"] for row in run.rows(long)} == {"sluice"}
        assert {row["peer"] for row in run.rows(Cell(kind, 2, 32))} == {"generate", "sluice"}
        assert run.noted(f"generate leaves out {long}: its prompts would take 128 s")
        assert run.session.absent == {}


def test_a_slow_first_run_does_not_exclude_a_peer_that_is_fast_once_warm(peers: Peers, setup: Setup) -> None:
    """It may have compiled its kernels in it."""
    cold = "self.jobs = getattr(self, 'jobs', 0) + 1"
    first = "90.0 if self.jobs == 1 else 0.1"
    with loaded(setup, [peers.peer("sluice", before=cold, first=first)]) as run:
        run.rows(Cell(Kind.PREFILL, 1, 4))
        assert len(run.rows(PREFILL)) == 2


def test_streams_that_begin_late_on_a_cold_cache_are_measured_once_it_is_warm(
    peers: Peers, setup: Setup
) -> None:
    """A few tokens of the first stream may be over before the last one's context is computed."""
    cold = "self.jobs = getattr(self, 'jobs', 0) + 1"
    first = "10.0 * stream if self.jobs == 1 else 0.5"
    with loaded(setup, [peers.peer("sluice", before=cold, first=first)]) as run:
        assert speeds(run.rows(DECODE)) == {8}
        assert run.noted("tells nothing of decoding")


def test_new_tokens_follow_from_the_steps_seen_together_not_from_all_of_a_probe(
    peers: Peers, setup: Setup
) -> None:
    """The second stream begins four steps late: its first, and three steps of both, are seen."""
    with loaded(setup, [peers.peer("sluice", first="1.0 * stream")]) as run:
        assert {row["job"]["new_tokens"] for row in run.rows(DECODE)} == {16}


def test_a_peer_whose_streams_never_run_together_leaves_the_cell_out(peers: Peers, setup: Setup) -> None:
    with loaded(setup, [peers.peer("cb", first="1000.0 * stream"), peers.peer("sluice")]) as run:
        assert {row["peer"] for row in run.rows(DECODE)} == {"sluice"}
        assert run.session.absent == {}


def test_a_repeat_whose_streams_do_not_run_together_gives_no_row(peers: Peers, setup: Setup) -> None:
    count = "self.jobs = getattr(self, 'jobs', 0) + 1"
    first = "1000.0 * stream if self.jobs == 2 else 0.5"
    with loaded(setup, [peers.peer("sluice", before=count, first=first)]) as run:
        assert [row["repeat"] for row in run.rows(DECODE)] == [1]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_model_that_is_written_while_peers_load_it_is_refused(
    peers: Peers, setup: Setup, file: str
) -> None:
    """Some of them have the old weights, some the new."""
    path = f"{setup.model}/{file}"
    writes = f"open({path!r}, 'a').close(); os.utime({path!r}, (1, 1))"
    with (
        pytest.raises(ModelChanged, match="measure a copy"),
        loaded(setup, [peers.peer("sluice", loading=writes)]),
    ):
        pass


def test_the_state_of_a_model_ignores_what_no_peer_computes_with(setup: Setup, peers: Peers) -> None:
    notes = f"open('{setup.model}/README.md', 'w').close()"
    with loaded(setup, [peers.peer("sluice", loading=notes)]):
        assert set(weights_state(Path(setup.model))) == {"config.json", "model.safetensors"}
