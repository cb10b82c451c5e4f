"""The key of a block: a chained SHA-256 over all that determines its bytes.

key(block) = H(key(parent) ‖ token ids), and the first parent is H(fingerprint ‖ salt). Equal keys mean equal
token prefixes, computed by the same weights in the same way, for the same tenant. Only full blocks have keys.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

Key = bytes


def root_key(fingerprint: str, salt: str) -> Key:
    """The parent of first blocks. `fingerprint` names all that changes the bytes, `salt` separates tenants."""
    return sha256(b"%d:%b%b" % (len(fingerprint.encode()), fingerprint.encode(), salt.encode())).digest()


def block_key(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of the full block holding `tokens`, after `parent`. Token ids are hashed as 32-bit integers."""
    return sha256(parent + array("I", tokens).tobytes()).digest()


def extend_keys(keys: list[Key], root: Key, tokens: Sequence[int], block_size: int) -> None:
    """Appends to `keys` those of the full blocks of `tokens` that it has not yet."""
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        keys.append(block_key(keys[-1] if keys else root, tokens[start : start + block_size]))
