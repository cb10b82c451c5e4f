"""The KV store of a running server, as `sluice cache` sees it: `/admin/cache/…` over HTTP."""

import json
import os
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from app.config import ServerSection
from app.credentials import authorization

TIMEOUT_SECONDS = 60.0
"""Without a byte from the server."""

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 (where to reach who listens so)


class NoServer(Exception):
    """Nobody answers there, or nobody who speaks as Sluice does."""


class ServerRefuses(Exception):
    """The server's error, in its own words."""


def url_of(server: ServerSection) -> str:
    """Where a server of this configuration is reached from this machine."""
    host = ANYWHERE.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


class ServerCache:
    """Every method raises NoServer or ServerRefuses."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise NoServer(f"{url!r} is no URL: it begins with http:// or https://")
        self._url = url.rstrip("/")
        self._opener: OpenerDirector = build_opener(ProxyHandler({}))  # what is here needs no proxy

    def stat(self) -> dict[str, Any]:
        return self._one("GET", "stat")

    def prune(self, tier: str, size: int) -> dict[str, Any]:
        return self._one("POST", "prune", {"tier": tier, "bytes": size})

    def clear(self, tier: str) -> dict[str, Any]:
        return self._one("POST", "clear", {"tier": tier})

    def verify(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """The last line of the answer; `progress` gets the others."""
        for line in self._lines("POST", "verify"):
            if "error" in line:
                raise ServerRefuses(str(line["error"]["message"]))
            if "records" in line:
                return line
            progress(line["checked"], line["total"])
        raise NoServer(f"{self._url} has broken off")

    def close(self) -> None:
        """Nothing is kept open."""

    def _one(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return next(self._lines(method, path, body))

    def _lines(self, method: str, path: str, body: object = None) -> Iterator[dict[str, Any]]:
        """The JSON objects of an answer, a line each, as they come."""
        try:
            with self._open(method, path, body) as answer:
                for line in answer:
                    yield _parsed(line, self._url)
        except HTTPError as error:
            raise ServerRefuses(_message(error, self._url)) from error
        except (URLError, OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise NoServer(f"no server answers at {self._url}: {reason}") from error

    def _open(self, method: str, path: str, body: object) -> HTTPResponse:
        request = Request(  # noqa: S310 (the scheme was looked at)
            f"{self._url}/admin/cache/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | authorization(os.environ),
            method=method,
        )
        answer: HTTPResponse = self._opener.open(request, timeout=TIMEOUT_SECONDS)
        return answer


def _parsed(line: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise NoServer(f"what answers at {url} is not Sluice") from error
    if not isinstance(found, dict):
        raise NoServer(f"what answers at {url} is not Sluice")
    return found


def _message(error: HTTPError, url: str) -> str:
    """Sluice's own words. Raises NoServer where they are not."""
    found = _parsed(error.read(), url).get("error")
    if not isinstance(found, dict) or "message" not in found:
        raise NoServer(f"what answers at {url} is not Sluice") from error
    return str(found["message"])
