"""vLLM's scheduler, counting the positions it computes and those it computes again; its metrics leave these out.

For `--scheduler-cls bench.peers.vllm_counting.CountingScheduler`. The counts go to the file that SLUICE_BENCH_COUNTS
names: two little-endian int64, all positions and those below the furthest that its request had reached before, just as
`sluice:computed_tokens_total` and `sluice:recomputed_tokens_total` count ours. It decides nothing. Written for vLLM
0.32 on a CPU, where scheduling is not asynchronous. Runs in vLLM's environment alone.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler  # type: ignore[import-not-found]  # vLLM's environment has it

COUNTS = struct.Struct("<qq")
FILE_VARIABLE = "SLUICE_BENCH_COUNTS"


class CountingScheduler(Scheduler):  # type: ignore[misc]  # its base is not known here
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        with Path(os.environ[FILE_VARIABLE]).open("r+b") as file:
            self._shown = mmap.mmap(file.fileno(), COUNTS.size)
        self._furthest: dict[str, int] = {}
        self._computed = self._again = 0

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Before it: `num_computed_tokens` is where the step's positions of a request begin."""
        for name, count in scheduler_output.num_scheduled_tokens.items():
            begin = self.requests[name].num_computed_tokens
            furthest = self._furthest.get(name, 0)
            self._computed += count
            self._again += max(0, min(furthest, begin + count) - begin)
            self._furthest[name] = max(furthest, begin + count)
        COUNTS.pack_into(self._shown, 0, self._computed, self._again)
        super()._update_after_schedule(scheduler_output)

    def _free_request(self, request: Any, *arguments: Any, **named: Any) -> Any:
        self._furthest.pop(request.request_id, None)
        return super()._free_request(request, *arguments, **named)
