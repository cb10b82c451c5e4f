"""The configuration: precedence, sources, strictness, and that config.toml says what the code does."""

import io
import json
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.check_config import as_json, print_table
from app.config import Config, ConfigError
from app.config_sources import all_keys, load
from app.core_config import balance_config, policy_config
from engine.fleet import BalanceConfig

REPOSITORY = Path(__file__).parents[2]


def problems(*flags: str, env: dict[str, str] | None = None, file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, env or {}, file, cwd=Path("/nowhere"))
    return caught.value.problems


def written(directory: Path, text: str) -> Path:
    file = directory / "config.toml"
    file.write_text(text)
    return file


def test_defaults_alone_are_a_usable_configuration() -> None:
    loaded = load([], {}, cwd=Path("/nowhere"))
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, '[server]\nport = 1\nhost = "127.0.0.2"\ndrain_seconds = 1.0\n')
    env = {"SLUICE__SERVER__PORT": "2", "SLUICE__SERVER__HOST": "127.0.0.3", "HOME": "/"}
    loaded = load(["server.port=3"], env, file)
    assert (loaded.config.server.port, loaded.config.server.host, loaded.config.server.drain_seconds) == (
        3,
        "127.0.0.3",
        1.0,
    )
    assert loaded.sources["server.port"] == "--set"
    assert loaded.sources["server.host"] == "env SLUICE__SERVER__HOST"
    assert loaded.sources["server.drain_seconds"] == str(file)
    assert loaded.sources["server.keepalive_seconds"] == "default"


def test_config_toml_in_the_working_directory_is_found(tmp_path: Path) -> None:
    written(tmp_path, "[engine]\nkv_blocks = 7\n")
    assert load([], {}, cwd=tmp_path).config.engine.kv_blocks == 7


def test_the_last_flag_wins() -> None:
    assert load(["server.port=3", "server.port=4"], {}, cwd=Path("/nowhere")).config.server.port == 4


def test_values_written_as_text_get_their_keys_type() -> None:
    flags = [
        "engine.exact=false",
        "server.drain_seconds=3",
        "model.name=123",
        "model.path=a=b",
        "log.level=debug",
    ]
    config = load(flags, {}, cwd=Path("/nowhere")).config
    assert config.engine.exact is False
    assert config.server.drain_seconds == 3.0
    assert (config.model.name, config.model.path, config.log.level) == ("123", "a=b", "debug")


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("server.prot=1", "unknown key server.prot; did you mean server.port?"),
        ("sever.port=1", "unknown section [sever]; did you mean [server]?"),
        ("engine.port=1", "did you mean server.port?"),
        ("policies.order=fcsf", "did you mean fcfs?"),
        ("policies.victim=newest", "known names: cheapest_resume, fewest_output, last_admitted"),
        ("policies.routing=hybrd", "did you mean hybrid?"),
        ("policies.rebalancing=pairs", "known names: cache_size, load_pairs, none"),
        ("policies.balance.period_seconds=0", "period_seconds must be above 0, and at most 60"),
        ("policies.balance.period_seconds=nan", "should be a finite number"),
        ("policies.balance.cooldown_seconds=nan", "should be a finite number"),
        ("policies.balance.disturbance=inf", "should be a finite number"),
        (f"policies.balance.horizon_steps={10**400}", "less than or equal to 9007199254740992"),
        ("policies.hybrid.ageing=inf", "should be a finite number"),
        ("policies.promotion.wait_seconds=-inf", "should be a finite number"),
        ("policies.balance.at_once=0", "at_once and horizon_steps must be at least 1"),
        ("policies.balance.min_gain=0.5", "min_gain must be at least 1"),
        ("policies.balance.max_moves=-1", "must not be negative"),
        ("log.level=warn", "did you mean warning?"),
        ("server.port=eighty", 'server.port = "eighty": input should be a valid integer'),
        ("server.port=70000", "less than or equal to 65535"),
        ("server.drain_seconds=nan", "finite"),
        ("engine.block_size=17", "multiple of 16"),
        ("model.device=gpu", "should match pattern"),
        ("engine.exact=1", "should be a valid boolean"),
        ("server.port", "expected section.key=value"),
        ("port=1", "expected section.key=value"),
    ],
)
def test_a_bad_flag_is_refused_with_a_hint(flag: str, hint: str) -> None:
    (problem,) = problems(flag)
    assert problem.startswith("--set")
    assert hint in problem


