"""Policies that are not ours: loaded by dotted path `package.module:name` from the configuration, at start only.

A plug-in is what its family's built-in ones are (policies/ has the protocols, docs/policies.md an example): a function,
an object, or a class, of which one object is made without parameters. Here it is found and looked at once; what it
answers later is watched in engine/policy_set.py.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from app.config import PoliciesSection

METHODS = {"prediction": ("remaining", "quantile", "observe")}
"""What a plug-in must have; of the other families, it must be callable."""


class PluginError(Exception):
    """A plug-in cannot be used; says which, and why."""


def is_path(name: str) -> bool:
    return ":" in name


def load_plugins(policies: PoliciesSection) -> dict[str, dict[str, Any]]:
    """By family and dotted path: those in force and those of `[policies.also]`. Raises PluginError."""
    return {
        family: {path: load_plugin(family, path) for path in _paths(policies, family)}
        for family in type(policies.also).model_fields
    }


def _paths(policies: PoliciesSection, family: str) -> Iterable[str]:
    named = (getattr(policies, family), *getattr(policies.also, family))
    return dict.fromkeys(name for name in named if is_path(name))


def load_plugin(family: str, path: str) -> Any:
    """One object. Raises PluginError."""
    where = f"the {family} policy {path!r}"
    module_name, _, name = path.partition(":")
    module = _module(module_name, where)
    if not hasattr(module, name):
        raise PluginError(f"{where} cannot be loaded: module {module_name} has no {name!r}")
    plugin = _made(getattr(module, name), where)
    lacking = [method for method in METHODS.get(family, ()) if not callable(getattr(plugin, method, None))]
    if lacking:
        raise PluginError(f"{where} cannot be used: it has no method {lacking[0]!r}")
    if family not in METHODS and not callable(plugin):
        raise PluginError(f"{where} cannot be used: it cannot be called")
    return plugin


def _module(name: str, where: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise PluginError(
                f"{where} cannot be loaded: Python finds no module {error.name}; "
                "install it, or put its directory on PYTHONPATH"
            ) from error
        raise PluginError(f"{where} cannot be loaded: {error}") from error
    except Exception as error:  # whatever its first lines raise
        raise PluginError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error


def _made(plugin: Any, where: str) -> Any:
    if not isinstance(plugin, type):
        return plugin
    try:
        return plugin()
    except Exception as error:  # whatever its constructor raises
        raise PluginError(
            f"{where} cannot be made without parameters: {type(error).__name__}: {error}"
        ) from error
