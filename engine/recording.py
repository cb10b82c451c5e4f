"""Recording a live run, and replaying it: the core is pure, so equal events must give equal instructions.

A recording is JSON Lines: one header (the fleet's configuration), then for each event its time, the event, and the
instructions it gave, by replica. It holds token ids of prompts and answers: treat it as you would the prompts. Timing
and text are not approximated anywhere; a replay compares bytes. Replaying needs the same vocabulary (the model's
tokenizer).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiofiles
from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from engine.events import (
    Arrived,
    Cancelled,
    Damaged,
    Drained,
    Event,
    Migrated,
    PoliciesChanged,
    Preempted,
    Pruned,
    ReplicaDown,
    ReplicaUp,
    Reprioritised,
    StepDone,
    Timer,
)
from engine.fleet import Fleet, FleetConfig, Told
from engine.policy_set import Catalog
from kvstore.copies import CopyDone, Place, TierDown, TierUp

EVENTS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (
        Arrived,
        Cancelled,
        StepDone,
        Preempted,
        Reprioritised,
        Pruned,
        PoliciesChanged,
        CopyDone,
        TierDown,
        Migrated,
        Drained,
        ReplicaDown,
        ReplicaUp,
        Timer,
    )
}
CONFIG = TypeAdapter(FleetConfig)
VERSION = 6


class RecordingError(Exception):
    """A recording that cannot be read, with the line at fault."""


class Difference(Exception):
    """A replay gave other instructions than the recorded run."""


def header(config: FleetConfig) -> bytes:
    return to_json({"sluice_recording": VERSION, "config": config})


def line(now: float, event: Event, told: list[Told]) -> bytes:
    """One event and what it gave, as canonical JSON."""
    given = [[each.replica, [[type(i).__name__, i] for i in each.instructions]] for each in told]
    return to_json([now, type(event).__name__, event, given], bytes_mode="hex")


def replay(path: Path, vocabulary: tuple[bytes, ...], catalog: Catalog | None = None) -> int:
    """Feeds a recording's events to a fresh fleet. Returns how many agreed, byte for byte; raises Difference.

    `catalog`: with the plug-ins of the recorded run, if it had any.
    """
    with path.open("rb") as file:
        lines = (raw.rstrip(b"\n") for raw in file)
        fleet = Fleet(_config(next(lines, b"")), vocabulary, catalog)
        count = 0
        for count, (recorded, now, event) in enumerate(_events(lines), 1):
            if (given := line(now, event, fleet.handle(event, now))) != recorded:
                raise Difference(
                    f"event {count} ({type(event).__name__}):\nrecorded {recorded!r}\nreplayed {given!r}"
                )
        return count


def _config(raw: bytes) -> FleetConfig:
    try:
        head = from_json(raw)
        if head["sluice_recording"] != VERSION:
            raise RecordingError(
                f"this is version {head['sluice_recording']}; this Sluice replays version {VERSION}"
            )
        return CONFIG.validate_python(head["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordingError(f"line 1 is not a recording's header: {error}") from error


def _events(lines: Iterator[bytes]) -> Iterator[tuple[bytes, float, Event]]:
    for number, raw in enumerate(lines, 2):
        try:
            now, kind, event, _ = from_json(raw)
            yield raw, now, (BYTES.get(kind) or EVENTS[kind].validate_python)(event)
        except (ValueError, KeyError, TypeError) as error:
            raise RecordingError(f"line {number} is not an event: {error}") from error


def _damaged(raw: dict[str, Any]) -> Damaged:
    return Damaged(raw["tier"], tuple(bytes.fromhex(key) for key in raw["keys"]))


def _tier_up(raw: dict[str, Any]) -> TierUp:
    records = tuple(
        Place(**place | {name: bytes.fromhex(place[name]) for name in ("key", "parent")})
        for place in raw["records"]
    )
    return TierUp(**raw | {"records": records})


BYTES: dict[str, Callable[[Any], Event]] = {"TierUp": _tier_up, "Damaged": _damaged}
"""Events with bytes in them, which JSON has as hexadecimal digits."""


class FileRecorder:
    """Appends lines to a file, off the event loop; `record` itself never waits.

    Lines not yet written are held in memory; when the disk cannot keep up with `limit` of them, recording stops with
    an error in `failure` rather than slow the engine down or leave a gap.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self.failure: BaseException | None = None
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue(limit)

    def record(self, now: float, event: Event, told: list[Told]) -> None:
        if self.failure is not None:
            return
        try:
            self._lines.put_nowait(line(now, event, told) + b"\n")
        except asyncio.QueueFull:
            self.failure = RecordingError("the disk cannot keep up with the recording: it ends here")

    async def _write(self, path: Path, config: FleetConfig) -> None:
        async with aiofiles.open(path, "wb") as file:
            await file.write(header(config) + b"\n")
            while batch := await self._batch():
                await file.write(batch)

    async def _batch(self) -> bytes:
        """All the lines that wait, at least one; nothing at the end."""
        batch: list[bytes] = []
        while (raw := await self._lines.get()) is not None:
            batch.append(raw)
            if self._lines.empty():
                return b"".join(batch)
        self._lines.put_nowait(None)  # the end stays the end, should lines have come before it
        return b"".join(batch)

    @contextlib.asynccontextmanager
    async def writing(self, path: Path, config: FleetConfig) -> AsyncIterator["FileRecorder"]:
        """Writes to `path` while the context is open; closes with every line written."""
        writer = asyncio.create_task(self._guard(path, config))
        try:
            yield self
        finally:
            if not writer.done():
                await self._lines.put(None)
            await writer

    async def _guard(self, path: Path, config: FleetConfig) -> None:
        try:
            await self._write(path, config)
        except OSError as error:
            self.failure = error
            while not self._lines.empty():  # room for the end, which may be waiting for it
                self._lines.get_nowait()
