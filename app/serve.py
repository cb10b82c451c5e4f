"""`sluice serve`: from a configuration to an exit code. What the world gets wrong becomes one message."""

import socket
import sys

from app.config import Config
from app.listening import CannotListen, bind
from app.logging import logging_to

EXIT_CANNOT_START = 2
EXIT_INTERRUPTED = 130


def serve(config: Config) -> int:
    try:
        listener = bind(config.server.host, config.server.port)
    except CannotListen as error:
        return _cannot_start(error)
    with listener, logging_to(sys.stderr, config.log):
        return _load_and_run(config, listener)


def _load_and_run(config: Config, listener: socket.socket) -> int:
    from app.compose import CANNOT_START, load

    try:
        parts = load(config)
    except CANNOT_START as error:
        return _cannot_start(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    from app.process import run

    return run(parts, listener)


def _cannot_start(error: BaseException) -> int:
    sys.stderr.write(f"sluice: {error}\n")
    return EXIT_CANNOT_START
