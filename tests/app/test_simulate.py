"""`sluice simulate`: sweeps, figures by their definitions, rows and charts, and friendly errors."""

import io
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from app.cli import main
from app.config_sources import load
from app.simulate import command
from app.simulate.charts import SHOWN, percentiles
from app.simulate.figures import Objectives, Spread, capacity, figures, latencies, percentile, spread
from app.simulate.fleet_figures import fleet_figures, imbalance
from app.simulate.playing import TraceWorkload
from app.simulate.report import Result, print_whole
from app.simulate.scenario import BadSweep, Scenario, fleet_config, for_block_size, scenarios
from app.workload.playing import Playing
from app.workload.trace import TraceRequest
from engine.events import MigrationOver, Pause
from engine.profile import write_profile
from engine.simulation import Outcome, Served
from tests.engine.test_simulation import PROFILE

SMALL = ("--set", "kvstore.host.bytes=100000", "--set", "kvstore.disk.bytes=0")


def azure(directory: Path, requests: int = 12) -> Path:
    rows = [f"2023-11-16 18:15:{second:02}.0,{60 + 13 * second},{20 + second}" for second in range(requests)]
    path = directory / "trace.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def simulate(directory: Path, *arguments: str) -> int:
    profile = directory / "profile.json"
    write_profile(PROFILE, profile)
    return main(["simulate", "--profile", str(profile), *SMALL, *arguments])


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def served(number: int, first: float, end: float, output: int = 11) -> Served:
    return Served(number, 10.0, 100, output, first_token=10.0 + first, finished=10.0 + end)


def test_latencies_are_as_defined() -> None:
    times = latencies(served(0, 1.0, 6.0))
    assert times == pytest.approx({"ttft": 1.0, "e2e": 6.0, "normalised": 6 / 11, "tpot": 0.5})
    assert latencies(Served(1, 0.0, 10, 0, refused="queue_full")) is None
    assert "tpot" not in (latencies(served(2, 1.0, 1.0, output=1)) or {})


def test_attainment_is_over_all_attempted() -> None:
    """One meets both objectives, one misses its TPOT, one is refused, one was not done in time."""
    outcome = Outcome(
        served=[served(0, 1.0, 2.0), served(1, 1.0, 9.0), Served(2, 0.0, 10, 0, refused="queue_full")],
        unfinished=1,
        seconds=20.0,
        computed_tokens=200,
        recomputed_tokens=50,
    )
    found = figures(outcome, Objectives(ttft=1.5, tpot=0.2))
    assert (found.attempted, found.refused, found.unfinished) == (4, 1, 1)
    assert found.attainment == 0.25
    assert found.goodput == pytest.approx(1 / 20)
    assert found.recompute_tax == 0.25
    assert figures(outcome, Objectives()).attainment == 0.5
    assert figures(Outcome(), Objectives()).spreads == {}


def test_percentiles_lie_between_values() -> None:
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([5.0], 0.99) == 5.0
    assert spread([]) is None


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([(1.0, 1.0), (2.0, 0.95), (3.0, 0.5)], 2.0),
        ([(3.0, 0.92), (1.0, 1.0), (2.0, 0.8)], 1.0),
        ([(1.0, 0.5)], None),
    ],
)
def test_capacity_is_the_highest_rate_below_which_all_meet(
    pairs: Sequence[tuple[float, float]], wanted: float | None
) -> None:
    assert capacity(pairs) == wanted


def test_sweeps_make_the_product_of_their_values() -> None:
    found = scenarios(["policies.order=fcfs,other", "rate=1,2.5"], rate=9.0)
    assert [each.name for each in found] == [
        "order=fcfs @ 1/s",
        "order=fcfs @ 2.5/s",
        "order=other @ 1/s",
        "order=other @ 2.5/s",
    ]
    (alone,) = scenarios([], rate=9.0)
    assert (alone.rate, alone.settings) == (9.0, ())
    for wrong in (
        "order=fcfs",
        "rate=fast",
        "rate=-1",
        "rate",
        "policies.order=",
        "replicas=0",
        "replicas=65",
    ):
        with pytest.raises(BadSweep):
            scenarios([wrong], None)


