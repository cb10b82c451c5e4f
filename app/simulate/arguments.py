"""The arguments of `sluice simulate`. Imports nothing heavy."""

import argparse
from pathlib import Path

from app.workload.formats import FORMATS

MOST_REPLICAS = 64


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """What these do: app/simulate/command.py."""
    parser = commands.add_parser(
        "simulate",
        parents=[common],
        help="play a trace on the simulated engine",
        description="Plays a trace on the engine's own core in virtual time (docs/simulation.md).",
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="requests, gzip or plain")
    parser.add_argument("--format", choices=sorted(FORMATS), help="of the trace; without it, as found")
    parser.add_argument(
        "--profile", default="h200-8b", metavar="FILE", help="of the machine, or a shipped one's name"
    )
    parser.add_argument(
        "--replicas",
        type=replicas,
        metavar="N",
        help="so many alike, from 1 to 64, whatever [[replica]] tables say",
    )
    parser.add_argument("--rate", type=positive, metavar="R", help="requests (or sessions) per second")
    parser.add_argument(
        "--poisson", action="store_true", help="new arrivals at the rate, rather than fewer of the recorded"
    )
    parser.add_argument("--seconds", type=positive, metavar="S", help="only sessions that begin before")
    parser.add_argument("--requests", type=count, metavar="N", help="only the first so many")
    parser.add_argument(
        "--scale-blocks", type=count, metavar="T", help="a recorded block becomes one of T tokens"
    )
    parser.add_argument("--clip", action="store_true", help="shorten what the context has no room for")
    parser.add_argument(
        "--lengths-known", action="store_true", help="clients ask for as many tokens as will come"
    )
    parser.add_argument("--ttft", type=positive, metavar="S", help="objective: time to first token")
    parser.add_argument("--tpot", type=positive, metavar="S", help="objective: time per output token")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="policies.order=fcfs,hybrid, rate=1,2 or replicas=4,8: a run for each value; repeatable, all "
        "combinations",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for rows (JSON Lines) and charts (PNG)")


def positive(text: str) -> float:
    """Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def count(text: str) -> int:
    """Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def replicas(text: str) -> int:
    """Raises ArgumentTypeError."""
    if (number := count(text)) > MOST_REPLICAS:
        raise argparse.ArgumentTypeError(f"{text} replicas are more than {MOST_REPLICAS}")
    return number
