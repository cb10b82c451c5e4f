"""The configuration: every section and key, its type, default and meaning. Frozen models, read once at start.

Where values come from and which source wins: `app/config_sources.py`. The commented copy for operators is
`config.toml` at the top of the repository; a test keeps the two equal.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from app.hosts import is_loopback
from app.keys import KeyTable
from app.policy_sections import PARAMETERS
from app.replica_tables import DEVICE, ReplicaTable
from app.sections import Section
from app.service_classes import ClassTable
from engine.policy_set import SIMULATED
from policies.eviction import EVICTIONS
from policies.order import ORDERS
from policies.placement import PLACEMENTS
from policies.prediction import PREDICTIONS
from policies.preemption import VICTIMS
from policies.rebalancing import REBALANCINGS
from policies.resume import RESUMES
from policies.routing import ROUTINGS

PLUGIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""`package.module:name`."""


def one_of(names: Iterable[str], *, plugins: bool = False) -> AfterValidator:
    """Accepts these names alone, or plug-ins too; the error's context lists them, for the hint."""
    known = sorted(names)

    def check(name: str) -> str:
        if plugins and ":" in name:
            return _plugin(name)
        if name not in known:
            raise PydanticCustomError(
                "unknown_name", "known names: {names}", {"names": ", ".join(known), "known": known}
            )
        return name

    return AfterValidator(check)


def _plugin(path: str) -> str:
    if not PLUGIN.fullmatch(path):
        raise PydanticCustomError("plugin_path", "a plug-in is written package.module:name")
    return path


Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]
Seconds = Annotated[float, Field(ge=0, le=86400)]
PositiveSeconds = Annotated[float, Field(gt=0, le=86400)]
DeviceName = Annotated[str, Field(pattern=f"^({DEVICE})$")]


class ServerSection(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    port: Port = 8000  # 0: any free one, printed at start
    keys_file: str = ""  # [[key]] tables: app/keys.py; "": no key is asked for
    allow_without_keys: bool = False  # beyond loopback
    allowed_hosts: list[str] = Field(default_factory=list)  # names in `Host`, beside addresses and localhost
    max_connections: Annotated[int, Field(ge=1, le=100_000)] = 4096
    max_header_bytes: Annotated[int, Field(ge=1024, le=2**20)] = 8190  # the request line, or one header
    max_headers: Annotated[int, Field(ge=8, le=1024)] = 128
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 4 * 2**20
    read_timeout_seconds: PositiveSeconds = 30.0  # for a request's body to arrive
    write_timeout_seconds: PositiveSeconds = 30.0  # a reader that takes nothing for so long is dropped
    keepalive_seconds: PositiveSeconds = 75.0  # an idle connection, or one whose headers do not arrive
    ping_seconds: PositiveSeconds = 15.0  # a comment into a stream that is silent for so long
    drain_seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> "ServerSection":
        if not (self.keys_file or self.allow_without_keys or is_loopback(self.host)):
            raise PydanticCustomError(
                "open_to_all",
                "host = {host} is reached from other machines: set keys_file, "
                "or allow_without_keys = true to let everybody in",
                {"host": self.host},
            )
        return self


class ModelSection(Section):
    path: str = ""  # a Hugging Face directory; "" is the shipped model
    name: str = ""  # what clients call it; "" is the directory's name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: DeviceName = "auto"


class EngineSection(Section):
    block_size: Annotated[int, Field(ge=16, le=256, multiple_of=16)] = 16  # tokens
    kv_blocks: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0  # 0: from the memory at hand
    max_batch_tokens: Count = 2048  # a step's token budget
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 256  # running at once
    max_queue: Count = 1024  # waiting at once; beyond it a 429
    exact: bool = True  # bits never depend on batch, chunking or way back, where that has a price
    hung_seconds: PositiveSeconds = (
        300.0  # a replica whose step takes longer is fenced; its requests go elsewhere
    )
    restart_seconds: Seconds = 10.0  # before a dead replica is started again; 0: it is not
    record: str = ""  # a file for the core's events and instructions, to be replayed; "" is off


class HostSection(Section):
    bytes: Bytes = 2**30  # of memory; 0 turns the tier off


class DiskSection(Section):
    path: str = Field(default="~/.cache/sluice/kv", min_length=1)
    bytes: Bytes = 0  # all files together; 0 turns the tier off


class KVStoreSection(Section):
    share_across_keys: bool = False  # API keys may find each other's prefixes
    hung_seconds: PositiveSeconds = 30.0  # without progress, before a tier is taken out of use
    retry_seconds: PositiveSeconds = 10.0  # between attempts to take it into use again
    host: HostSection = HostSection()
    disk: DiskSection = DiskSection()


class CheckpointSection(Section):
    every_tokens: Count = 128  # computed and not saved yet
    every_seconds: PositiveSeconds = 5.0
    ahead_steps: int = Field(default=0, ge=0)  # 0: nobody's is saved ahead of a preemption


Plugins = list[Annotated[str, AfterValidator(_plugin)]]


class AlsoSection(Section):
    """Plug-ins that are loaded, so that they can be switched to."""

    order: Plugins = Field(default_factory=list)
    prediction: Plugins = Field(default_factory=list)
    victim: Plugins = Field(default_factory=list)
    resume: Plugins = Field(default_factory=list)
    eviction: Plugins = Field(default_factory=list)
    placement: Plugins = Field(default_factory=list)
    routing: Plugins = Field(default_factory=list)
    rebalancing: Plugins = Field(default_factory=list)


class PolicyNames(Section):
    order: Annotated[str, one_of(ORDERS, plugins=True)] = "hybrid"
    prediction: Annotated[str, one_of(set(PREDICTIONS) - SIMULATED, plugins=True)] = "histogram"
    victim: Annotated[str, one_of(VICTIMS, plugins=True)] = "cheapest_resume"
    resume: Annotated[str, one_of(RESUMES, plugins=True)] = "cheapest"
    eviction: Annotated[str, one_of(EVICTIONS, plugins=True)] = "lru"
    placement: Annotated[str, one_of(PLACEMENTS, plugins=True)] = "write_through"
    routing: Annotated[str, one_of(ROUTINGS, plugins=True)] = "hybrid"
    rebalancing: Annotated[str, one_of(REBALANCINGS, plugins=True)] = "load_pairs"
    also: AlsoSection = AlsoSection()


if TYPE_CHECKING:

    class PoliciesSection(PolicyNames): ...

else:
    _TABLES = {name: (kind, kind()) for name, kind in PARAMETERS.items()}
    PoliciesSection = create_model("PoliciesSection", __base__=PolicyNames, **_TABLES)
"""The names, and a table of parameters for every policy that has some."""


class LogSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"  # auto: console on a terminal, else JSON


class Config(Section):
    """The whole of it. `Config()` is a server that runs."""

    server: ServerSection = ServerSection()
    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    kvstore: KVStoreSection = KVStoreSection()
    checkpoint: CheckpointSection = CheckpointSection()
    policies: PoliciesSection = PoliciesSection()
    log: LogSection = LogSection()
    classes: list[ClassTable] = Field(default_factory=list)  # [[class]], in the file alone: config_tables.py
    replicas: list[ReplicaTable] = Field(
        default_factory=list
    )  # [[replica]], likewise; none: one, of defaults
    keys: list[KeyTable] = Field(default_factory=list)  # what server.keys_file has


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds every reason, each a sentence with a hint."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
