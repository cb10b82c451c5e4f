"""The Phi-3 family (Phi-3, Phi-3.5 mini and medium, Phi-4): Llama whose checkpoints hold fused tensors.

Its long variants' `longrope` is served up to the first context alone (rope.py says why). Where only a part of each head
is rotated (Phi-4 mini), the model is refused.
"""

from engine.model.family import Family, Traits, all_or_nothing, window
from engine.model.reading import Fields


def traits(fields: Fields, layers: int) -> Traits:
    return Traits(fused=True, windows=all_or_nothing(window(fields, 0), layers))


PHI3 = Family(
    "Phi3ForCausalLM",
    traits,
    max_positions=4096,
    norm_eps=1e-5,
    original_positions=4096,
    rope_aliases={"su": "longrope", "yarn": "longrope"},  # the names of earlier releases
)
