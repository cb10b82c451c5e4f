"""The rules of the house: who may import whom, every module by itself, no forbidden words in the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "policies": {"policies"},
    "kvstore": {"kvstore", "policies"},
    "engine": {"engine", "kvstore", "policies"},
    "app": {"app", "engine", "kvstore", "policies"},
}
PURE = ["engine/core.py", "engine/scheduler.py", "engine/lifecycle.py", "engine/sequence.py",
        "engine/events.py", "engine/plan.py", "engine/state.py",
        "engine/request.py", "engine/text.py", "kvstore/block.py", "kvstore/device.py",
        "engine/snapshot.py", "engine/waiting.py", "engine/checkpoint.py", "engine/resumption.py",
        "engine/intake.py", "engine/places.py", "engine/policy_set.py", "engine/tenants.py", "engine/timeline.py",
        "engine/valuation.py",
        "kvstore/copies.py", "kvstore/shelf.py", "kvstore/shelves.py", "kvstore/flights.py",
        "kvstore/descent.py", "kvstore/residency.py"]  # fmt: skip
HEAVY = {"torch", "numba", "asyncio", "aiohttp", "time", "transformers", "socket", "threading"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_inwards(package: str) -> None:
    ours = {*MAY_IMPORT, "tests", "bench", "training"}
    for path in modules(package):
        reached = {name.split(".")[0] for name in imports(path)} & ours
        assert reached <= MAY_IMPORT[package], f"{path} imports {reached - MAY_IMPORT[package]}"


def test_policies_need_the_standard_library_only() -> None:
    for path in modules("policies"):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"policies"}
        assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("path", PURE)
def test_the_core_has_no_clock_no_torch_and_no_await(path: str) -> None:
    source = ROOT / path
    assert not {name.split(".")[0] for name in imports(source)} & HEAVY
    tree = ast.parse(source.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def test_the_server_never_imports_transformers_and_nothing_unpickles() -> None:
    for package in MAY_IMPORT:
        for path in modules(package):
            assert not {name.split(".")[0] for name in imports(path)} & {"transformers", "pickle"}, path
            assert "torch.load(" not in path.read_text(), path


def test_each_module_can_be_imported_alone() -> None:
    """One interpreter, none of ours loaded before each module: no cycle hides behind another."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in MAY_IMPORT
        for path in modules(package)
        if path.name != "__init__.py" and not path.name.startswith("triton_") and "cuda" not in path.name
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        f"    for loaded in [m for m in sys.modules if m.split('.')[0] in {set(MAY_IMPORT)!r}]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
