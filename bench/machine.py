"""What the machine is, and how much of it others took while we measured. Linux only (/proc)."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class NoSuchProcess(Exception):
    """A process to be watched is not there, or no longer."""


def description() -> dict[str, object]:
    """Processor, cores and kernel, for the head of a file of rows."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def process_seconds(pid: int) -> float:
    """Processor seconds that a process has used, its ended children's included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND


def _busy_seconds() -> float:
    """Processor seconds that this machine has been at work (or been kept from it by its host), all cores."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND


def family(pid: int) -> list[int]:
    """A process and its descendants, those that are there now."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:  # grows
        found += [child for child, parent in parents.items() if parent == each]
    return found


class Others:
    """A meter of the cores that processes other than `pids` keep busy, from its making until `cores()`."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._began, self._spent = time.perf_counter(), self._read()

    def _read(self) -> float:
        return _busy_seconds() - sum(process_seconds(pid) for pid in self._pids)

    def cores(self) -> float:
        """Mean number of cores in use by others; a clock tick (10 ms) is the resolution."""
        wall = time.perf_counter() - self._began
        return max(0.0, self._read() - self._spent) / wall if wall else 0.0


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now. Raises NoSuchProcess."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"no process {pid} here") from error
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Meanwhile so many other processes want a core each, all the time."""
    with ExitStack() as undo:
        for _ in range(count):
            busy = undo.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            undo.callback(busy.kill)
        yield
