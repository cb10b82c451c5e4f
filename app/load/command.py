"""`sluice bench serve`: arguments → runs, tables, rows and charts; an exit code.

Exit codes: 0; 1 where nothing was answered; 2 usage, or a server that cannot be measured; 3 where a run is void;
130 where it was interrupted. What was measured until then is printed and written in each case.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.config import Config
from app.load import charts, generator
from app.load.compare import ratios
from app.load.conversation import Asking
from app.load.figures import figures
from app.load.report import Result, show, write_rows
from app.load.running import CannotLoad, Target, connected, load
from app.load.workloads import Workloads
from app.outputs import CannotWrite, asked, failed, make_directory, writing
from app.remote import url_of
from app.simulate.charts import NoCharts
from app.simulate.figures import Objectives
from app.workload.trace import Trace, TraceError
from app.workload.transform import CannotTransform

EXIT_NOTHING = 1
EXIT_USAGE = 2
EXIT_VOID = 3
EXIT_INTERRUPTED = 130
WORLD = (CannotLoad, CannotTransform, CannotWrite, TraceError, OSError)
SECRET = ("api_key",)


def run(config: Config, options: argparse.Namespace) -> int:
    results: list[Result] = []
    code = None
    try:
        targets = _targets(config, options)
        asking = _asking(options)
        workloads = Workloads(options)
        traces = [(rate, workloads.at(rate)) for rate in options.rate or [None]]
        if options.output is not None:
            make_directory("--output", options.output)
        asyncio.run(_measure(targets, traces, asking, options, results))
    except WORLD as error:
        code = failed(error, EXIT_USAGE)
    except KeyboardInterrupt:  # while warming up
        sys.stderr.write("sluice: interrupted while it warmed up\n")
        code = EXIT_INTERRUPTED
    try:
        if results:
            _tell(results, options)
    except CannotWrite as error:
        code = failed(error, EXIT_USAGE)
    return _exit_code(results) if code is None else code


def _targets(config: Config, options: argparse.Namespace) -> list[Target]:
    urls = options.compare or [options.url or url_of(config.server)]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise CannotLoad(f"{url!r} is no URL: it begins with http:// or https://")
    return [Target(url, options.api_key, options.model, options.timeout) for url in urls]


def _asking(options: argparse.Namespace) -> Asking:
    try:
        extra = json.loads(options.extra)
    except ValueError as error:
        raise CannotLoad(f"--extra is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise CannotLoad("--extra is not a JSON object")
    first, last = options.ids
    return Asking(
        model=options.model,
        prompts=options.prompts,
        first_id=first,
        ids=max(2, last - first + 1),
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        seed=options.seed,
        extra=extra,
    )


async def _measure(
    targets: Sequence[Target],
    traces: Sequence[tuple[float | None, Trace]],
    asking: Asking,
    options: argparse.Namespace,
    results: list[Result],
) -> None:
    """Repeat by repeat and rate by rate, all servers in turn; the turn goes round. Raises CannotLoad."""
    objectives = Objectives(options.ttft, options.tpot)
    runs = [(repeat, rate, trace) for repeat in range(options.repeats) for rate, trace in traces]
    with _bar() as bar:
        for number, (repeat, rate, trace) in enumerate(runs):
            for target in targets if number % 2 == 0 else targets[::-1]:
                task = bar.add_task(f"{target.url}", total=len(trace), state="warming up")
                async with connected(target) as http:
                    samples, whole = await load(
                        http,
                        target,
                        trace,
                        asking,
                        run=1 + number % 62,
                        warmup=options.warmup,
                        watch=partial(_update, bar, task),
                        interruptible=True,
                    )
                found = figures(samples, objectives)
                results.append(Result(target.url, rate, repeat, samples, found, whole))
                if not whole:
                    return


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(
        *columns, TextColumn("{task.fields[state]}"), TimeElapsedColumn(), console=Console(stderr=True)
    )


def _update(bar: Progress, task: TaskID, progress: generator.Progress) -> None:
    done = progress.answered + progress.failed
    state = f"{progress.running} under way, {progress.failed} failed"
    bar.update(task, completed=done, state=state)


def _tell(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Raises CannotWrite."""
    objectives = Objectives(options.ttft, options.tpot)
    console = Console(width=None if sys.stdout.isatty() else 170, markup=False)
    show(results, objectives, console)
    if options.compare:
        console.print(ratios(results, *options.compare))
    if options.output is not None:
        with writing("--output", options.output):
            written = _write(results, objectives, options)
        sys.stderr.write(f"{written}\n")


def _write(results: Sequence[Result], objectives: Objectives, options: argparse.Namespace) -> str:
    """Returns what there is now."""
    write_rows(results, options.output, {"sluice_bench_serve": asked(options, SECRET)})
    try:
        drawn = charts.draw(results, objectives, options.output)
        return f"{len(drawn)} charts and the rows are in {options.output}"
    except NoCharts as error:
        return f"the rows are in {options.output}, without charts: {error}"


def _exit_code(results: Sequence[Result]) -> int:
    if not all(result.whole for result in results):
        return EXIT_INTERRUPTED
    if any(result.figures.void for result in results):
        return EXIT_VOID
    return 0 if any(result.figures.answered for result in results) else EXIT_NOTHING
