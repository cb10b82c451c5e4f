"""The KV store of a running server, as `sluice cache` sees it: `/admin/cache/…` over HTTP (app/remote.py)."""

from collections.abc import Callable
from typing import Any

from app.remote import NoServer, Remote, ServerRefuses, parsed


class ServerCache:
    """Every method raises NoServer or ServerRefuses."""

    def __init__(self, url: str) -> None:
        self._remote = Remote(url)

    def stat(self) -> dict[str, Any]:
        return self._remote.one("GET", "/admin/cache/stat")

    def prune(self, tier: str, size: int) -> dict[str, Any]:
        return self._remote.one("POST", "/admin/cache/prune", {"tier": tier, "bytes": size})

    def clear(self, tier: str) -> dict[str, Any]:
        return self._remote.one("POST", "/admin/cache/clear", {"tier": tier})

    def verify(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """The last line of the answer; `progress` gets the others."""
        for text in self._remote.lines("POST", "/admin/cache/verify"):
            line = parsed(text, self._remote.url)
            if "error" in line:
                raise ServerRefuses(str(line["error"]["message"]))
            if "records" in line:
                return line
            progress(line["checked"], line["total"])
        raise NoServer(f"{self._remote.url} has broken off")

    def close(self) -> None:
        """Nothing is kept open."""
