"""The families that can be served, by the architecture that config.json names."""

from engine.model.family import Family
from engine.model.llama import LLAMA
from engine.model.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, QWEN2)}
