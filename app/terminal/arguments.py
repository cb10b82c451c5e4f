"""The arguments of `sluice chat | ps | collect-env`. Imports nothing heavy."""

import argparse

from app.credentials import API_KEY
from app.simulate.arguments import count, positive


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """What these do: app/terminal/command.py."""
    server = argparse.ArgumentParser(add_help=False, parents=[common])
    server.add_argument("--url", help="the server; without it the one of the configuration, on this machine")
    server.add_argument(
        "--api-key",
        default="",
        help=f"sent as a bearer token; without it {API_KEY} of the environment, which no process list shows",
    )
    chat = commands.add_parser(
        "chat",
        parents=[server],
        help="talk to a running server",
        description="Talks to a running server; /help says how.",
    )
    chat.add_argument("message", nargs="?", help="ask this, print the answer, end")
    chat.add_argument("--model", default="", metavar="NAME", help="without it the first that is listed")
    chat.add_argument("--system", default="", metavar="TEXT", help="what goes before the conversation")
    chat.add_argument("--temperature", type=float, metavar="T")
    chat.add_argument("--max-tokens", type=count, metavar="N", help="of an answer")
    chat.add_argument("--seed", type=int)
    chat.add_argument("--no-history", action="store_true", help="keep no file of what was typed")
    ps = commands.add_parser(
        "ps",
        parents=[server],
        help="the requests of a running server, live",
        description="The requests of a running server, and what holds them; Ctrl-C ends it.",
    )
    ps.add_argument("--once", action="store_true", help="print it once and end")
    ps.add_argument("--json", action="store_true", help="once, for programs")
    ps.add_argument("--every", type=positive, default=1.0, metavar="S", help="seconds between looks")
    commands.add_parser(
        "collect-env",
        parents=[server],
        help="versions, machine and configuration, for a bug report",
        description="What a bug report should say. Secrets are left out; read it before you post it.",
    )
