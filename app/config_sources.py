"""Where the configuration's values come from: flags > environment > file > defaults, each with its source.

Reads the file and the environment; what the keys mean is in `app/config.py`.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from app.config import Config, ConfigError
from app.config_tables import ARRAYS, array_of, read, read_keys
from app.keys import strangers
from app.sections import Section

DEFAULT_FILE = "config.toml"
ENV_PREFIX = "SLUICE__"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One value offered by one source."""

    section: str  # "": `key` is an array of tables
    key: str
    value: object
    source: str  # "--set", "env SLUICE__…", the file's path


@dataclass(frozen=True, slots=True)
class Loaded:
    """A usable configuration, and `sources["section.key"]`: where each value came from."""

    config: Config
    sources: dict[str, str]


def load(
    flags: Iterable[str], env: Mapping[str, str], file: Path | None = None, cwd: Path = Path()
) -> Loaded:
    """Merges the sources and checks all of it. `file` None: `config.toml` in `cwd`, if it is there.

    Raises ConfigError with every problem of every source at once.
    """
    problems: list[str] = []
    settings = [
        *_from_file(_chosen_file(file, cwd, problems), problems),
        *_from_env(env, problems),
        *_from_flags(flags, problems),
    ]
    merged: dict[str, Any] = {}
    sources = dict.fromkeys([*all_keys(), *ARRAYS], DEFAULT)
    for setting in settings:  # later ones win
        if not setting.section:
            merged[ARRAYS[setting.key].field] = setting.value
            sources[setting.key] = setting.source
        elif _is_known(setting, problems):
            _table(merged, setting.section)[setting.key] = setting.value
            sources[f"{setting.section}.{setting.key}"] = setting.source
    config = _with_keys(_validated(merged, sources, problems), problems)
    if config is None or problems:
        raise ConfigError(problems)
    return Loaded(config, sources)


def sections(model: type[Section] = Config, prefix: str = "") -> dict[str, type[Section]]:
    """Every section by its name in the file, dotted where it stands in another, in the order of the file."""
    found: dict[str, type[Section]] = {}
    for name, field in model.model_fields.items():
        if (inner := _section_of(field)) is not None:
            found |= {prefix + name: inner} | sections(inner, f"{prefix}{name}.")
    return found


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def all_keys() -> dict[str, FieldInfo]:
    """Every "section.key" there is, in the order of the file."""
    return {
        f"{section}.{key}": field
        for section, model in sections().items()
        for key, field in model.model_fields.items()
        if _section_of(field) is None
    }


def value_of(config: Config, name: str) -> object:
    """The value of a "section.key"."""
    return reduce(getattr, name.split("."), config)


def _table(merged: dict[str, Any], section: str) -> dict[str, Any]:
    """The table of a section in nested tables, made where it is not there yet."""
    for part in section.split("."):
        merged = merged.setdefault(part, {})
    return merged


def _chosen_file(file: Path | None, cwd: Path, problems: list[str]) -> Path | None:
    if file is None:
        default = cwd / DEFAULT_FILE
        return default if default.is_file() else None
    if not file.is_file():
        problems.append(f"--config {file}: there is no such file")
        return None
    return file


def _from_file(file: Path | None, problems: list[str]) -> list[Setting]:
    if file is None:
        return []
    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"{file}: {error}")
        return []
    settings: list[Setting] = []
    for name, value in tables.items():
        if name in ARRAYS:
            settings.append(Setting("", name, read(name, value, str(file), problems), str(file)))
        elif isinstance(value, dict):
            settings += _from_table(name, value, str(file), problems)
        elif isinstance(value, list) and not _homes(name):
            near = nearest(name, ARRAYS)
            problems.append(
                f"{file}: unknown array of tables [[{name}]]{did_you_mean(near and f'[[{near}]]')}"
            )
        else:
            problems.append(
                f"{file}: {name!r} stands outside a [section]{did_you_mean(' or '.join(_homes(name)))}"
            )
    return settings


def _from_table(section: str, table: dict[str, Any], file: str, problems: list[str]) -> list[Setting]:
    known = sections()
    if section not in known:
        if not table:
            problems.append(f"{file}: {_unknown_section(section)}")
        # An unknown section is one mistake, however many keys it has.
        return [Setting(section, key, value, file) for key, value in list(table.items())[:1]]
    settings: list[Setting] = []
    for key, value in table.items():
        inner = f"{section}.{key}"
        if isinstance(value, dict) and key not in _keys(section):
            settings += _from_table(inner, value, file, problems)
        else:
            settings.append(Setting(section, key, value, file))
    return settings


