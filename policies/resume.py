"""How a preempted sequence comes back."""

RELOAD = "reload"
"""What is on the device but not in the store yet is saved first, the partial tail block too; then it is loaded.

What the store lost meanwhile, or had no room for, is computed again.
"""

RECOMPUTE = "recompute"
"""Nothing is saved, and only what the device still caches is used again. Source: vLLM's and SGLang's only way."""

RESUMES: tuple[str, ...] = (RELOAD, RECOMPUTE)
