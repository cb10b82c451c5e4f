"""The Llama family (Llama 2 and 3, TinyLlama, SmolLM): the plainest decoder, with biases where a config asks."""

from engine.model.family import Family, Traits
from engine.model.reading import Fields


def traits(fields: Fields, layers: int) -> Traits:
    if fields.has("sliding_window"):
        fields.refuse("sliding_window", "attention over the whole context, as transformers' Llama has")
    bias = fields.flag("attention_bias", False)
    return Traits(qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


LLAMA = Family("LlamaForCausalLM", traits, max_positions=2048)