def _keys(section: str) -> list[str]:
    """The keys of a known section, without the sections in it."""
    return [key for key, field in sections()[section].model_fields.items() if _section_of(field) is None]


def _from_env(env: Mapping[str, str], problems: list[str]) -> list[Setting]:
    settings = []
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX):
            continue
        parts, separator, key = name.removeprefix(ENV_PREFIX).lower().rpartition("__")
        section = parts.replace("__", ".")
        if separator:
            settings.append(Setting(section, key, _parsed(section, key, env[name]), f"env {name}"))
        else:
            problems.append(f"env {name}: expected {ENV_PREFIX}SECTION__KEY")
    return settings


def _from_flags(flags: Iterable[str], problems: list[str]) -> list[Setting]:
    settings = []
    for flag in flags:
        name, equals, text = flag.partition("=")
        section, dot, key = name.strip().rpartition(".")
        if equals and dot:
            settings.append(Setting(section, key, _parsed(section, key, text), "--set"))
        else:
            problems.append(f"--set {flag}: expected section.key=value")
    return settings


def _parsed(section: str, key: str, text: str) -> object:
    """A value written as text: as it stands for a string key, else as TOML would read it."""
    field = all_keys().get(f"{section}.{key}")
    if field is None or _is_text(field.annotation):
        return text
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text  # the type check names it


def _is_text(annotation: object) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation is str


def _is_known(setting: Setting, problems: list[str]) -> bool:
    if name := array_of(setting.section):
        problems.append(f"{setting.source}: [[{name}]] tables can be set in the file only")
        return False
    if setting.section not in sections():
        problems.append(f"{setting.source}: {_unknown_section(setting.section)}")
        return False
    keys = _keys(setting.section)
    if setting.key in keys:
        return True
    name = f"{setting.section}.{setting.key}"
    if name in sections():
        problems.append(f"{setting.source}: {name} is a section; its keys are {', '.join(_keys(name))}")
        return False
    problems.append(f"{setting.source}: unknown key {name}{did_you_mean(_nearest_key(setting, keys))}")
    return False


def _nearest_key(setting: Setting, keys: Iterable[str]) -> str | None:
    """The same key of another section, else the likest of its own, else of all."""
    if homes := _homes(setting.key):
        return " or ".join(homes)
    near = nearest(setting.key, keys)
    return f"{setting.section}.{near}" if near else nearest(f"{setting.section}.{setting.key}", all_keys())


def _homes(key: str) -> list[str]:
    return [name for name in all_keys() if name.rpartition(".")[2] == key]


def _unknown_section(section: str) -> str:
    near = nearest(section, sections())
    return f"unknown section [{section}]{did_you_mean(near and f'[{near}]')}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if one is like it at all."""
    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)), None)


def did_you_mean(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""


def _validated(
    merged: Mapping[str, object], sources: Mapping[str, str], problems: list[str]
) -> Config | None:
    try:
        return Config.model_validate(merged)
    except ValidationError as invalid:
        problems += [_sentence(error, sources) for error in invalid.errors(include_url=False)]
        return None


def _with_keys(config: Config | None, problems: list[str]) -> Config | None:
    """The configuration with what `server.keys_file` has."""
    if config is None or not config.server.keys_file:
        return config
    before = len(problems)
    tables = read_keys(Path(config.server.keys_file), problems)
    config = config.model_copy(update={"keys": tables})
    if len(problems) == before:
        problems += strangers(config.keys, config.classes)
    return config


def _sentence(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if path in sections():
        return _of_section(path, error, sources)
    name = next(key for key in all_keys() if path == key or path.startswith(f"{key}."))
    message = error["msg"][:1].lower() + error["msg"][1:]
    return (
        f"{sources[name]}: {name} = {json.dumps(error['input'], default=str)}: {message}{_hint(name, error)}"
    )


def _of_section(section: str, error: ErrorDetails, sources: Mapping[str, str]) -> str:
    """What is wrong with values that may stand alone; said by whoever set one of them."""
    said = {sources[f"{section}.{key}"]: None for key in _keys(section)}
    by = ", ".join(source for source in said if source != DEFAULT)
    return f"{by or DEFAULT}: [{section}]: {error.get('ctx', {}).get('error', error['msg'])}"


def _hint(name: str, error: ErrorDetails) -> str:
    annotation = all_keys()[name].annotation
    choices = (
        get_args(annotation) if get_origin(annotation) is Literal else error.get("ctx", {}).get("known", ())
    )
    return did_you_mean(nearest(str(error["input"]), choices))
