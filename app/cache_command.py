"""`sluice cache stat|verify|prune|clear`: beside a running server through HTTP, without one on the disk store itself.

Exit codes: 0; 1 where something corrupt was found; 2 usage; 3 where there is neither a server nor a store to be had, or
it does not do what it is told.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.cache_server import ServerCache
from app.config import Config
from app.remote import NoServer, ServerRefuses, url_of

EXIT_CORRUPT = 1
EXIT_USAGE = 2
EXIT_NOTHING = 3


class Cache(Protocol):
    """A KV store to look after: a server's, or one on disk."""

    def stat(self) -> dict[str, Any]: ...

    def verify(self, progress: Callable[[int, int], None]) -> dict[str, Any]: ...

    def prune(self, tier: str, size: int) -> dict[str, Any]: ...

    def clear(self, tier: str) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Nothing(Exception):
    """Neither a server nor a store. The message says why not, of both."""


class NotHere(Exception):
    """There is no server, and only it has this tier."""


def run(config: Config, options: argparse.Namespace) -> int:
    """Carries out one of the four; what the world gets wrong becomes one message and an exit code."""
    from app.cache_store import CannotDrop  # these need numpy, which small commands do without
    from kvstore.lmdb_pages import Damage

    try:
        with _opened(config, options) as cache:
            return COMMANDS[options.action](cache, options)
    except Nothing as error:
        return _fail(EXIT_NOTHING, str(error))
    except (ServerRefuses, NoServer, CannotDrop) as error:
        return _fail(EXIT_NOTHING, str(error))
    except NotHere as error:
        return _fail(EXIT_USAGE, str(error))
    except Damage as error:
        path = Path(config.kvstore.disk.path).expanduser()
        return _fail(
            EXIT_CORRUPT,
            f"the store in {path} is damaged: {error}. The next server to use it moves it aside and begins anew.",
        )


@contextmanager
def _opened(config: Config, options: argparse.Namespace) -> Iterator[Cache]:
    """The server's, if there is one, else the store. Raises NoServer (of a given URL), Nothing, NotHere or Damage."""
    server = ServerCache(options.url or url_of(config.server))
    try:
        server.stat()
    except NoServer as error:
        if options.url:
            raise
        cache: Cache = _store(config, options, error)
    else:
        cache = server
    try:
        yield cache
    finally:
        cache.close()


def _store(config: Config, options: argparse.Namespace, no_server: NoServer) -> Cache:
    from app.cache_store import StoreCache
    from kvstore.tier import TierUnusable

    if getattr(options, "tier", "disk") not in ("disk", "all"):
        raise NotHere(f"{no_server}; without one there is only the disk tier, not {options.tier}")
    disk = config.kvstore.disk
    try:
        return StoreCache(Path(disk.path).expanduser(), disk.bytes)
    except TierUnusable as error:
        hint = "--url names a server elsewhere, --config or --set another store (kvstore.disk.path)"
        raise Nothing(f"{no_server};\n  {error};\n  {hint}") from error


# --- the four -------------------------------------------------------------------------------------------------------


def _stat(cache: Cache, options: argparse.Namespace) -> int:
    found = cache.stat()
    if options.json:
        return _print_json(found)
    console = Console()
    if "path" in found:
        console.print(f"No server has it open: the store in {found['path']}", soft_wrap=True)
    console.print(_tier_table(found["tiers"]))
    for tier, state in found["tiers"].items():
        if not state["up"] and "path" not in found:
            console.print(f"{tier} is not in use: {state['reason']}", soft_wrap=True)
    if found["copies"]:
        console.print(_copy_table(found["copies"]))
    return 0


def _verify(cache: Cache, options: argparse.Namespace) -> int:
    with _progress(quiet=options.json) as progress:
        found = cache.verify(progress)
        progress(found["records"], found["records"])
    if options.json:
        _print_json(found)
    else:
        Console().print(f"{found['records']:,} records read, {found['corrupt']:,} of them corrupt.")
        for lost in found["lost"]:
            Console().print(f"  {lost['key']} {lost['reason']}")
        if found["corrupt"]:
            Console().print("They are never used: what they held is computed again when it is wanted.")
    return EXIT_CORRUPT if found["corrupt"] else 0


def _prune(cache: Cache, options: argparse.Namespace) -> int:
    return _print_left(cache.prune(options.tier, options.bytes), options)


def _clear(cache: Cache, options: argparse.Namespace) -> int:
    return _print_left(cache.clear(options.tier), options)


COMMANDS = {"stat": _stat, "verify": _verify, "prune": _prune, "clear": _clear}


# --- words ----------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, from the first that is told: who is refused has none."""
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    task = bar.add_task("verifying", total=None)

    def tell(checked: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=checked, total=total)

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()


def _size(number: int | None) -> str:
    return "" if number is None else decimal(number)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


ROWS: tuple[tuple[str, str, Callable[[int | None], str]], ...] = (
    ("used", "used_bytes", _size),
    ("of", "capacity_bytes", _size),
    ("files", "file_bytes", _size),
    ("blocks", "used_blocks", _count),
    ("pinned blocks", "pinned_blocks", _count),
    ("hit tokens", "hit_tokens", _count),
    ("read", "read_bytes", _size),
    ("written", "written_bytes", _size),
)


def _tier_table(tiers: dict[str, Any]) -> Table:
    """A column a tier, and a row for whatever one of them knows of."""
    table = Table("", box=None, pad_edge=False)
    for name in tiers:
        table.add_column(name, justify="right")
    table.add_row("in use", *("yes" if tier["up"] else "no" for tier in tiers.values()))
    for title, key, words in ROWS:
        if any(tier.get(key) is not None for tier in tiers.values()):
            table.add_row(title, *(words(tier.get(key)) for tier in tiers.values()))
    if any("lost_blocks" in tier for tier in tiers.values()):
        table.add_row("lost blocks", *(_lost(tier.get("lost_blocks", {})) for tier in tiers.values()))
    return table


def _lost(losses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in losses.items()) or "0"


def _copy_table(copies: list[dict[str, Any]]) -> Table:
    table = Table("copies", box=None, pad_edge=False)
    for name in ("of up to", "count", "per second", "ms", "ms in queue"):
        table.add_column(name, justify="right")
    for copy in sorted(copies, key=lambda copy: (copy["source"], copy["target"], copy["copy_bytes"])):
        table.add_row(
            f"{copy['source']} → {copy['target']}",
            _size(copy["copy_bytes"]),
            _count(copy["copies"]),
            _size(copy["bytes_per_second"]),
            f"{1000 * copy['seconds']:.2f}",
            f"{1000 * copy['queued_seconds']:.2f}",
        )
    return table


def _print_left(found: dict[str, Any], options: argparse.Namespace) -> int:
    if options.json:
        return _print_json(found)
    for tier, left in found["tiers"].items():
        size = f" ({_size(left['used_bytes'])})" if left["used_bytes"] is not None else ""
        Console().print(
            f"{tier}: {left['dropped_blocks']:,} blocks dropped, {left['used_blocks']:,}{size} left"
        )
    return 0


def _print_json(found: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


def _fail(code: int, message: str) -> int:
    sys.stderr.write(f"sluice: {message}\n")
    return code
