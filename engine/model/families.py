"""The families that can be served, by the architecture that config.json names."""

from engine.model.family import Family
from engine.model.llama import LLAMA
from engine.model.mistral import MISTRAL
from engine.model.phi3 import PHI3
from engine.model.qwen2 import QWEN2
from engine.model.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, PHI3, QWEN2, QWEN3)}
