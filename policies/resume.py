"""How a preempted sequence comes back. One way so far: the KV is computed again."""

RESUMES: tuple[str, ...] = ("recompute",)
