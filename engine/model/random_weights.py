"""Llama directories with random weights, for tests and benchmarks: complete, in the Hugging Face layout.

The weights mean nothing, but their scale is that of a trained model's: activations neither vanish nor explode
and the likeliest token is seldom a tie. The tokenizer is a byte-level BPE whose merges are made up: every id
decodes.
"""

import json
import math
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from engine.model.config import ModelConfig, parse_config
from engine.model.decoder import wanted_tensors

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last three ids
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_config(**sizes: Any) -> dict[str, Any]:
    """A config.json for a small Llama, with `sizes` laid over it; end-of-sequence is the third last id."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
    }
    config |= sizes
    return {"eos_token_id": config["vocab_size"] - len(SPECIAL)} | config


def write_random_llama(
    path: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    shards: int = 1,
) -> Path:
    """Writes configs, weights in `shards` files and a tokenizer into the directory `path`, made if need be.

    tokenizer: a tokenizer.json to copy in place of a made-up one. Returns `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    parsed = parse_config(config)
    stored = config | {
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(stored, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": config.get("eos_token_id")}))
    _write_weights(path, random_tensors(parsed, seed, dtype), shards)
    _write_tokenizer(path, parsed.vocab_size, tokenizer)
    return path


def random_tensors(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; the same for the same config and seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator).to(dtype) for name, shape in wanted_tensors(config).items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return noise.mul_(0.1).add_(1.0)
    return noise.mul_(0.1 if name.endswith(".bias") else 1.0 / math.sqrt(shape[-1]))


def _write_weights(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(path: Path, vocab_size: int, source: Path | None) -> None:
    if source is not None:
        (path / "tokenizer.json").write_bytes(source.read_bytes())
    else:
        _made_up_tokenizer(vocab_size).save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, then as many merges as the vocabulary takes, then the special tokens at its end."""
    room = vocab_size - len(SPECIAL)
    alphabet = sorted(ByteLevel.alphabet())[:room]
    merges = list(islice(_merges(alphabet), room - len(alphabet)))
    words = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs, then all triples: as many as anyone's vocabulary."""
    pairs = product(alphabet, alphabet)
    return chain(pairs, ((left + middle, right) for left, middle, right in product(alphabet, repeat=3)))
