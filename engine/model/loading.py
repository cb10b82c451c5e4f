"""From a Hugging Face directory to a model on its device: the parts of this package, composed.

Returns facts for the caller to log; logs nothing itself. The tokenizer is engine/tokenizer.py's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels.protocol import Kernels
from engine.kernels.select import choose_dtype, make_kernels
from engine.model.config import ModelConfig, read_config
from engine.model.decoder import Decoder, ignored_tensors, wanted_tensors
from engine.model.generation import GenerationDefaults, read_generation
from engine.model.weights import Checkpoint, Weights

KernelMaker = Callable[[torch.device, torch.dtype], Kernels]


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Decoder
    config: ModelConfig
    generation: GenerationDefaults
    dtype: torch.dtype
    facts: tuple[str, ...]  # sentences worth a log line: what was converted, what is ignored


def load_model(
    directory: Path, *, device: torch.device, dtype: str = "auto", kernels: KernelMaker = make_kernels
) -> Loaded:
    """Loads a model for serving; ModelError (see errors.py) when it cannot be.

    dtype: "auto", "float32", "bfloat16" or "float16". A weight is read, converted, packed and dropped before
    the next is, so loading needs the packed size plus the largest tensor's.
    """
    config = read_config(directory)
    generation = read_generation(directory, config)
    with torch.inference_mode(), Checkpoint(directory) as checkpoint:
        stored = checkpoint.main_dtype()
        chosen = choose_dtype(dtype, device, stored)
        weights = Weights(
            checkpoint,
            wanted_tensors(config),
            ignored=ignored_tensors(config),
            device=device,
            dtype=chosen.dtype,
        )
        model = Decoder(config, weights, kernels(device, chosen.dtype))
    ignored = [
        f"generation_config.json asks for {field}, which is not supported: ignored"
        for field in generation.ignored
    ]
    return Loaded(model, config, generation, chosen.dtype, (*chosen.facts, *config.facts, *ignored))
