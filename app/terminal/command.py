"""`sluice chat | ps | collect-env`: what the world gets wrong becomes one message and an exit code.

Exit codes: 0; 2 usage; 3 where no server answers, or it refuses.
"""

import argparse

from app.config_sources import Loaded
from app.outputs import failed
from app.remote import NoServer, Remote, ServerRefuses, url_of

EXIT_NO_SERVER = 3
ANSWER_SECONDS = 600.0
"""A request may wait so long for its turn."""


def run(loaded: Loaded, options: argparse.Namespace) -> int:
    try:
        return COMMANDS[options.command](loaded, options)
    except (NoServer, ServerRefuses) as error:
        return failed(error, EXIT_NO_SERVER)


def _remote(loaded: Loaded, options: argparse.Namespace) -> Remote:
    return Remote(options.url or url_of(loaded.config.server), options.api_key, ANSWER_SECONDS)


def _chat(loaded: Loaded, options: argparse.Namespace) -> int:
    from app.terminal.chat import chat

    return chat(_remote(loaded, options), options)


def _ps(loaded: Loaded, options: argparse.Namespace) -> int:
    from app.terminal.ps import ps

    return ps(_remote(loaded, options), options)


def _collect_env(loaded: Loaded, options: argparse.Namespace) -> int:
    from app.terminal.collect_env import collect_env

    return collect_env(loaded, _remote(loaded, options))


COMMANDS = {"chat": _chat, "ps": _ps, "collect-env": _collect_env}
