"""The thread that owns torch: takes plans from a queue, launches them, reports results.

A CPU finishes a step inside `launch`. A CUDA device does not: there a second thread waits for results, so that the
next plan is launched while its predecessor still runs.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from engine.plan import Launched, Plan, Runner, StepResult

STOP_SECONDS = 60.0
"""For a step under way when a ThreadWorker is stopped; one that takes longer hangs, and the process ends without it."""

T = TypeVar("T")
Report = Callable[[StepResult | BaseException], None]


class Worker(Protocol):
    """What the engine needs: `report` is called once a plan, in order, from any thread.

    An exception ends the work: what may still be reported after it (steps launched before) counts no more.
    """

    def start(self, report: Report) -> None: ...

    def submit(self, plan: Plan) -> None: ...

    def stop(self) -> None: ...

    def abandon(self) -> None:
        """As `stop`, but it is not waited for: it may hang."""


class QueueWorker:
    """Runs plans on whichever thread calls `run_forever`: the main thread of a server (torch on a second thread
    measured 25–35 % slower on two cores)."""

    def __init__(self, runner: Runner, *, overlap: bool = False) -> None:
        self.runner = runner
        self._plans: SimpleQueue[Plan | None] = SimpleQueue()
        self._launched: SimpleQueue[Launched | None] | None = SimpleQueue() if overlap else None
        self._report: Report = lambda result: None
        self._abandoned = False

    def start(self, report: Report) -> None:
        self._report = report

    def submit(self, plan: Plan) -> None:
        self._plans.put(plan)

    def stop(self) -> None:
        """Ends `run_forever` after the plans already submitted. Call it from any thread, or a signal handler."""
        self._plans.put(None)

    def abandon(self) -> None:
        self._abandoned = True
        self._plans.put(None)
        del self.runner  # its memory is wanted for the next one, as soon as no thread is in it

    def run_forever(self) -> None:
        """Works until `stop`. What the runner raises is reported, and ends the work."""
        collector = Thread(target=self._collect_forever, name="collector") if self._launched else None
        if collector:
            collector.start()
        try:
            while (plan := self._plans.get()) is not None and not self._abandoned:
                self._hand_on(self.runner.launch(plan))
        except Exception as error:  # noqa: BLE001 (whatever a device raises, its clients must hear of it)
            self._report(error)
        finally:
            if self._launched and collector:
                self._launched.put(None)
                collector.join()

    def run_beside(self, work: Callable[[], T]) -> T:
        """As `run_forever`, while `work` (an event loop's, say) runs on another thread, and until that has ended.

        Returns what it returned, raises what it raised.
        """

        def to_its_end() -> T:
            try:
                return work()
            finally:  # an error must not leave this thread waiting for plans
                self.stop()

        with ThreadPoolExecutor(1, thread_name_prefix="event loop") as other:
            ended = other.submit(to_its_end)
            self.run_forever()
        return ended.result()

    def _hand_on(self, launched: Launched) -> None:
        if self._launched:
            self._launched.put(launched)
        else:
            self._report(launched.collect())

    def _collect_forever(self) -> None:
        assert self._launched
        try:
            while (launched := self._launched.get()) is not None:
                self._report(launched.collect())
        except Exception as error:  # noqa: BLE001 (as above)
            self._report(error)
            self._plans.put(None)


class ThreadWorker(QueueWorker):
    """A QueueWorker on a thread of its own, for programs whose main thread runs the event loop."""

    def start(self, report: Report) -> None:
        super().start(report)
        # a daemon: one that hangs must not keep us
        self._thread = Thread(target=self.run_forever, name="runner", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        super().stop()
        self._thread.join(STOP_SECONDS)