def test_every_problem_of_every_source_is_listed_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, '[server]\nport = "8000"\n[kvstor]\na = 1\nb = 2\n[extra]\n')
    env = {"SLUICE__ENGINE__EXCT": "true", "SLUICE__ODD": "1"}
    found = problems("policies.order=x", env=env, file=file)
    assert len(found) == 6
    assert any("[kvstor]" in problem for problem in found)


@pytest.mark.parametrize("text", ["[server\n", "port = 8000\n", "[[server]]\nport = 1\n", "\x00"])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text)
    assert all(str(file) in problem for problem in problems(file=file))


def test_a_missing_file_is_refused_only_when_asked_for(tmp_path: Path) -> None:
    assert "no such file" in problems(file=tmp_path / "no.toml")[0]
    assert load([], {}, cwd=tmp_path).config == Config()


def test_policies_of_replicas_and_their_parameters_reach_the_fleet() -> None:
    flags = [
        "policies.routing=session",
        "policies.rebalancing=house:moves",
        "policies.balance.at_once=7",
        'policies.also.routing=["house:route"]',
    ]
    config = load(flags, {}, cwd=Path("/nowhere")).config
    names = policy_config(config)
    assert (names.routing, names.rebalancing) == ("session", "house:moves")
    assert config.policies.also.routing == ["house:route"]
    assert balance_config(config) == BalanceConfig(at_once=7)
    assert balance_config(Config()) == BalanceConfig()


def test_config_toml_has_every_key_with_its_default() -> None:
    tables = tomllib.loads((REPOSITORY / "config.toml").read_text())
    assert tables == Config().model_dump(exclude={"classes", "replicas", "keys"})
    assert list(_keys(tables)) == list(all_keys())


def _keys(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_a_section_in_a_section_takes_its_keys_from_every_source(tmp_path: Path) -> None:
    file = written(tmp_path, "[kvstore.host]\nbytes = 5\n[kvstore]\nhung_seconds = 7.0\n")
    loaded = load(["kvstore.disk.path=x"], {"SLUICE__KVSTORE__DISK__BYTES": "9"}, file)
    store = loaded.config.kvstore
    assert (store.host.bytes, store.hung_seconds, store.disk.path, store.disk.bytes) == (5, 7.0, "x", 9)
    assert loaded.sources["kvstore.disk.bytes"] == "env SLUICE__KVSTORE__DISK__BYTES"
    assert "kvstore.host.bytes" in problems("kvstore.host.byte=1")[0]
    assert "kvstore.host.bytes = -1" in problems("kvstore.host.bytes=-1")[0]
    assert "[kvstore.host]" in problems(file=written(tmp_path, "[kvstore.hots]\nbytes = 1\n"))[0]


def test_every_key_of_config_toml_is_documented() -> None:
    lines = (REPOSITORY / "config.toml").read_text().splitlines()
    for before, line in pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert before.startswith("# "), f"no comment above {line!r}"


def test_check_config_shows_every_key_with_its_source() -> None:
    loaded = load(["server.port=9"], {}, cwd=Path("/nowhere"))
    values = json.loads(as_json(loaded))
    assert list(values) == [*all_keys(), "class", "replica"]
    assert values["server.port"] == {"value": 9, "source": "--set"}
    text = io.StringIO()
    print_table(loaded, Console(file=text, width=200))
    lines = text.getvalue().splitlines()
    assert any(line.split() == ["server.port", "9", "--set"] for line in lines)
    assert len(lines) == len(all_keys()) + len(["class", "replica"]) + 1
