"""A model directory's tokenizer and chat template: text to ids, ids to bytes, messages to a prompt.

Reads tokenizer.json (by the `tokenizers` library), tokenizer_config.json and chat_template.jinja. Not here:
which tokens end a sequence (generation_config.json), text that comes token by token (text.py), how a
template is rendered (chat_template.py).

Threads: every method may be called from any thread. Encoding releases the interpreter lock, so a long text
belongs on a worker thread; rendering and `vocabulary` do not.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate, ChatTemplateError

_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in vocabularies that come from SentencePiece
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = (
    "ByteLevel (GPT-2, Llama 3, Qwen) or Metaspace with or without byte fallback (Llama 2, Mistral, Gemma)"
)
_BYTE_LEVEL = frozenset({"ByteLevel"})
_METASPACED = frozenset({"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"})
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """A model directory's tokenizer is missing, damaged, or of a kind that is not supported."""


class Tokenizer:
    """Immutable once loaded. Ids are those of tokenizer.json; the model's logits may be wider."""

    def __init__(self, source: str, config: Mapping[str, Any], template: str | None) -> None:
        """`source`: tokenizer.json's text; `config`: tokenizer_config.json; `template`: the chat's."""
        self._source = source
        self._tokenizer = _parse(source)
        self._steps = _decoder_steps(json.loads(source).get("decoder"))
        named = {name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None}
        self._template = None if template is None else ChatTemplate(template, named)

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Raises TokenizerError, or ChatTemplateError for a template that does not parse."""
        source, config = _read(model_dir / "tokenizer.json"), _read_config(model_dir)
        try:
            return cls(source, config, _template(model_dir, config))
        except TokenizerError as error:
            raise TokenizerError(f"{model_dir}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Ids of a text. `add_special_tokens`: with what the model wants around it, as a begin of sequence.

        With `allow_special` a special token's text, such as "<|im_end|>", becomes that token; without, it is
        plain text. A rendered chat needs it, and so a message that spells a marker forges one, as in every
        server that follows the Hugging Face templates: where that matters, refuse what `markers_in` finds.
        A chat template writes its own begin of sequence: encode what it gives without `add_special_tokens`.
        """
        tokenizer = self._tokenizer if allow_special else self._literal
        # encode() itself would hold the interpreter lock: 0.4 s for 1 MB of text, measured
        return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text of ids, as `tokenizers` has it. Raises KeyError for an id that is none."""
        size = self.size
        unknown = [token for token in ids if not 0 <= token < size]
        if unknown:
            raise KeyError(f"token id {unknown[0]}: this tokenizer's ids are 0 to {size - 1}")
        return str(self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Text to id of the tokens that are never text: chat markers, begin and end of sequence."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def markers_in(self, text: str) -> tuple[str, ...]:
        """The special tokens that a text spells: what it forges when encoded with `allow_special`."""
        return tuple(marker for marker in self.special_tokens if marker in text)

    def vocabulary(self, size: int | None = None) -> tuple[bytes, ...]:
        """The bytes of each id, special tokens and gaps empty; filled up to `size`, the width of the logits.

        Joined and decoded, they are the text that follows a prompt: a leading space stays, which `decode` of
        the same ids alone drops for Metaspace vocabularies.
        """
        special = set(self.special_tokens.values())
        pieces = [b""] * max(self.size, size or 0)
        for token, id_ in self._tokenizer.get_vocab(with_added_tokens=True).items():
            pieces[id_] = b"" if id_ in special else _token_bytes(token, self._steps)
        return tuple(pieces)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, to be encoded with add_special_tokens=False. Raises ChatTemplateError.

        Messages, tools and variables are data to the template, never part of it.
        """
        if self._template is None:
            raise ChatTemplateError(
                "this model has no chat template: use /v1/completions with a plain prompt"
            )
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._template.render(messages, **({"documents": None} | variables))

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A second tokenizer, to which special tokens are text: the switch is an object's, not a call's."""
        literal = _parse(self._source)
        literal.encode_special_tokens = True
        return literal


def _parse(source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _decoder_steps(decoder: Mapping[str, Any] | None) -> frozenset[str]:
    """The types of the decoder's steps; refuses what `_token_bytes` cannot say token by token."""
    decoder = decoder or {"type": "null"}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    types = frozenset(str(step.get("type")) for step in steps)
    metaspaced = types <= _METASPACED and types & {"Replace", "Metaspace"} and all(map(_is_understood, steps))
    if types != _BYTE_LEVEL and not metaspaced:
        found = ", ".join(sorted(types))
        raise TokenizerError(f"tokenizer.json's decoder ({found}) is not supported; {_SUPPORTED} is")
    return types


def _is_understood(step: Mapping[str, Any]) -> bool:
    """Whether a step's settings are the usual ones: spaces for U+2581, stripped at the beginning only."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": _METASPACE} and step["content"] == " ")
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["stop"] == 0)
    return True


def _token_bytes(token: str, steps: frozenset[str]) -> bytes:
    if steps == _BYTE_LEVEL:
        raw = [_BYTE_OF_CHARACTER.get(character) for character in token]
        # an added token is written as itself; where all its characters stand for bytes, they mostly are ASCII
        return token.encode() if None in raw else bytes(byte for byte in raw if byte is not None)
    if "ByteFallback" in steps and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes.fromhex(match[1])
    return token.replace(_METASPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable Latin-1 character is its own byte, the other bytes are U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER = _byte_characters()


def _template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """The newer file of its own first, then the config's entry: one template, or a list of named ones."""
    file = model_dir / "chat_template.jinja"
    if file.exists():
        return _read(file)
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        return named.get("default")
    return entry


def _content(token: Any) -> str:
    """A named token: its text, or an object that holds it."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _read_config(model_dir: Path) -> Mapping[str, Any]:
    """tokenizer_config.json; a directory without one has neither named tokens nor a template."""
    file = model_dir / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(_read(file))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file} is not a JSON object")
    return config


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{file} is missing: a model directory in Hugging Face layout has one "
            "(for a SentencePiece tokenizer.model alone, save the tokenizer again with transformers)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from error
