"""`sluice simulate`: a trace, a profile and a configuration → runs, tables, rows and charts; an exit code.

Exit codes: 0; 2 where something given cannot be used; 130 where it was interrupted. Runs that had ended by then are
printed and written in each case.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.config import Config, ConfigError
from app.config_sources import load as load_config
from app.outputs import CannotWrite, asked, failed, make_directory, writing
from app.plugins import PluginError, load_plugins
from app.simulate.charts import NoCharts, draw
from app.simulate.figures import Objectives, figures
from app.simulate.playing import TraceWorkload
from app.simulate.report import Result, show, write_rows
from app.simulate.scenario import BadSweep, Scenario, fleet_config, for_block_size, scenarios
from app.workload.formats import DRAWN, detect, load
from app.workload.playing import Playing
from app.workload.trace import TraceError, TraceRequest
from app.workload.transform import CannotTransform
from engine.policy_set import Catalog
from engine.profile import Profile, ProfileError, read_profile
from engine.simulation import Simulation, Tick

PROFILES = Path(__file__).parents[1] / "profiles"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
WORLD = (BadSweep, CannotTransform, CannotWrite, ConfigError, PluginError, ProfileError, TraceError, OSError)
"""What the world can get wrong; each says what."""


def run(options: argparse.Namespace) -> int:
    results: list[Result] = []
    code = 0
    try:
        _play_all(options, results)
    except WORLD as error:
        code = failed(error, EXIT_USAGE)
    except KeyboardInterrupt:
        sys.stderr.write(f"sluice: interrupted; {len(results)} runs had ended\n")
        code = EXIT_INTERRUPTED
    try:
        if results:
            _tell(results, options)
    except CannotWrite as error:
        code = failed(error, EXIT_USAGE)
    return code


def _play_all(options: argparse.Namespace, results: list[Result]) -> None:
    """Raises those of WORLD."""
    profile = read_profile(_profile_path(options.profile))
    chosen = scenarios(options.sweep, options.rate, options.replicas)
    configs = [_config(options, scenario) for scenario in chosen]  # all are checked before the first runs
    catalogs = [Catalog(load_plugins(config.policies)) for config in configs]
    traces = Traces(options)
    if options.out is not None:
        make_directory("--out", options.out)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        for scenario, config, catalog in zip(chosen, configs, catalogs, strict=True):
            task = progress.add_task(scenario.name, total=None, state="loading")
            machine = for_block_size(profile, config.engine.block_size)
            results.append(_play(scenario, config, catalog, machine, traces, options, progress, task))


def _config(options: argparse.Namespace, scenario: Scenario) -> Config:
    return load_config([*options.set, *scenario.settings], os.environ, options.config).config


def _profile_path(name: str) -> Path:
    shipped = PROFILES / f"{name}.json"
    return shipped if shipped.is_file() else Path(name)


class Traces:
    """The trace at each rate, loaded once, or drawn anew where the format draws its arrivals."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path: Path = options.trace
        form = options.format or detect(self._path)
        self._playing = Playing(
            form=form,
            seed=options.seed,
            poisson=options.poisson,
            seconds=options.seconds,
            requests=options.requests,
            scale_blocks=options.scale_blocks,
            clip=options.clip,
        )
        if options.poisson and options.rate is None and not any(s.startswith("rate=") for s in options.sweep):
            raise BadSweep("--poisson draws arrivals at a rate: give --rate or --sweep rate=…")
        self._loaded: dict[float | None, list[TraceRequest]] = {}

    def at(self, rate: float | None, context: int) -> list[TraceRequest]:
        """Raises TraceError, CannotTransform."""
        playing = self._playing
        drawn_at = rate if playing.form in DRAWN else None
        if drawn_at not in self._loaded:
            self._loaded[drawn_at] = load(self._path, playing.drawing(drawn_at), playing.form)
        if not (played := playing.played(self._loaded[drawn_at], rate, context)):
            raise CannotTransform(f"nothing of {self._path} is left to play: raise the rate or the limits")
        return played


def _play(
    scenario: Scenario,
    config: Config,
    catalog: Catalog,
    profile: Profile,
    traces: Traces,
    options: argparse.Namespace,
    progress: Progress,
    task: TaskID,
) -> Result:
    fleet = fleet_config(config, profile, scenario.replicas)
    context = max(each.core.context for each in fleet.replicas)
    trace = traces.at(scenario.rate, context)
    progress.update(task, total=len(trace), state="")
    workload = TraceWorkload(trace, context, lengths_known=options.lengths_known)
    begun = time.perf_counter()
    simulation = Simulation(fleet, profile, workload, catalog=catalog, on_tick=_watch(progress, task))
    outcome = simulation.run()
    wall = time.perf_counter() - begun
    progress.update(task, completed=len(outcome.served), state="")
    found = figures(outcome, Objectives(options.ttft, options.tpot))
    blocks = tuple(each.core.scheduler.blocks for each in fleet.replicas)
    return Result(scenario, outcome, found, blocks, wall)


def _watch(progress: Progress, task: TaskID) -> Callable[[Tick, int], None]:
    def watch(tick: Tick, ended: int) -> None:
        state = f"{tick.time:,.0f} s: {tick.running} running, {tick.waiting} waiting"
        progress.update(task, completed=ended, state=state)

    return watch


def _tell(results: list[Result], options: argparse.Namespace) -> None:
    """Raises CannotWrite."""
    objectives = Objectives(options.ttft, options.tpot)
    wide = None if sys.stdout.isatty() else 170
    show(results, objectives, Console(width=wide, markup=False))
    if options.out is not None:
        with writing("--out", options.out):
            written = _write(results, options)
        sys.stderr.write(f"{written}\n")


def _write(results: list[Result], options: argparse.Namespace) -> str:
    """Returns what there is now."""
    write_rows(results, options.out, {"sluice_simulate": asked(options)})
    try:
        drawn = draw(results, options.out)
        return f"{len(drawn)} charts and the rows are in {options.out}"
    except NoCharts as error:
        return f"the rows are in {options.out}, without charts: {error}"
