"""`sluice collect-env`: what a bug report should say, as plain text. Secrets are left out, the home directory is "~".

Of the server it tells /admin/state, where one answers; never prompts, answers or keys.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from app.check_config import rows
from app.config import Config
from app.config_sources import Loaded
from app.remote import NoServer, Remote, ServerRefuses

HIDDEN = "(hidden)"
SECRET = re.compile(r"(^|_)(api_keys?|key|keys|password|secret|token)$")
USER_OF_URL = re.compile(r"(\w+://)[^/@\s]+@")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "neon", "asimd", "bf16")
STATE = ("model", "exact", "alive", "draining", "context", "block_size", "kv_blocks", "running", "waiting",
         "preemptions", "tiers", "policies")  # fmt: skip


def collect_env(loaded: Loaded, remote: Remote) -> int:
    for title, lines in (
        ("Sluice", _versions()),
        ("Machine", _machine()),
        ("Configuration (what differs from the defaults)", _configuration(loaded)),
        ("Server", _server(remote)),
    ):
        sys.stdout.write(f"## {title}\n\n")
        sys.stdout.writelines(f"- {_without_home(line)}\n" for line in lines)
        sys.stdout.write("\n")
    return 0


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _versions() -> Iterator[str]:
    yield f"sluice {_version('sluice')}, from {Path(__file__).parents[2]}"
    yield f"Python {sys.version.split()[0]} ({platform.python_implementation()}), {sys.prefix}"
    yield ", ".join(f"{name} {_version(name)}" for name in _packages())


def _packages() -> list[str]:
    """Those that we need, by our own metadata; and what torch brings along for a card."""
    try:
        needed = requires("sluice") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        needed = ["aiohttp", "numpy", "torch"]
    return [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line] + ["triton"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _machine() -> Iterator[str]:
    yield f"{platform.platform()}, {platform.machine()}"
    facts = _cpu()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"CPU {facts.get('model name', platform.processor() or 'unknown')}, {cores} cores for this process"
    yield f"CPU features: {', '.join(flag for flag in FLAGS if flag in flags) or 'none of those looked for'}"
    yield f"memory: {_memory()}"
    yield from _devices()


def _cpu() -> dict[str, str]:
    """Of the first core; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    from app.memory import free_cpu_bytes

    return f"{pages * size / 2**30:.1f} GiB, {free_cpu_bytes() / 2**30:.1f} GiB available"


def _devices() -> Iterator[str]:
    """By torch, which is what serves."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of its own may be missing
        yield f"torch cannot be imported: {error}"
        return
    yield f"torch: {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not built in'}"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.1f} GiB, sm_{found.major}{found.minor}"
    if not torch.cuda.device_count():
        yield "no CUDA device"


def _configuration(loaded: Loaded) -> Iterator[str]:
    usual = {name: value for name, value, _ in rows(Loaded(Config(), loaded.sources))}
    told = [each for each in rows(loaded) if each[1] != usual[each[0]]]
    for name, value, source in told:
        yield f"{name} = {json.dumps(hidden(name, value), default=str)} ({source})"
    if not told:
        yield "nothing"


def hidden(name: str, value: object) -> Any:
    """The value, with everything that may be a secret replaced, however deep."""
    if value and SECRET.search(name.rpartition(".")[2]):
        return HIDDEN
    if isinstance(value, dict):
        return {key: hidden(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [hidden("", each) for each in value]
    return USER_OF_URL.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value


def _server(remote: Remote) -> Iterator[str]:
    try:
        state = remote.one("GET", "/admin/state")
    except (NoServer, ServerRefuses) as error:
        yield hidden("", str(error))
        return
    for name in STATE:
        if name in state:
            yield f"{name}: {json.dumps(state[name])}"
