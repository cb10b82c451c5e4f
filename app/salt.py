"""Which tenant and session a request is of, and the salt of its block keys: equal salts find each other's prefixes,
others never do.

A tenant is the API key that came with the request: one of `server.keys_file`, or without that any, so that whoever
invents one is a tenant of his own (app/guard.py sends others away). The key itself goes no further than here: keys of
blocks, `api_keys` of the configuration, logs and recordings have its hash, SHA-256 of "bearer KEY" in hexadecimal.
`printf %s 'bearer KEY' | sha256sum` makes the same.
"""

from collections.abc import Mapping
from hashlib import sha256


def salt_of(headers: Mapping[str, str], cache_salt: str | None, *, share_across_keys: bool) -> str:
    """`<hash of the API key, or nothing>/<the request's own cache_salt>`: the first slash parts them.

    The same after a restart. share_across_keys: the API key counts for nothing, `cache_salt` does.
    """
    tenant = "" if share_across_keys else tenant_of(headers)
    return f"{tenant}/{cache_salt or ''}"


def session_of(tenant: str, session_id: str | None) -> str:
    """One name a tenant and session, so that equal `session_id`s of two tenants are two; "": of none."""
    return f"{tenant}/{session_id}" if session_id else ""


def tenant_of(headers: Mapping[str, str]) -> str:
    """Hexadecimal, or "" for nobody. Credentials of another scheme than Bearer are another tenant."""
    scheme, _, credentials = headers.get("Authorization", "").strip().partition(" ")
    if not credentials:
        return ""
    name = f"{scheme.lower()} {credentials.strip()}"
    return sha256(
        name.encode(errors="surrogateescape")
    ).hexdigest()  # as aiohttp decodes bytes that are no text
