"""What every call needs to know of the server, and whether it takes calls. Built by the composition root."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from app.config import KVStoreSection, ServerSection
from app.keys import Keys
from app.request_log import RequestLog
from app.service_classes import Classes
from app.unknown_fields import UnknownFields
from engine.engine import Engine
from engine.model.generation import GenerationDefaults
from kvstore.store import Store


class Tokenizing(Protocol):
    """What calls ask of a tokenizer (engine/tokenizer.py has the real one). Used on worker threads too."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages as one text, the answer's beginning included. Raises ChatTemplateError."""


@dataclass(frozen=True, slots=True)
class Model:
    """The model as clients see it."""

    name: str
    tokenizer: Tokenizing
    vocabulary: tuple[bytes, ...]  # the bytes of each token id; special tokens empty
    special_tokens: Mapping[int, str]  # how these are written
    defaults: GenerationDefaults
    created: int  # Unix seconds, for /v1/models
    token_ids: int  # the model takes ids below it; a tokenizer may have more


@dataclass(frozen=True, slots=True)
class Served:
    engine: Engine
    model: Model
    server: ServerSection
    kvstore: KVStoreSection = field(default_factory=KVStoreSection)
    store: Store | None = None
    requests: RequestLog = field(default_factory=RequestLog)
    classes: Classes = field(default_factory=Classes)
    keys: Keys = field(default_factory=Keys)
    unknown_fields: UnknownFields = field(default_factory=UnknownFields)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.fleet.context

    @property
    def ready(self) -> bool:
        return self.engine.failure is None and not self.engine.draining


SERVED: web.AppKey[Served] = web.AppKey("served", Served)
