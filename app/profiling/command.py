"""`sluice bench profile`: measures a profile, or makes one of another engine's operator tables; prints, writes."""

import argparse
import sys
from pathlib import Path
from signal import SIGINT

from rich.console import Console
from rich.table import Table

from app.config import Config
from app.logging import logging_to
from app.outputs import CannotWrite, failed, try_file, writing
from app.profiling.fitting import Error
from app.profiling.operator_tables import read_tables
from app.signals import ending_at_once
from app.workload.trace import TraceError
from engine.profile import Profile, ProfileError, write_profile
from engine.step_time import CurveTime

EXIT_CANNOT = 2
EXIT_INTERRUPTED = 130


def run(config: Config, options: argparse.Namespace) -> int:
    """Exit code 2 where the model cannot be loaded, the tables not be read, or the profile not be written."""
    try:
        if options.out:
            try_file("--out", options.out)
        profile, errors = (read_tables(options.tables), []) if options.tables else _measured(config)
    except (ProfileError, TraceError, CannotMeasure, CannotWrite, OSError) as error:
        return failed(error, EXIT_CANNOT)
    _tell(profile, errors)
    try:
        if options.out:
            _write(profile, options.out)
    except CannotWrite as error:
        return failed(error, EXIT_CANNOT)
    return 0


class CannotMeasure(Exception):
    """The model cannot be loaded here."""


def _measured(config: Config) -> tuple[Profile, list[Error]]:
    with (
        logging_to(sys.stderr, config.log),
        Console(stderr=True).status("loading") as status,
        ending_at_once({SIGINT: EXIT_INTERRUPTED}, last=status.stop),
    ):
        from app.compose import CANNOT_START
        from app.profiling.measuring import measure

        try:
            return measure(config, status.update)
        except CANNOT_START as error:
            raise CannotMeasure(str(error)) from error


def _write(profile: Profile, out: Path) -> None:
    """Raises CannotWrite."""
    with writing("--out", out):
        write_profile(profile, out)
    Console().print(f"written to {out}")


def _tell(profile: Profile, errors: list[Error]) -> None:
    console = Console()
    console.print(f"{profile.model}, {profile.dtype}, on {profile.machine}: {profile.source}")
    if errors:
        console.print(_errors(errors))
    if isinstance(profile.step, CurveTime):
        console.print(_step(profile))
    for route, transfer in profile.transfers.items():
        rate = transfer.bytes_per_second / 1e9
        console.print(f"{route}: {transfer.latency_seconds * 1e6:.1f} µs + {rate:.2f} GB/s")


def _errors(errors: list[Error]) -> Table:
    table = Table("steps", "measured", "of the sum", "median", "mean", "worst", title="errors of the fit")
    for each in errors:
        shares = (f"{share:.1%}" for share in (each.median, each.mean, each.worst))
        table.add_row(each.kind, str(each.samples), f"{each.bias:+.1%}", *shares)
    return table


def _step(profile: Profile) -> str:
    step, between = profile.step, profile.between
    assert isinstance(step, CurveTime)
    dense = ", ".join(f"{tokens:g}: {seconds * 1e3:.2f}" for tokens, seconds in step.dense)
    head = ", ".join(f"{rows:g}: {seconds * 1e3:.2f}" for rows, seconds in step.head)
    rows = ", ".join(f"{rows:g}: {seconds * 1e3:.2f}" for rows, seconds in between.rows)
    return (
        f"a step, ms: by tokens {dense}; by rows that sample {head}; {step.decode_row * 1e3:.4f} a decode row, "
        f"{step.decode_position * 1e6:.4f} per 1,000 positions it reads; {step.prefill_row * 1e3:.4f} a prefill row, "
        f"{step.prefill_pair * 1e9:.4f} per million pairs. Between steps, ms: by rows {rows}; "
        f"{between.finished * 1e3:.3f} for each that ended, {between.admitted * 1e3:.3f} for each admitted, "
        f"{between.copy * 1e3:.3f} for each copy and {between.copied_byte * 1e9:.3f} per million bytes of it, "
        f"{between.prefill * 1e3:.3f} after a prefill; from idle {between.idle * 1e3:.3f}"
    )
