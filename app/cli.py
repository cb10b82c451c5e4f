"""The command line: `sluice serve`, `sluice check-config`. The server is imported only when it serves."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from app.config import ConfigError
from app.config_sources import Loaded, load

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    options = parser().parse_args(arguments)
    try:
        loaded = load(options.set, os.environ, options.config)
    except ConfigError as error:
        return _fail("the configuration cannot be used:", *error.problems)
    command = {"serve": _serve, "check-config": _check_config}[options.command]
    return command(loaded, options)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sluice", description="An LLM server for one GPU host.")
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
    return top


def _version() -> str:
    try:
        return version("sluice")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _serve(loaded: Loaded, options: argparse.Namespace) -> int:
    from app.serve import serve

    return serve(loaded.config)


def _check_config(loaded: Loaded, options: argparse.Namespace) -> int:
    from app.check_config import as_json, print_table

    if options.json:
        sys.stdout.write(as_json(loaded) + "\n")
    else:
        print_table(loaded)
    return 0


def _fail(headline: str, *problems: str) -> int:
    sys.stderr.write("\n  ".join([f"sluice: {headline}", *problems]) + "\n")
    return EXIT_USAGE
