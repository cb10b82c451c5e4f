"""Train the byte-level BPE tokenizer and lay out the model folder, with random weights to begin with.

python -m training.tokenizer DATA --out app/shipped/tales
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from training import corpus
from training.model import Llama, Shape, hf_config

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, IM_START, IM_END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn ``vocabulary`` entries: the special tokens, all 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config(context: int) -> dict[str, object]:
    """The contents of ``tokenizer_config.json``."""
    return {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": context,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def generation_config(eos: list[int]) -> dict[str, object]:
    """The contents of ``generation_config.json``."""
    return {
        "do_sample": True,
        "eos_token_id": eos,
        "pad_token_id": SPECIAL.index(END_OF_TEXT),
        "temperature": 0.8,
        "top_p": 0.95,
    }


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write indented JSON, replacing the file in one step."""
    replace(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Put ``content`` in place of the file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def export(model: Llama, out: Path) -> None:
    """Write the weights in bfloat16 to ``out/model.safetensors``, replacing the file in one step."""
    stored = model.state_dict().items()
    weights = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in stored}
    replace(out / "model.safetensors", save(weights, metadata={"format": "pt"}))


def lay_out(tokenizer: Tokenizer, shape: Shape, out: Path) -> None:
    """Write tokenizer, configurations and random weights."""
    out.mkdir(parents=True, exist_ok=True)
    eos = [SPECIAL.index(IM_END), SPECIAL.index(END_OF_TEXT)]
    replace(out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_json(out / "tokenizer_config.json", tokenizer_config(shape.max_position_embeddings))
    write_json(out / "generation_config.json", generation_config(eos))
    write_json(out / "config.json", hf_config(shape, eos))
    export(Llama(shape), out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the *.jsonl.gz texts")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    arguments = parser.parse_args()
    works, _ = corpus.split(corpus.load(arguments.data))
    texts = corpus.plain_documents(works)
    tokenizer = train_tokenizer(texts, Shape().vocab_size)
    lay_out(tokenizer, Shape(), arguments.out)
    rate = len(texts[-1]) / len(tokenizer.encode(texts[-1]).ids)
    print(f"{tokenizer.get_vocab_size()} entries, {rate:.2f} characters a token")


if __name__ == "__main__":
    main()
