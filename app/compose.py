"""The composition root, first half: configuration → tokenizer, model, runners, store, fleet. On the main thread.

Models and runners are made in `app/replica_runners.py`. The engine and its application belong to the event loop:
`app/serving.py` puts them together there.
"""

import os
import time
from functools import partial
from pathlib import Path

from structlog.stdlib import get_logger

from app import collector, memory
from app.config import Config
from app.core_config import balance_config
from app.plugins import PluginError, load_plugins
from app.replica_runners import NoSuchDevice, ReplicaRunner, Replicas, UnlikeReplicas, load_replicas
from app.served import Model
from app.serving import Parts
from app.threads import on_a_daemon
from app.tiers import Tiers, make_tiers
from engine.chat_template import ChatTemplateError
from engine.core import CoreConfig
from engine.engine import Revived
from engine.fleet import Fleet, FleetConfig, ReplicaConfig
from engine.kernels.protocol import UnsupportedDevice
from engine.model.errors import ModelError
from engine.model.fingerprint import signature
from engine.policy_set import Catalog
from engine.scheduler import SchedulerConfig
from engine.tokenizer import Tokenizer, TokenizerError
from engine.worker import QueueWorker, ThreadWorker

SHIPPED = Path(__file__).parent / "shipped" / "tales"

log = get_logger(__name__)


class NoSuchModel(Exception):
    """`model.path` leads nowhere."""


class CannotRecord(Exception):
    """`engine.record` names a file that cannot be written."""


CANNOT_START = (
    CannotRecord,
    NoSuchModel,
    NoSuchDevice,
    UnlikeReplicas,
    PluginError,
    memory.NotEnoughMemory,
    ModelError,
    TokenizerError,
    ChatTemplateError,
    UnsupportedDevice,
)
"""What the world can get wrong before a server serves; each says what to change."""


def load(config: Config) -> Parts:
    """Loads the model and gets it warm. Raises one of CANNOT_START."""
    check_recording(config.engine.record)
    catalog = Catalog(load_plugins(config.policies))
    directory = model_directory(config.model.path)
    tokenizer = Tokenizer.load(directory)
    files = signature(directory) if config.kvstore.disk.bytes else []
    replicas = load_replicas(config, directory)
    runners = list(replicas.runners.values())
    loaded = runners[0].loaded
    vocabulary = tokenizer.vocabulary(loaded.config.vocab_size)
    tiers = make_tiers(config, directory, files, loaded, [each.device for each in runners])
    fleet = Fleet(fleet_config(config, replicas, tiers), vocabulary, catalog)
    model = Model(
        name=config.model.name or directory.name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        special_tokens={token: text for text, token in tokenizer.special_tokens.items()},
        defaults=loaded.generation,
        created=int(time.time()),
        token_ids=loaded.config.vocab_size,
    )
    _log_loaded(model, replicas, fleet)
    first, *others = runners
    workers = [QueueWorker(first.runner, overlap=first.runs_ahead), *map(_on_its_own_thread, others)]
    revive = partial(_revive, replicas)
    exact = all(each.runner.exact for each in runners)
    collector.spare()
    return Parts(config, model, fleet, workers, exact, tiers.store, revive)


def _on_its_own_thread(replica: ReplicaRunner) -> ThreadWorker:
    return ThreadWorker(replica.runner, overlap=replica.runs_ahead)


async def _revive(replicas: Replicas, number: int) -> Revived:
    """A lost replica's device anew, made on a thread of its own: it may hang. Raises what making it raises."""
    made = await on_a_daemon(partial(replicas.make, number), f"replica {number}, made anew")
    return Revived(_on_its_own_thread(made), made.device)


def model_directory(path: str) -> Path:
    directory = Path(path).expanduser().resolve() if path else SHIPPED
    if not (directory / "config.json").is_file():
        raise NoSuchModel(
            f"{directory} is no model directory (there is no config.json in it); "
            'set model.path to one in Hugging Face layout, or to "" for the shipped model'
        )
    return directory


def check_recording(path: str) -> None:
    """Makes the file, if it is not there, for this user alone: there will be prompts in it. Raises CannotRecord."""
    try:
        if path:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise CannotRecord(f"engine.record = {path!r} cannot be written: {error.strerror}") from error


def fleet_config(config: Config, replicas: Replicas, tiers: Tiers) -> FleetConfig:
    """Measures what steps and copies cost."""
    schedulers = replicas.schedulers(tiers.residency, tiers.host)
    return FleetConfig(
        tuple(
            ReplicaConfig(
                core_config(config, replica, scheduler, tiers.fingerprint),
                replica.table.role,
                replica.table.limit_tokens,
            )
            for (_, replica), scheduler in zip(sorted(replicas.runners.items()), schedulers, strict=True)
        ),
        balance_config(config),
    )


def core_config(
    config: Config, replica: ReplicaRunner, scheduler: SchedulerConfig, fingerprint: str
) -> CoreConfig:
    token_ids = replica.loaded.config.vocab_size  # a stop token beyond these is never drawn
    return CoreConfig(
        scheduler=scheduler,
        model_context=replica.loaded.config.max_positions,
        max_queue=config.engine.max_queue,
        max_outstanding=2 if replica.runs_ahead else 1,
        eos_token_ids=tuple(token for token in replica.loaded.generation.eos_token_ids if token < token_ids),
        fingerprint=fingerprint,
    )


def _log_loaded(model: Model, replicas: Replicas, fleet: Fleet) -> None:
    for number, member in enumerate(fleet.members if not fleet.alone else ()):
        scheduler = member.core.config.scheduler
        log.info(
            "replica_made",
            replica=number,
            device=str(replicas.runners[number].loaded.model.device),
            role=member.role,
            limit_tokens=member.limit_tokens,
            kv_blocks=scheduler.blocks,
        )
    first = replicas.runners[0]
    log.info(
        "model_loaded",
        model=model.name,
        device=str(first.loaded.model.device),
        dtype=str(first.loaded.dtype).removeprefix("torch."),
        context=fleet.context,
        kv_blocks=sum(core.config.scheduler.blocks for core in fleet.cores),
        block_size=first.scheduler.block_size,
        replicas=len(fleet.members),
        exact=first.runner.exact,
    )