def test_replicas_are_swept_beside_the_rest() -> None:
    found = scenarios(["policies.routing=hybrid,session", "replicas=1,4"], rate=None, replicas=8)
    assert [each.replicas for each in found] == [1, 4, 1, 4]
    assert found[1].name == "routing=hybrid replicas=4"
    (alone,) = scenarios([], rate=None, replicas=8)
    assert (alone.replicas, alone.name) == (8, "replicas=8")
    assert scenarios([], rate=None)[0].replicas is None


def test_replicas_are_those_of_the_tables_unless_so_many_alike_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[[replica]]\nrole = "burst"\nlimit_tokens = 100\nkv_blocks = 20\n[[replica]]\nrole = "long"\n'
    )
    loaded = load(["policies.balance.period_seconds=2.5"], {}, file).config
    fleet = fleet_config(loaded, PROFILE)
    assert [(each.role, each.limit_tokens) for each in fleet.replicas] == [("burst", 100), ("long", 0)]
    assert [each.core.scheduler.blocks for each in fleet.replicas] == [20, PROFILE.kv_blocks]
    assert fleet.balance.period_seconds == 2.5
    alike = fleet_config(loaded, PROFILE, 3)
    assert [each.role for each in alike.replicas] == ["any"] * 3
    assert all(each == alike.replicas[0] for each in alike.replicas)


def test_figures_of_a_fleet_are_as_defined() -> None:
    """Two have moved live, one from its snapshot, and one has failed."""
    moves = [
        MigrationOver(str(n), 0, 0, 1, "load", failure, live, 1.0, Pause(pause, 1))
        for n, (failure, live, pause) in enumerate(
            [("", True, 0.1), ("", True, 0.3), ("", False, 0.0), ("no room", True, 0.0)]
        )
    ]
    outcome = Outcome(busy_by_replica=[6.0, 2.0], busy_seconds=8.0, seconds=10.0, migrations=moves, stayed=3)
    found = fleet_figures(outcome)
    assert found.busy == (0.6, 0.2)
    assert found.imbalance == 1.5
    assert (found.live, found.from_snapshots, found.failed, found.stayed) == (2, 1, 1, 3)
    assert found.pauses is not None
    assert found.pauses.mean == pytest.approx(0.2)
    assert figures(outcome, Objectives()).busy == pytest.approx(0.4)
    assert imbalance([0.0, 0.0]) == 1.0


def test_a_fleet_is_simulated_and_its_figures_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    crowd = ["--rate", "10", "--poisson"]
    arguments = ["--trace", str(azure(tmp_path)), *crowd, "--replicas", "3", "--out", str(out)]
    assert simulate(tmp_path, *arguments) == 0
    _, run = rows(out / "runs.jsonl")
    assert run["replicas"] == 3
    assert run["attempted"] == 12
    fleet = run["fleet"]
    assert isinstance(fleet, dict)
    assert len(fleet["busy"]) == 3
    assert all(fleet["busy"])
    loads = [row["loads"] for row in rows(out / "ticks.jsonl")]
    assert loads
    assert all(isinstance(each, list) and len(each) == 3 for each in loads)
    assert "fleets" in capsys.readouterr().out
    assert (out / "timeline-01.png").is_file()


def test_blocks_of_another_size_are_as_many_bytes() -> None:
    larger = for_block_size(PROFILE, 64)
    assert larger.block_bytes * larger.kv_blocks == PROFILE.block_bytes * PROFILE.kv_blocks
    assert larger.block_size == 64


def test_a_trace_is_thinned_cut_scaled_and_clipped() -> None:
    trace = [TraceRequest(n, str(n), n / 10, 512 * 8, 100, ((n * 10, 8),), 512) for n in range(1000)]
    playing = Playing("mooncake", seconds=50.0, requests=200, scale_blocks=16, clip=True)
    played = playing.played(trace, rate=5.0, context=100)
    assert 150 < len(played) <= 200
    assert {(each.prompt_tokens, each.output_tokens, each.block_size) for each in played} == {(97, 3, 16)}
    assert max(each.arrival for each in played) < 50.0


@pytest.mark.parametrize("known", [True, False])
def test_a_client_that_does_not_know_its_length_asks_for_all_there_is_room_for(known: bool) -> None:
    workload = TraceWorkload([TraceRequest(0, "a", 0.0, 60, 30)], 100, lengths_known=known)
    job = workload.job(0)
    assert job.output_tokens == 30
    assert job.request.stopping.max_tokens == (30 if known else 40)
    assert job.request.expected_output_tokens is None


