"""How a verification of the disk tier is told, by the server and by the command line alike."""

from typing import Any

from kvstore.disk import Verification

NAMED = 1000
"""Lost records that are named, at most."""


def summary(found: Verification) -> dict[str, Any]:
    """`records`: how many were read. `corrupt`: how many of these cannot be used; `lost`: which, and why."""
    lost = [{"key": key.hex(), "reason": loss.value} for key, loss in found.lost[:NAMED]]
    return {"records": found.records, "corrupt": len(found.lost), "lost": lost}
