"""A running server as the command line sees it: JSON over HTTP, with the standard library alone."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from app.config import ServerSection
from app.credentials import API_KEY, authorization

TIMEOUT_SECONDS = 60.0
"""Without a byte from the server."""

HINT = "is it running (sluice serve), and there (--url, server.host, server.port)?"


class NoServer(Exception):
    """Nobody answers there, or nobody who speaks as Sluice does."""


class ServerRefuses(Exception):
    """The server's error, in its own words."""


def url_of(server: ServerSection) -> str:
    """Where a server of this configuration is reached from this machine."""
    host = _reached_at(server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


def _reached_at(host: str) -> str:
    """Who listens on all addresses is reached at this machine's own."""
    try:
        address = ip_address(host)
    except ValueError:
        return host  # a name
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


class Remote:
    """`api_key`: "" is the environment's. Every method raises NoServer or ServerRefuses, the constructor NoServer."""

    def __init__(self, url: str, api_key: str = "", timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        if not url.startswith(("http://", "https://")):
            raise NoServer(f"{url!r} is no URL: it begins with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1")
        key = authorization({API_KEY: api_key} if api_key else os.environ)
        self._headers = {"Content-Type": "application/json"} | key
        self._timeout_seconds = timeout_seconds
        self._opener: OpenerDirector = build_opener(ProxyHandler({}))  # what is here needs no proxy

    def one(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """The answer's one JSON object, whatever its lines."""
        with self._opened(method, path, body) as answer:
            return parsed(answer.read(), self.url)

    def lines(self, method: str, path: str, body: object = None) -> Iterator[bytes]:
        """The answer's lines, as they come. A generator that is closed hangs up."""
        with self._opened(method, path, body) as answer:
            yield from answer

    @contextmanager
    def _opened(self, method: str, path: str, body: object) -> Iterator[HTTPResponse]:
        request = Request(  # noqa: S310 (the constructor lets http and https alone pass)
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers=self._headers,
            method=method,
        )
        try:
            with self._opener.open(request, timeout=self._timeout_seconds) as answer:
                yield answer
        except HTTPError as error:
            raise ServerRefuses(_message(error, self.url)) from error
        except (URLError, OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise NoServer(f"no server answers at {self.url}: {reason}; {HINT}") from error


def parsed(text: bytes, url: str) -> dict[str, Any]:
    """Raises NoServer."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise NoServer(f"what answers at {url} is not Sluice") from error
    if not isinstance(found, dict):
        raise NoServer(f"what answers at {url} is not Sluice")
    return found


def _message(error: HTTPError, url: str) -> str:
    """The server's own words. Raises NoServer where they are not an OpenAI error object."""
    found = parsed(error.read(), url).get("error")
    if not isinstance(found, dict) or "message" not in found:
        raise NoServer(f"what answers at {url} is not Sluice") from error
    return str(found["message"])
