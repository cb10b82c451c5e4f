"""`sluice ps`: what a running server is at, from /admin/state and /admin/requests. Live, or once."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from app.remote import NoServer, Remote

WIDE = 150
MOST_ROWS = 200
REPLICA_STATES = {"up": "green", "draining": "yellow", "starting": "cyan", "down": "red"}
STATES = {"running": "green", "loading": "cyan", "waiting": "yellow"}
COLUMNS = {
    "priority": "prio",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "output_tokens": "output",
    "kv_blocks": "blocks",
    "preemptions": "preempt",
    "recomputed_tokens": "recomp",
    "reloaded_tokens": "reload",
}
SEVERAL = {"replica": "replica", "migrations": "moves"}
"""Of /admin/requests, and their heads; the last ones where there are several replicas."""


def ps(remote: Remote, options: argparse.Namespace) -> int:
    """Raises NoServer, ServerRefuses; Ctrl-C ends the live one."""
    if options.json:
        sys.stdout.write(json.dumps(look(remote), indent=2) + "\n")
    elif options.once:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        console.print(shown(look(remote), None))
    else:
        _live(remote, options.every)
    return 0


def look(remote: Remote) -> dict[str, Any]:
    """{"state": …, "requests": […]}. Raises NoServer, ServerRefuses."""
    state, requests = remote.one("GET", "/admin/state"), remote.one("GET", "/admin/requests").get("requests")
    if "kv_blocks" not in state or not isinstance(requests, list):
        raise NoServer(f"what answers at {remote.url} is not Sluice")
    return {"state": state, "requests": requests}


def _live(remote: Remote, every_seconds: float) -> None:
    speeds = Speeds(time.monotonic)
    try:
        with Live(shown(look(remote), speeds), auto_refresh=False, screen=sys.stdout.isatty()) as live:
            while True:
                time.sleep(every_seconds)
                live.update(shown(look(remote), speeds), refresh=True)
    except KeyboardInterrupt:  # how it is meant to end
        return


class Speeds:
    """Output tokens per second of each request, between two looks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before: dict[str, tuple[float, int]] = {}

    def of(self, requests: list[dict[str, Any]]) -> dict[str, float]:
        now = self._clock()
        seen = {str(each["id"]): (now, int(each["output_tokens"])) for each in requests}
        before, self._before = self._before, seen
        return {
            name: (tokens - before[name][1]) / (now - before[name][0])
            for name, (_, tokens) in seen.items()
            if name in before and now > before[name][0]
        }


def shown(found: dict[str, Any], speeds: Speeds | None) -> Group:
    several = len(found["state"].get("replicas", ())) > 1
    columns = SEVERAL | COLUMNS if several else COLUMNS
    return Group(_head(found["state"]), _requests(found["requests"], speeds, columns))


def _head(state: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    health = "" if state["alive"] else " [red]its engine has died[/]"
    drains = " [yellow]draining[/]" if state["draining"] else ""
    running, waiting = state["running"], state["waiting"]
    table.add_row("model", f"[bold]{escape(str(state['model']))}[/]{health}{drains}")
    table.add_row(
        "requests", f"{running} running, {waiting} waiting, {state['preemptions']:,} preemptions so far"
    )
    used, blocks = state["kv_used_blocks"], state["kv_blocks"]
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(1, blocks), completed=used, width=24),
        f"{used:,} of {blocks:,} blocks held, {state['kv_cached_blocks']:,} cached",
    )
    table.add_row("device KV", bar)
    if len(replicas := state.get("replicas", ())) > 1:
        for each in replicas:
            table.add_row(f"replica {each['replica']}", _replica(each))
    for name, tier in state["tiers"].items():
        if tier["up"]:
            table.add_row(f"{name} KV", f"{tier['blocks']:,} of {tier['capacity_blocks']:,} blocks")
    table.add_row("policies", ", ".join(f"{family} {name}" for family, name in state["policies"].items()))
    return table


def _replica(replica: dict[str, Any]) -> str:
    state = replica["state"]
    told = f"[{REPLICA_STATES.get(state, 'white')}]{escape(str(state))}[/]"
    if state == "down":
        return f"{told}: {escape(str(replica['reason']))}"
    return (
        f"{told}: {replica['running']} running, {replica['waiting']} waiting, {replica['kv_used_blocks']:,} of "
        f"{replica['kv_blocks']:,} blocks held, {replica['backlog_seconds']:.1f} s of work"
    )


def _requests(requests: list[dict[str, Any]], speeds: Speeds | None, columns: dict[str, str]) -> Table:
    classes = any(each.get("class") for each in requests)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True, min_width=16)
    table.add_column("state", no_wrap=True)
    if classes:
        table.add_column("class")
    for head in (*columns.values(), *(["tok/s"] if speeds else [])):
        table.add_column(head, justify="right")
    rates = speeds.of(requests) if speeds else {}
    order = {state: place for place, state in enumerate(STATES)}
    ranked = sorted(requests, key=lambda each: (order.get(each["state"], len(order)), each["arrived"]))
    for each in ranked[:MOST_ROWS]:
        state = f"[{STATES.get(each['state'], 'white')}]{escape(str(each['state']))}[/]"
        cells = [_cell(each.get(name)) for name in (["class"] if classes else []) + list(columns)]
        rate = [f"{rates[each['id']]:.1f}" if each["id"] in rates else ""] if speeds else []
        table.add_row(escape(str(each["id"])), state, *cells, *rate)
    if len(ranked) > MOST_ROWS:
        table.caption = f"and {len(ranked) - MOST_ROWS:,} more"
    if not ranked:
        table.caption = "no request is running or waiting"
    return table


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str("" if value is None else value))