def test_a_sweep_writes_rows_and_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All requests are served in each run; the same run twice has the same digest."""
    out = tmp_path / "out"
    arguments = ["--trace", str(azure(tmp_path)), "--sweep", "policies.eviction=lru,lfu", "--sweep", "rate=1,2",
                 "--poisson", "--ttft", "1", "--tpot", "0.1", "--out", str(out)]  # fmt: skip
    assert simulate(tmp_path, *arguments) == 0
    facts, *runs = rows(out / "runs.jsonl")
    asked = facts["sluice_simulate"]
    assert isinstance(asked, dict)
    assert (asked["seed"], asked["poisson"]) == ("0", "True")
    assert "lengths_known" not in asked
    assert len(runs) == 4
    assert all(run["attempted"] == 12 and run["unfinished"] == 0 for run in runs)
    assert len(rows(out / "requests.jsonl")) == 48
    assert rows(out / "ticks.jsonl")
    assert sorted(path.name for path in out.glob("*.png")) == [
        "capacity.png", "latency.png", *(f"timeline-{n:02}.png" for n in range(1, 5)),
    ]  # fmt: skip
    told = capsys.readouterr().out
    assert "capacity" in told
    assert str(runs[0]["digest"])[:12] in told
    assert simulate(tmp_path, *arguments) == 0
    assert [run["digest"] for run in rows(out / "runs.jsonl")[1:]] == [run["digest"] for run in runs]
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--out", str(out)) == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["latency.png", "timeline-01.png"], (
        "of this run"
    )


@pytest.mark.parametrize(("least", "most"), [(0.02, 0.7), (0.004, 3.0), (0.0004, 50.0)])
def test_labels_of_logarithmic_panels_do_not_lie_over_each_other(least: float, most: float) -> None:
    """Regression: below two powers of ten, those between them were labelled too."""
    found = dict.fromkeys(SHOWN, Spread(least, least, least, most))
    figure = percentiles(Figure, [(11 * "order=fcfs " + "@ 1/s", found)], SHOWN)
    figure.draw_without_rendering()
    for panel in figure.axes:
        low, high = panel.get_xlim()
        labels = [label for label in panel.get_xticklabels(which="both") if label.get_text()]
        boxes = [label.get_window_extent() for label in labels if low <= label.get_position()[0] <= high]
        assert len(boxes) > 1
        ordered = sorted(boxes, key=lambda box: box.x0)
        assert all(a.x1 < b.x0 for a, b in pairwise(ordered))
    names = [panel.xaxis.label.get_window_extent() for panel in figure.axes]
    assert all(a.x1 < b.x0 for a, b in pairwise(names)), "however long a run's name is"


def test_a_plug_in_decides_in_the_simulator_as_in_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "class Newest:\n    def __call__(self, view):\n        return (-view.number,)\n"
    (tmp_path / "house_simulated.py").write_text(text)
    out = tmp_path / "out"
    orders = "policies.order=fcfs,house_simulated:Newest"
    crowd = ["--rate", "1000", "--poisson", "--set", "engine.max_sequences=1"]
    arguments = ["--trace", str(azure(tmp_path)), *crowd, "--sweep", orders]
    assert simulate(tmp_path, *arguments, "--out", str(out)) == 0
    ended: dict[object, list[object]] = {}
    for row in rows(out / "requests.jsonl"):
        ended.setdefault(row["scenario"], []).append(row["number"])
    first_come, newest = ended.values()
    assert first_come == list(range(12))
    assert newest != first_come
    capsys.readouterr()
    assert simulate(tmp_path, *arguments[:-2], "--set", "policies.order=house_simulated:Oldest") == 2
    assert "has no 'Oldest'" in capsys.readouterr().err


def test_a_plug_in_that_fails_is_told_with_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: nothing told its figures from those of a policy that had decided."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "house_failing.py").write_text("def none(view):\n    return [view.number]\n")
    out = tmp_path / "out"
    orders = "policies.order=fcfs,house_failing:none"
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--sweep", orders, "--out", str(out)) == 0
    good, bad = (run["policy_failures"] for run in rows(out / "runs.jsonl")[1:])
    assert good == []
    assert isinstance(bad, list)
    (failing,) = bad
    assert failing["times"] > 0
    assert (failing["family"], failing["policy"]) == ("order", "house_failing:none")
    assert f"failed {failing['times']:,} times" in capsys.readouterr().out


def test_a_client_asks_for_no_more_than_the_cap_and_is_who_it_is() -> None:
    trace = [TraceRequest(0, "a", 0.0, 60, 30), TraceRequest(1, "b", 0.0, 95, 2)]
    workload = TraceWorkload(trace, 100, cap=35, tenants={1: "busy"})
    jobs = [workload.job(0).request, workload.job(1).request]
    assert [each.stopping.max_tokens for each in jobs] == [35, 5]
    assert [each.tenant for each in jobs] == ["", "busy"]


def test_a_plug_in_that_cannot_be_loaded_is_told_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: all runs before its own were played first."""
    monkeypatch.setattr(command, "_play", lambda *_: pytest.fail("it was played"))
    assert (
        simulate(tmp_path, "--trace", str(azure(tmp_path)), "--sweep", "policies.order=fcfs,nowhere:x") == 2
    )
    assert "Python finds no module nowhere" in capsys.readouterr().err


