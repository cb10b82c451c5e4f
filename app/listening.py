"""The server's socket, bound before the model is loaded: a port that is taken is known at once."""

import errno
import socket


class CannotListen(Exception):
    """The address cannot be had."""


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet. Raises CannotListen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"server.host = {host!r} is no address of this machine: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise CannotListen(_explained(error, host, port)) from error
    return listener


def _explained(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        hint = "stop what listens there, or use --set server.port=N (0: any free one)"
        return f"port {port} on {host} is taken; {hint}"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has; use one from 1024 up"
    return f"cannot listen on {host}:{port}: {error.strerror}"
