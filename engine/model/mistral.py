"""The Mistral family (7B, Nemo, Small as a text model): Llama with a window in every layer, unless it is null.

A config that does not mention the window means one of 4,096 positions, as transformers takes it.
"""

from engine.model.family import Family, Traits, all_or_nothing, window
from engine.model.reading import Fields


def traits(fields: Fields, layers: int) -> Traits:
    if fields.has("layer_types"):
        fields.refuse("layer_types", "one window for all layers")
    return Traits(windows=all_or_nothing(window(fields, 4096), layers))


MISTRAL = Family("MistralForCausalLM", traits, max_positions=131072, kv_heads=8)
