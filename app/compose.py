"""The composition root, first half: configuration → tokenizer, model, runner, store, core. On the main thread.

The only file of this package that imports torch. The engine and its application belong to the event loop:
`app/serving.py` puts them together there.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from structlog.stdlib import get_logger

from app import memory
from app.calibration import calibrate
from app.config import Config, EngineSection
from app.core_config import balance_config, scheduler_config
from app.plugins import PluginError, load_plugins
from app.served import Model
from app.serving import Parts
from app.tiers import make_tiers
from engine.chat_template import ChatTemplateError
from engine.core import CoreConfig
from engine.fleet import Fleet, FleetConfig
from engine.kernels.protocol import UnsupportedDevice
from engine.kernels.select import make_kernels
from engine.model.errors import ModelError
from engine.model.fingerprint import signature
from engine.model.loading import Loaded, load_model
from engine.policy_set import Catalog
from engine.runner import ModelRunner
from engine.runner_cuda import CudaRunner
from engine.sampler import Sampler
from engine.scheduler import SchedulerConfig
from engine.tokenizer import Tokenizer, TokenizerError
from engine.worker import QueueWorker

SHIPPED = Path(__file__).parent / "shipped" / "tales"

log = get_logger(__name__)


class NoSuchModel(Exception):
    """`model.path` leads nowhere."""


class NoSuchDevice(Exception):
    """`model.device` names a device that this machine has not."""


class CannotRecord(Exception):
    """`engine.record` names a file that cannot be written."""


CANNOT_START = (
    CannotRecord,
    NoSuchModel,
    NoSuchDevice,
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
    device = choose_device(config.model.device)
    tokenizer = Tokenizer.load(directory)
    files = signature(directory) if config.kvstore.disk.bytes else []
    kernels = partial(make_kernels, exact=config.engine.exact)
    loaded = load_model(directory, device=device, dtype=config.model.dtype, kernels=kernels)
    for fact in loaded.facts:
        log.info("model_fact", fact=fact)
    vocabulary = tokenizer.vocabulary(loaded.config.vocab_size)
    scheduler = scheduler_config(config, _blocks(config.engine, loaded), _block_bytes(config.engine, loaded))
    runner = make_runner(loaded, scheduler)
    runner.warm_up()
    tiers = make_tiers(config, directory, files, loaded, runner)
    scheduler = replace(scheduler, residency=tiers.residency)
    scheduler = replace(scheduler, calibration=calibrate(runner, scheduler, tiers.device, tiers.host))
    core = core_config(config, loaded, scheduler, tiers.fingerprint)
    fleet = Fleet(FleetConfig.of(core, balance=balance_config(config)), vocabulary, catalog)
    model = Model(
        name=config.model.name or directory.name,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        special_tokens={token: text for text, token in tokenizer.special_tokens.items()},
        defaults=loaded.generation,
        created=int(time.time()),
    )
    _log_loaded(model, loaded, core, runner.exact)
    worker = QueueWorker(runner, overlap=_runs_ahead(loaded))
    return Parts(config, model, fleet, [worker], runner.exact, tiers.store)


def model_directory(path: str) -> Path:
    directory = Path(path).expanduser().resolve() if path else SHIPPED
    if not (directory / "config.json").is_file():
        raise NoSuchModel(
            f"{directory} is no model directory (there is no config.json in it); "
            'set model.path to one in Hugging Face layout, or to "" for the shipped model'
        )
    return directory


def check_recording(path: str) -> None:
    try:
        if path:
            Path(path).open("ab").close()
    except OSError as error:
        raise CannotRecord(f"engine.record = {path!r} cannot be written: {error.strerror}") from error


def choose_device(name: str) -> torch.device:
    """auto: a CUDA device if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise NoSuchDevice(f"model.device = {name!r}, but there are {found} CUDA devices; try auto or cpu")
    return device


def core_config(config: Config, loaded: Loaded, scheduler: SchedulerConfig, fingerprint: str) -> CoreConfig:
    return CoreConfig(
        scheduler=scheduler,
        model_context=loaded.config.max_positions,
        max_queue=config.engine.max_queue,
        max_outstanding=2 if _runs_ahead(loaded) else 1,
        eos_token_ids=loaded.generation.eos_token_ids,
        fingerprint=fingerprint,
    )


def _block_bytes(engine: EngineSection, loaded: Loaded) -> int:
    return loaded.model.kv_shape(engine.block_size).elements * loaded.dtype.itemsize


def _blocks(engine: EngineSection, loaded: Loaded) -> int:
    """At most what lets every slot run a whole context; the prefix cache lives in what is not held."""
    device = loaded.model.device
    on_gpu = device.type == "cuda"
    return memory.kv_blocks(
        engine.kv_blocks,
        block_bytes=_block_bytes(engine, loaded),
        useful_blocks=-(-loaded.config.max_positions // engine.block_size) * engine.max_sequences,
        free_bytes=torch.cuda.mem_get_info(device)[0] if on_gpu else memory.free_cpu_bytes(),
        share=memory.GPU_SHARE if on_gpu else memory.CPU_SHARE,
    )


def _runs_ahead(loaded: Loaded) -> bool:
    """A CUDA device is given its next step while one runs; a CPU overlaps nothing."""
    return loaded.model.device.type == "cuda"


def make_runner(loaded: Loaded, scheduler: SchedulerConfig) -> ModelRunner | CudaRunner:
    device = loaded.model.device
    kind = CudaRunner if device.type == "cuda" else ModelRunner
    return kind(
        loaded.model,
        Sampler(scheduler.max_sequences, loaded.config.vocab_size, device),
        kv_blocks=scheduler.blocks,
        block_size=scheduler.block_size,
        max_sequences=scheduler.max_sequences,
    )


def _log_loaded(model: Model, loaded: Loaded, core: CoreConfig, exact: bool) -> None:
    log.info(
        "model_loaded",
        model=model.name,
        device=str(loaded.model.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        context=core.context,
        kv_blocks=core.scheduler.blocks,
        block_size=core.scheduler.block_size,
        exact=exact,
    )