def test_without_matplotlib_there_are_rows_and_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--out", str(out)) == 0
    assert "sluice[charts]" in capsys.readouterr().err
    assert (out / "runs.jsonl").is_file()
    assert not list(out.glob("*.png"))


def test_a_swept_value_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: a bracket in it ended the command in a traceback, when all had been played."""
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--sweep", "model.path=[/a],[b]") == 0
    told = capsys.readouterr().out
    assert "model.path=[/a]" in told
    assert "model.path=[b]" in told


def test_where_a_table_has_no_room_its_numbers_are_told_whole() -> None:
    """Regression: on 80 columns shares were told as 28…, and digests were not."""
    table = Table("scenario", "attempted", "load max/mean", "digest", title="accounts")
    table.add_row("order=fcfs resume=recompute @ 2/s", "1,200", "26% 32% 17%", "58ddd1d52683")
    for width in range(30, 100):
        file = io.StringIO()
        print_whole(table, Console(width=width, file=file))
        assert "58ddd1d52683" in file.getvalue()
        assert "…" not in file.getvalue()


def test_refusals_are_told_with_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--set", "engine.kv_blocks=1") == 0
    assert "12 were refused, as a server does it, with context_length_exceeded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--rate", "50"], "cannot be|can be thinned, not thickened"),
        (["--poisson"], "give --rate"),
        (["--sweep", "order=fcfs"], "wanted is section.key"),
        (["--sweep", "replicas=many"], "from 1 to 64"),
        (["--sweep", "rate=1", "--sweep", "rate=2"], "--sweep rate is given twice"),
        (["--sweep", "policies.order=fastest"], "policies.order"),
        (["--set", "kvstore.disk.bytes=10000000", "--profile", "none.json"], "none.json cannot be read"),
        (["--format", "mooncake"], "trace.csv:1: it is not JSON"),
    ],
)
def test_what_cannot_be_used_is_a_line_and_exit_code_2(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(tmp_path, "--trace", str(azure(tmp_path)), *arguments) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in why.split("|"))
    assert "Traceback" not in error


def test_ctrl_c_prints_and_writes_the_runs_that_had_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a sweep that was interrupted lost them, in a traceback."""
    play = command._play

    def interrupted(scenario: Scenario, *rest: Any) -> Result:
        if scenario.rate == 2:
            raise KeyboardInterrupt
        return play(scenario, *rest)

    monkeypatch.setattr(command, "_play", interrupted)
    out = tmp_path / "out"
    arguments = ["--trace", str(azure(tmp_path)), "--poisson", "--out", str(out)]
    assert simulate(tmp_path, *arguments, "--sweep", "rate=1,2,3") == 130
    told, error = capsys.readouterr()
    assert "sluice: interrupted; 1 runs had ended" in error
    assert "None" not in error, "how many requests there are is not known yet"
    assert "@ 1/s" in told
    assert [row["rate"] for row in rows(out / "runs.jsonl")[1:]] == [1.0]


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it was refused at the end, without saying which option it was."""
    monkeypatch.setattr(command, "_play", lambda *_: pytest.fail("it was played"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/none")):
        assert simulate(tmp_path, "--trace", str(azure(tmp_path)), "--out", str(place)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sluice: --out {place} cannot be written: ")
        assert error.count("\n") == 1


def test_the_shipped_profile_loads_and_plays(tmp_path: Path) -> None:
    assert main(["simulate", "--trace", str(azure(tmp_path)), "--set", "kvstore.disk.bytes=0"]) == 0
