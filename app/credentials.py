"""The API key with which commands speak to a running server: from the environment, so that no process list shows it."""

from collections.abc import Mapping

API_KEY = "SLUICE_API_KEY"


def authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """Headers; none without a key."""
    key = environment.get(API_KEY, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}
