"""The Qwen3 family (dense): Llama whose q and k are RMS-normed head by head, of a head size of its own.

Biases and windows as its config says; Qwen3's mixtures of experts are another architecture, which is not served.
"""

from engine.model.family import Family, Traits
from engine.model.qwen2 import windows
from engine.model.reading import Fields


def traits(fields: Fields, layers: int) -> Traits:
    bias = fields.flag("attention_bias", False)
    return Traits(qkv_bias=bias, out_bias=bias, head_norm=True, windows=windows(fields, layers))


QWEN3 = Family("Qwen3ForCausalLM", traits, max_positions=32768, kv_heads=32, head_dim=128)
