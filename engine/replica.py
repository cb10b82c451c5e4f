"""The shell's part of one replica: its worker, the steps it was told, the epoch that fences a lost one's late results.

What it computes and whom it serves is its core's (core.py); that its requests go on elsewhere is fleet.py's.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial

from engine.plan import Plan, StepResult
from engine.records import StepAccounts
from engine.scheduler import Scheduler
from engine.worker import Worker

Reported = Callable[["Replica", int, StepResult | BaseException], None]
"""(whose, the epoch that it was told in, what came of it); on the event-loop thread."""


class Replica:
    """`reported` is called on the loop that is running now."""

    def __init__(self, number: int, worker: Worker, scheduler: Scheduler, reported: Reported) -> None:
        self.number = number
        self.epoch = 0
        self.lost = ""  # why its device is given up; "" while it works
        self.restart_at = float("inf")
        self.starting = False  # again, after it was lost
        self.kv_peak_blocks = 0
        self._loop = asyncio.get_running_loop()
        self._reported = reported
        self._told_at: deque[float] = deque()  # of steps that are not done
        self.start(worker)
        self.count(scheduler)

    def start(self, worker: Worker) -> None:
        """Works with this from now on."""
        self.worker = worker
        self.lost, self.restart_at, self.starting = "", float("inf"), False
        worker.start(partial(self._report, self.epoch))

    def count(self, scheduler: Scheduler) -> None:
        """Tells what this counts, its core's, from now on."""
        self.accounts = StepAccounts(scheduler, self.number)

    def submit(self, plan: Plan, now: float) -> None:
        self._told_at.append(now)
        self.worker.submit(plan)

    def step_ended(self) -> None:
        self._told_at.popleft()

    def working_seconds(self, now: float) -> float:
        """Since the step that it is at was told."""
        return now - self._told_at[0] if self._told_at else 0.0

    def lose(self, reason: str, restart_at: float) -> None:
        """Nobody listens to its worker any more, nor waits for it."""
        self.lost, self.restart_at = reason, restart_at
        self.epoch += 1
        self._told_at.clear()
        self.worker.abandon()

    def _report(self, epoch: int, result: StepResult | BaseException) -> None:
        """Called on the worker's thread, once a step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: a last step outlived whom it was for
            self._loop.call_soon_threadsafe(self._reported, self, epoch, result)
