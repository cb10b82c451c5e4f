"""File descriptors for all connections that a server may have."""

import resource

OTHERS = 256
"""Descriptors beside connections: files, pipes, LMDB, libraries."""


def reserve(connections: int) -> int:
    """Raises this process's soft limit, if need be. Returns for how many connections it is enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = connections + OTHERS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(connections, soft - OTHERS))
