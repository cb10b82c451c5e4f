"""A whole process without a model, to test signals and exit codes: `python -m tests.app.scripted_server [REPLICAS]`.

Each step waits for a line on standard input when the prompt says so: "go" computes, "die" fails.
"""

import sys

from app.config import Config, LogSection, ServerSection
from app.listening import bind
from app.logging import logging_to
from app.process import run
from app.served import Model
from app.serving import Parts
from engine.core import CoreConfig
from engine.fleet import Fleet, FleetConfig
from engine.model.generation import GenerationDefaults
from engine.plan import Launched, Plan
from engine.scheduler import SchedulerConfig
from engine.worker import QueueWorker, ThreadWorker
from tests.app.rig import EOS, STORY, VOCABULARY, ByteTokenizer
from tests.fakes import ScriptedRunner, saying


class ObedientRunner(ScriptedRunner):
    def launch(self, plan: Plan) -> Launched:
        line = sys.stdin.readline().strip()
        if line != "go":
            raise RuntimeError(f"told to {line}")
        return super().launch(plan)


def main() -> int:
    scheduler = SchedulerConfig(block_size=16, blocks=64, max_batch_tokens=256, max_sequences=4)
    core = CoreConfig(scheduler, model_context=256, max_queue=4, eos_token_ids=(EOS,))
    replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    fleet = Fleet(FleetConfig.of(core, replicas), VOCABULARY)
    runners = [ObedientRunner(saying(STORY), block_size=16, max_sequences=4) for _ in range(replicas)]
    workers = [QueueWorker(runners[0]), *map(ThreadWorker, runners[1:])]
    model = Model(
        "otter", ByteTokenizer(), VOCABULARY, {}, GenerationDefaults((EOS,)), created=1, token_ids=257
    )
    config = Config(server=ServerSection(port=0, drain_seconds=3600.0), log=LogSection(format="json"))
    with bind("127.0.0.1", 0) as listener, logging_to(sys.stderr, config.log):
        return run(Parts(config, model, fleet, workers, exact=True), listener)


if __name__ == "__main__":
    sys.exit(main())
