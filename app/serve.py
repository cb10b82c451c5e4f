"""`sluice serve`: from a configuration to an exit code. What the world gets wrong becomes one message."""

import socket
import sys
from signal import SIGINT, SIGTERM

from app.config import Config
from app.listening import CannotListen, bind
from app.logging import logging_to
from app.outputs import failed
from app.signals import ending_at_once

EXIT_CANNOT_START = 2
BEFORE_READY = {SIGTERM: 0, SIGINT: 130}
"""Exit codes. Nothing is lost then, so nothing is waited for."""


def serve(config: Config) -> int:
    try:
        listener = bind(config.server.host, config.server.port)
    except CannotListen as error:
        return failed(error, EXIT_CANNOT_START)
    with listener, logging_to(sys.stderr, config.log):
        return _load_and_run(config, listener)


def _load_and_run(config: Config, listener: socket.socket) -> int:
    with ending_at_once(BEFORE_READY):
        from app.compose import CANNOT_START, load
        from app.process import run

        try:
            parts = load(config)
        except CANNOT_START as error:
            return failed(error, EXIT_CANNOT_START)
    return run(parts, listener)
