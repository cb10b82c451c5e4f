"""The directory of the disk tier: its one owner, what is moved aside, and whether a store in it may be opened.

    owner.lock   held while a process uses the directory
    data.mdb     the store (LMDB's), and lock.mdb, LMDB's own
    aside-*.mdb  a store that could not be used: kept for whoever wants to know why, one at most, inside the quota

LMDB trusts its file: a damaged page is a crash or silently overwritten data, a short file a SIGBUS. So a store is
audited by a child process (audit.py) before this one opens it. What the store holds is disk.py's.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kvstore.audit import report
from kvstore.disk_sizes import TransactionLimits, sizes
from kvstore.format import FORMAT, About
from kvstore.lmdb_pages import Damage
from kvstore.tier import TierUnusable

DATA_FILE: Final = "data.mdb"
LMDB_LOCK_FILE: Final = "lock.mdb"
OWNER_FILE: Final = "owner.lock"
ASIDE: Final = "aside-*.mdb"
LOCKS_BYTES: Final = 16384
"""Of the quota, for LMDB's lock file: 8 KiB for 126 readers."""

NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a system says that has no room for more of a file."""

AUDIT_SECONDS: Final = 60.0
AUDIT_SECONDS_PER_GB: Final = 1.0
"""An audit may take so long: measured, 1 M records take a few seconds, but a disk may have others to serve."""


STOPPED: Final = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
"""Whoever sends these to the audit wants it to end: they say nothing of the store."""


class Directory:
    """Ours alone, from `Directory(path)` until `close()`. Raises TierUnusable where another process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / DATA_FILE
        try:
            _make(path)
            self._owner = os.open(path / OWNER_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierUnusable(
                f"kvstore.disk.path {path}: {error.strerror}: give one this user can write"
            ) from error
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._owner)
            raise TierUnusable(
                f"kvstore.disk.path {path} is in use by another server: give each its own"
            ) from error

    def close(self) -> None:
        """Lets others have it."""
        os.close(self._owner)

    def prepare(self, wanted: About, quota_bytes: int, limits: TransactionLimits) -> str:
        """Leaves a store that may be opened as `wanted`, or none. Why it is none, where there was one; else empty.

        Raises TierUnusable: the quota is too small, or somebody has stopped the audit.
        """
        (self.path / LMDB_LOCK_FILE).unlink(missing_ok=True)  # nobody else is here: what it says is outdated
        self._shrink_aside(quota_bytes)
        if not self.data.exists():
            return ""
        reason, records = audit(self.data, wanted)
        if not reason and not records:
            self.data.unlink()  # nothing is lost, and its pages go back to the file system
            return ""
        ours = sizes(self.room_bytes(quota_bytes), wanted.block_bytes, limits)
        if not reason and not ours.holds(self.data.stat().st_size, records):
            reason = "the store is larger than the quota"
        return self.set_aside(reason, quota_bytes) if reason else ""

    def room_bytes(self, quota_bytes: int) -> int:
        """What is left of the quota for the store."""
        return quota_bytes - LOCKS_BYTES - sum(path.stat().st_size for path in self.asides())

    def can_grow(self, by_bytes: int, most_bytes: int) -> bool:
        """Whether the file system has room for so much more of the store, or for what it lacks to `most_bytes`."""
        with self.data.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = min(by_bytes, most_bytes - size)
            try:
                if wanted > 0:
                    os.posix_fallocate(file.fileno(), size, wanted)
            except OSError as error:
                return error.errno not in NO_ROOM
            finally:
                file.truncate(size)
        return True

    def asides(self) -> list[Path]:
        return sorted(self.path.glob(ASIDE))

    def forget_asides(self) -> None:
        for path in self.asides():
            path.unlink()

    def _shrink_aside(self, quota_bytes: int) -> None:
        if sum(path.stat().st_size for path in self.asides()) > quota_bytes // 2:
            self.forget_asides()

    def set_aside(self, reason: str, quota_bytes: int) -> str:
        """Moves the store, of which nobody has a file open, out of the way. One line: why, and where it is now."""
        self.forget_asides()
        if self.data.stat().st_size > quota_bytes // 2:
            self.data.unlink()
            return f"{reason}; it was deleted, as it is more than half of the quota"
        aside = self.path / ASIDE.replace("*", datetime.now(UTC).strftime("%Y%m%dT%H%M%S"))
        self.data.rename(aside)
        return f"{reason}; it was moved to {aside.name}"


def _make(path: Path) -> None:
    """The directory, for our eyes only. One that is shared with other files keeps its mode: ours have their own."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    ours = {DATA_FILE, LMDB_LOCK_FILE, OWNER_FILE}
    if all(entry.name in ours or entry.match(ASIDE) for entry in path.iterdir()):
        path.chmod(0o700)


def audit(data: Path, wanted: About) -> tuple[str, int]:
    """Why the store must not be opened as `wanted` (empty: it may), and how many records it has.

    Runs audit.py in a child process, bounded in time: should that die, this one does not. Raises TierUnusable where
    somebody stopped it.
    """
    seconds = AUDIT_SECONDS + AUDIT_SECONDS_PER_GB * data.stat().st_size / 1e9
    command = [sys.executable, "-m", "kvstore.audit", str(data)]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        child = subprocess.run(  # noqa: S603 (our own interpreter and module; the path is data)
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
            start_new_session=True,  # an interrupt typed to this process is not for it
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the audit of the store took longer than {seconds:.0f} s", 0
    if -child.returncode in STOPPED:
        raise TierUnusable("the audit of the store was stopped: open it again")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"the audit of the store ended with status {child.returncode}: {last}", 0
    return _judge(json.loads(child.stdout), wanted)


def _judge(report: dict[str, Any], wanted: About) -> tuple[str, int]:
    if damage := report.get("damage"):
        return f"the store is damaged, or not ours: {damage}", 0
    if not report.get("about"):
        return "", 0
    about = About.unpack(bytes.fromhex(report["about"]))
    assert about is not None, "the audit lets only intact ones pass"
    return about.difference(wanted), int(report["records"])


def audited_here(data: Path) -> About:
    """What a store holds that LMDB may open, audited in this process. Raises Damage, or TierUnusable: it is empty."""
    found = report(str(data))
    if damage := found.get("damage"):
        raise Damage(damage)
    about = About.unpack(bytes.fromhex(str(found["about"])))
    if about is None:
        raise TierUnusable(f"there is no store in {data.parent}: it has only been begun")
    if about.format != FORMAT:
        raise TierUnusable(
            f"the store in {data.parent} has format {about.format}, this version reads {FORMAT}"
        )
    return about
