"""The command line: `sluice serve | chat | ps | check-config | collect-env | cache | simulate | bench`.

Imports nothing heavy by itself.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.load import arguments as load_arguments
from app.profiling import arguments as bench_arguments
from app.simulate import arguments as simulate_arguments
from app.terminal import arguments as terminal_arguments

if TYPE_CHECKING:
    from app.config_sources import Loaded

EXIT_NO_OUTPUT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
TIERS = ("device", "host", "disk", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Ctrl-C has one, and so has an output that is closed or full."""
    if sys.stdout is None:  # it was closed before we began
        sys.stdout = StringIO()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("sluice: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read it has read enough
        _drop_output()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        sys.stderr.write(f"sluice: what it says cannot be written: {error.strerror}\n")
    return EXIT_NO_OUTPUT


def _drop_output() -> None:
    """What is buffered goes nowhere: the interpreter would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    from app.config import ConfigError
    from app.config_sources import load

    try:
        loaded = load(options.set, os.environ, options.config)
    except ConfigError as error:
        return _fail("the configuration cannot be used:", *error.problems)
    return COMMANDS[options.command](loaded, options)


class Parser(argparse.ArgumentParser):
    """A command that does not know an argument says so itself, with its own usage; argparse leaves it to the top."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def parser() -> argparse.ArgumentParser:
    top: argparse.ArgumentParser = Parser(prog="sluice", description="An LLM server for one GPU host.")
    top.add_argument("--version", action="version", version=f"sluice {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration; without it config.toml here, if there is one",
    )
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="one value, over all others; repeatable",
    )
    commands.add_parser(
        "serve", parents=[common], help="serve a model over HTTP", description="Serves a model."
    )
    check = commands.add_parser(
        "check-config",
        parents=[common],
        help="show every value and its source",
        description="Checks the configuration.",
    )
    check.add_argument("--json", action="store_true", help="for programs")
    terminal_arguments.add(commands, common)
    _add_cache(commands, common)
    simulate_arguments.add(commands, common)
    load_arguments.add(bench_arguments.add(commands, common), common)
    return top


def _add_cache(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """What these do: app/cache_command.py."""
    cache = commands.add_parser(
        "cache",
        help="look after the KV cache",
        description="Beside a running server through HTTP; without one on the disk store itself.",
    )
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument("--url", help="the server; without it the one of the configuration, on this machine")
    shared.add_argument("--json", action="store_true", help="for programs")
    actions.add_parser("stat", parents=[shared], help="what each tier holds, and how fast it is")
    actions.add_parser("verify", parents=[shared], help="read and check every record on disk")
    for name, tier, text in (
        ("prune", "disk", "shrink a tier to so many bytes"),
        ("clear", "all", "forget all that nobody is using"),
    ):
        action = actions.add_parser(name, parents=[shared], help=text)
        action.add_argument("--tier", choices=TIERS, default=tier, help=f"without it {tier}")
        if name == "prune":
            action.add_argument("--bytes", type=_bytes, required=True, metavar="N", help="to be kept")


def _bytes(text: str) -> int:
    """Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes")
    return min(int(text), 2**60)


def _version() -> str:
    try:
        return version("sluice")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _serve(loaded: "Loaded", options: argparse.Namespace) -> int:
    from app.serve import serve

    return serve(loaded.config)


def _check_config(loaded: "Loaded", options: argparse.Namespace) -> int:
    from app.check_config import as_json, print_table

    if options.json:
        sys.stdout.write(as_json(loaded) + "\n")
    else:
        print_table(loaded)
    return 0


def _cache(loaded: "Loaded", options: argparse.Namespace) -> int:
    from app.cache_command import run

    return run(loaded.config, options)


def _simulate(loaded: "Loaded", options: argparse.Namespace) -> int:
    from app.simulate.command import run

    return run(options)


def _bench(loaded: "Loaded", options: argparse.Namespace) -> int:
    if options.action == "serve":
        from app.load.command import run as load_server

        return load_server(loaded.config, options)
    from app.profiling.command import run

    return run(loaded.config, options)


def _terminal(loaded: "Loaded", options: argparse.Namespace) -> int:
    from app.terminal.command import run

    return run(loaded, options)


COMMANDS = {
    "serve": _serve,
    "chat": _terminal,
    "ps": _terminal,
    "collect-env": _terminal,
    "check-config": _check_config,
    "cache": _cache,
    "simulate": _simulate,
    "bench": _bench,
}


def _fail(headline: str, *problems: str) -> int:
    sys.stderr.write("\n  ".join([f"sluice: {headline}", *problems]) + "\n")
    return EXIT_USAGE
