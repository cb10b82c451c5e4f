"""Which `Host` a request may name. Against DNS rebinding: a web page elsewhere whose name suddenly means this machine.

Such a page can only ever send its own name, so addresses are always taken, and names only when they are known here.
"""

import ipaddress
from collections.abc import Collection

ANY = "*"
LOCAL = "localhost"


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether who listens on `host` is reached from this machine only."""
    if is_address(host):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == LOCAL


def may_name(said: str | None, own: str, allowed: Collection[str]) -> bool:
    """`said`: the header, perhaps with a port; None: it was not sent, which no browser does."""
    if said is None or ANY in allowed:
        return True
    name = _name(said)
    if is_address(name):
        return True
    return name in {LOCAL, own.lower(), *(each.lower() for each in allowed)}


def _name(said: str) -> str:
    """Without port, brackets and a last dot, in lower case."""
    said = said.strip().lower()
    if said.startswith("["):
        return said[1:].partition("]")[0]
    return said.partition(":")[0].removesuffix(".")
