"""A profile from per-operator latency tables, as LLMServingSim's profiler writes them (times in µs, gzip CSV).

In a directory, for one card and model: `*_meta.json`, `*_profile_dense.csv.gz` (`layer`, `tokens`, `time_us`),
`*_profile_attention.csv.gz` (`prefill_chunk`, `kv_prefill`, `n_decode`, `kv_decode`, `time_us`; one layer),
`*_profile_per_sequence.csv.gz` (`layer`, `sequences`, `time_us`).
Source of the format: casys-kaist/LLMServingSim (MIT), trimmed.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.workload.reading import parsed, rows
from engine.profile import Profile, ProfileError, checked
from engine.step_time import Grid, TableTime

TIMES_PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
"""Operators of a Llama layer, but attention, and how often each runs in it."""

ONCE = ("embedding", "final_layernorm")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model that the tables were measured with; the tables do not say them."""

    layers: int
    kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, number_bytes: int = 2) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * block_size * number_bytes


MODELS = {"meta-llama/Llama-3.1-8B": Sizes(layers=32, kv_heads=8, head_dim=128)}
"""From the models' config.json."""


def read_tables(directory: Path) -> Profile:
    """Raises ProfileError, TraceError."""
    facts = _facts(only(directory, "*_meta.json"))
    if facts["model"] not in MODELS:
        raise ProfileError(f"the tables are of {facts['model']!r}; known: {', '.join(MODELS)}")
    sizes = MODELS[facts["model"]]
    profile = Profile(
        **facts,
        block_bytes=sizes.block_bytes(facts["block_size"]),
        runs_ahead=True,
        step=_step_time(directory, sizes.layers),
    )
    return checked(profile, directory)


def _facts(path: Path) -> dict[str, Any]:
    """What of a profile the meta file says. Raises ProfileError."""
    try:
        meta = json.loads(path.read_text("utf-8"))
        engine, cache = meta["engine_kwargs"], meta["kv_cache"]
        return {
            "machine": meta["device"]["device_name"],
            "model": meta["model"],
            "dtype": engine["dtype"],
            "source": f"operator tables measured with vLLM {meta['vllm_version']}; no transfers measured",
            "block_size": cache["block_size"],
            "context": engine["max_model_len"],
            "kv_blocks": cache["num_gpu_blocks"],
        }
    except KeyError as error:
        raise ProfileError(f"{path}: there is no {error}") from error
    except (TypeError, ValueError) as error:
        raise ProfileError(f"{path} is no meta file: {error}") from error


def _step_time(directory: Path, layers: int) -> TableTime:
    dense = _by_name(only(directory, "*_profile_dense.csv.gz"), "tokens")
    sequences = _by_name(only(directory, "*_profile_per_sequence.csv.gz"), "sequences")
    return TableTime(
        layers=layers,
        dense=_sum(dense, TIMES_PER_LAYER),
        once=_sum(dense, dict.fromkeys(ONCE, 1)),
        head=_sum(sequences, dict.fromkeys(sequences, 1)),
        attention=Grid(tuple(sorted(_attention(only(directory, "*_profile_attention.csv.gz"))))),
    )


def only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise ProfileError(f"{directory} holds {len(found)} files {pattern}; one is wanted")
    return found[0]


def _by_name(path: Path, column: str) -> dict[str, dict[int, float]]:
    """Seconds by operator and size."""
    found: dict[str, dict[int, float]] = defaultdict(dict)

    def parse(row: Mapping[str, str]) -> None:
        found[row["layer"]][int(row[column])] = float(row["time_us"]) * 1e-6

    for _ in parsed(path, rows(path, ("layer", column, "time_us")), parse):
        pass
    return dict(found)


def _sum(
    tables: Mapping[str, Mapping[int, float]], times: Mapping[str, int]
) -> tuple[tuple[float, float], ...]:
    """One curve from several operators', measured at the same sizes."""
    if not times:
        raise ProfileError("the tables by sequences have no operator")
    if missing := [name for name in times if name not in tables]:
        raise ProfileError(f"the tables have no operator {', '.join(missing)}")
    sizes = sorted(set.intersection(*(set(tables[name]) for name in times)))
    return tuple(
        (float(size), sum(count * tables[name][size] for name, count in times.items())) for size in sizes
    )


def _attention(path: Path) -> list[tuple[int, int, int, int, float]]:
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")

    def parse(row: Mapping[str, str]) -> Any:
        return (*(int(row[name]) for name in columns), float(row["time_us"]) * 1e-6)

    return list(parsed(path, rows(path, (*columns, "time_us")), parse))
