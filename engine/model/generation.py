"""A model's own sampling defaults, from generation_config.json.

Only what Sluice can honour; what it cannot is reported, not obeyed in silence. The API's defaults and a
request's fields overrule these (see app/).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from engine.model.errors import UnsupportedModel, listed
from engine.model.reading import Fields, read_json_object
from engine.plan import LEAST_REPETITION, MOST_REPETITION

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "num_beams": (1,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
}
"""Fields that change what is drawn and are unknown to Sluice, with the values at which they do nothing."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """None: the model has no opinion."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignored: tuple[str, ...] = ()  # "field = value" that the model asks for and does not get


def read_generation(directory: Path, config: ModelConfig) -> GenerationDefaults:
    """Parses `directory`/generation_config.json; without one, end-of-sequence is config.json's."""
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(config.eos_token_ids)
    return parse_generation(read_json_object(path), config, str(path))


def parse_generation(
    raw: dict[str, Any], config: ModelConfig, origin: str = "generation_config.json"
) -> GenerationDefaults:
    """A generation_config.json as a dict -> GenerationDefaults; UnsupportedModel lists bad values."""
    fields = Fields(raw, [])
    defaults = GenerationDefaults(
        eos_token_ids=fields.token_ids("eos_token_id") or config.eos_token_ids,
        temperature=_optional(fields, "temperature", low=0.0),
        top_p=_optional(fields, "top_p", low=0.0, high=1.0),
        top_k=fields.whole("top_k", least=0) if fields.has("top_k") else None,
        min_p=_optional(fields, "min_p", low=0.0, high=1.0),
        repetition_penalty=_optional(
            fields, "repetition_penalty", low=LEAST_REPETITION, high=MOST_REPETITION
        ),
        ignored=_ignored(raw),
    )
    if fields.problems:
        raise UnsupportedModel(listed(f"{origin} has values out of range", fields.problems))
    return defaults


def _optional(fields: Fields, name: str, *, low: float, high: float = float("inf")) -> float | None:
    return fields.number(name, low=low, high=high) if fields.has(name) else None


def _ignored(raw: dict[str, Any]) -> tuple[str, ...]:
    asked = ((name, raw.get(name), neutral) for name, neutral in NEUTRAL.items())
    return tuple(
        f"{name} = {value}" for name, value, neutral in asked if value is not None and value not in neutral
    )
