"""The Qwen2 family (Qwen 2 and 2.5, dense): Llama with biases of q, k and v.

A window only where `use_sliding_window` says so, and then in the upper layers alone.
"""

from engine.model.family import Family, Traits, window, windows_by_type
from engine.model.reading import Fields


def windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """As Qwen2 and Qwen3 have them; a `sliding_window` that is not used counts for nothing."""
    used = fields.flag("use_sliding_window", False)
    positions = window(fields, 4096) if used else 0
    return windows_by_type(fields, positions, layers, first=fields.whole("max_window_layers", 28, least=0))


def traits(fields: Fields, layers: int) -> Traits:
    return Traits(qkv_bias=True, windows=windows(fields, layers))


QWEN2 = Family("Qwen2ForCausalLM", traits, max_positions=32768, kv_heads=32)
