"""The arguments of `sluice bench serve`. Imports nothing heavy."""

import argparse
import os
from pathlib import Path

from app.credentials import API_KEY
from app.simulate.arguments import count, positive
from app.workload.formats import FORMATS

ARRIVALS = ("poisson", "constant", "recorded", "at_once")


def add(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """What these do: app/load/command.py."""
    parser = actions.add_parser(
        "serve",
        parents=[common],
        help="open-loop load on any server that speaks the OpenAI API",
        description="Sends each request when it is due, and measures (docs/bench_serve.md).",
    )
    _add_server(parser.add_argument_group("the server"))
    _add_workload(parser.add_argument_group("the workload"))
    _add_asking(parser.add_argument_group("each request"))
    _add_results(parser.add_argument_group("results"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", help="without it the configuration's own server, on this machine")
    group.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two servers' URLs: in turn, and their ratios"
    )
    group.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY, ""),
        help=f"sent as a bearer token, never written anywhere; without it {API_KEY} of the environment",
    )
    group.add_argument("--model", default="", metavar="NAME", help="without it the first that is listed")
    group.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="for any one request")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="recorded requests; without it made-up ones"
    )
    group.add_argument("--format", choices=sorted(FORMATS), help="of the trace; without it, as found")
    group.add_argument(
        "--rate", type=rates, metavar="R[,R]", help="requests (sessions) per second; a run each"
    )
    group.add_argument(
        "--arrivals",
        choices=ARRIVALS,
        help="without it recorded for a trace (thinned to the rate), poisson for made-up requests",
    )
    group.add_argument("--requests", type=count, metavar="N", help="only the first so many; made up: 100")
    group.add_argument("--seconds", type=positive, metavar="S", help="of a trace: sessions that open before")
    group.add_argument(
        "--scale-blocks", type=count, metavar="T", help="a recorded block becomes one of T tokens"
    )
    group.add_argument(
        "--context", type=count, metavar="T", help="shorten what so many tokens have no room for"
    )
    group.add_argument("--input-tokens", type=lengths, default=(128, 128), metavar="N[-M]")
    group.add_argument("--output-tokens", type=lengths, default=(64, 64), metavar="N[-M]")
    group.add_argument("--shared-tokens", type=int, default=0, metavar="N", help="all prompts begin alike")
    group.add_argument("--turns", type=count, default=1, metavar="N", help="of each made-up session")
    group.add_argument("--turn-tokens", type=lengths, default=(32, 32), metavar="N[-M]", help="new, a turn")
    group.add_argument("--think", type=positive, default=1.0, metavar="S", help="between turns")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and sampling")


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        choices=("ids", "text", "chat"),
        default="ids",
        help="token ids or words to /v1/completions, or messages to /v1/chat/completions",
    )
    group.add_argument(
        "--ids", type=lengths, default=(300, 4095), metavar="FIRST-LAST", help="token ids for prompts"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers are as long as asked, where the server knows this",
    )
    group.add_argument("--extra", default="{}", metavar="JSON", help="into every request's body")


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ttft", type=positive, metavar="S", help="objective: time to first token")
    group.add_argument("--tpot", type=positive, metavar="S", help="objective: time per output token")
    group.add_argument("--warmup", type=int, default=2, metavar="N", help="requests before, not measured")
    group.add_argument("--repeats", type=count, default=1, metavar="N", help="of each run")
    group.add_argument("--output", type=Path, metavar="DIR", help="for rows (JSON Lines) and charts (PNG)")


def rates(text: str) -> list[float]:
    """Raises ArgumentTypeError."""
    return [positive(each) for each in text.split(",")]


def lengths(text: str) -> tuple[int, int]:
    """`N` or `N-M`. Raises ArgumentTypeError."""
    low, dash, high = text.partition("-")
    found = count(low), count(high if dash else low)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the first is above the second")
    return found
