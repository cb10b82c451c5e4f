"""The arguments of `sluice bench`. Imports nothing heavy."""

import argparse
from pathlib import Path


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    """`profile`: app/profiling/command.py. Returns the actions, for others to add theirs."""
    bench = commands.add_parser(
        "bench", help="measure this machine", description="Measurements of this machine and this server."
    )
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    profile = actions.add_parser(
        "profile",
        parents=[common],
        help="how long steps and copies take, for the simulator",
        description="Measures steps of the configured model and copies; fits what sluice simulate needs.",
    )
    profile.add_argument("--out", type=Path, metavar="FILE", help="for the profile (JSON)")
    profile.add_argument(
        "--tables", type=Path, metavar="DIR", help="measure nothing: take another engine's operator tables"
    )
    return actions
