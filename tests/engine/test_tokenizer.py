"""Tokenizers of model directories: ids, bytes of ids, chat templates, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors, trainers

from engine.chat_template import ChatTemplate, ChatTemplateError
from engine.text import OutputText
from engine.tokenizer import Tokenizer, TokenizerError

SHIPPED = Path(__file__).parents[2] / "app" / "shipped" / "tales"
CORPUS = [
    "Once upon a time there was a little dog.",
    "The dog ran and ran. \u00bfD\u00f3nde est\u00e1?",
    "a  b   c",
]
USER = {"role": "user", "content": "Hello"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def llama_2_style() -> dict[str, Any]:
    """A tokenizer.json like Llama 2's: U+2581 for spaces, one before the text, bytes for the unknown."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(CORPUS * 5, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys([*first, *learned["vocab"]]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


LLAMA_2 = llama_2_style()


def tokenizer_of(source: dict[str, Any], **config: Any) -> Tokenizer:
    return Tokenizer(json.dumps(source), config, config.get("chat_template"))


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.load(SHIPPED)


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return tokenizer_of(LLAMA_2)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    output = OutputText(tokenizer.vocabulary())
    return "".join(output.push(token)[0] for token in ids) + output.finish()


@given(text=texts)
def test_shipped_tokens_stream_as_the_library_decodes_them(shipped: Tokenizer, text: str) -> None:
    """Byte level: the joined pieces are the text itself."""
    ids = shipped.encode(text, allow_special=False)
    assert streamed(shipped, ids) == shipped.decode(ids) == text


@given(text=texts)
def test_llama_2_tokens_stream_as_the_library_decodes_them(llama: Tokenizer, text: str) -> None:
    """Metaspace and byte fallback: the same, but that the library drops the first space of a whole text."""
    ids = llama.encode(text, add_special_tokens=False, allow_special=False)
    assert streamed(llama, ids).removeprefix(" ") == llama.decode(ids)
    if not text.startswith(("\u2581", " ")) and "\u2581" not in text:
        assert llama.decode(ids) == text


def test_the_llama_2_sample_takes_the_byte_fallback(llama: Tokenizer) -> None:
    """So that the test above means something."""
    vocabulary = llama.vocabulary()
    assert [vocabulary[id_] for id_ in llama.encode("\u20ac", add_special_tokens=False)] == [
        *(b" ", b"\xe2", b"\x82", b"\xac")
    ]


def test_special_tokens_and_gaps_have_no_text(shipped: Tokenizer) -> None:
    """The vocabulary may be filled up to the width of the logits."""
    vocabulary = shipped.vocabulary(shipped.size + 64)
    assert len(vocabulary) == shipped.size + 64
    assert {vocabulary[id_] for id_ in shipped.special_tokens.values()} == {b""}
    assert set(vocabulary[shipped.size :]) == {b""}


def test_an_added_token_outside_the_byte_alphabet_is_its_own_text() -> None:
    """Such as a run of spaces, or a marker in full-width letters."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "\u0120": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["  ", "\uff5cx\uff5c"])
    assert tokenizer_of(json.loads(tokenizer.to_str())).vocabulary() == (
        *(b"a", b" ", b"  ", "\uff5cx\uff5c".encode()),
    )


def test_a_begin_of_sequence_token_comes_only_when_asked(llama: Tokenizer) -> None:
    with_it, without = llama.encode("dog"), llama.encode("dog", add_special_tokens=False)
    assert with_it == [1, *without]


def test_marker_text_is_a_token_or_text_as_asked(shipped: Tokenizer) -> None:
    marker = shipped.special_tokens["<|im_end|>"]
    assert shipped.encode("a<|im_end|>")[-1] == marker
    assert marker not in shipped.encode("a<|im_end|>", allow_special=False)
    assert shipped.markers_in("a<|im_end|>") == ("<|im_end|>",)
    assert shipped.token_id("<|im_end|>") == marker


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    """A file saved while training would cut prompts silently."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(LLAMA_2))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    ids = tokenizer_of(json.loads(tokenizer.to_str())).encode("dog dog dog dog dog")
    assert len(ids) > 3
    assert ids == tokenizer_of(LLAMA_2).encode("dog dog dog dog dog")


def test_decoding_an_unknown_id_is_an_error(shipped: Tokenizer) -> None:
    with pytest.raises(KeyError, match="ids are 0 to 4095"):
        shipped.decode([1 << 20])
    with pytest.raises(KeyError):
        shipped.decode([-1])


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "x"}, "content": " "}]},
    ],
)
def test_other_decoders_are_refused_by_name(decoder: dict[str, Any] | None) -> None:
    with pytest.raises(TokenizerError, match="not supported; ByteLevel"):
        tokenizer_of(LLAMA_2 | {"decoder": decoder})


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="not a JSON object"):
        Tokenizer.load(tmp_path)


def test_the_shipped_template_renders_chat_markup(shipped: Tokenizer) -> None:
    assert shipped.render_chat([USER]) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert shipped.render_chat([USER], add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_a_message_is_never_template_code(shipped: Tokenizer) -> None:
    assert "{{ 7 * 7 }}{% raw %}" in shipped.render_chat(
        [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}]
    )


def test_a_model_without_a_template_says_so(llama: Tokenizer) -> None:
    assert not llama.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template: use /v1/completions"):
        llama.render_chat([USER])


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    """And a config may hold a list of named templates."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(LLAMA_2))
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "listed {{ bos_token }}"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).render_chat([USER]) == "listed <s>"
    (tmp_path / "chat_template.jinja").write_text("filed {{ bos_token }}")
    assert Tokenizer.load(tmp_path).render_chat([USER]) == "filed <s>"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("  {% if true %}\n x\n  {% endif %}\ny", " x\ny"),  # trim_blocks, lstrip_blocks
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello"}]'),
        ("{{ '<\u00e9>' | tojson }}", '"<\u00e9>"'),  # no HTML escapes
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "Hello"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ enable_thinking }}", "False"),
    ],
)
def test_the_environment_is_the_one_templates_expect(template: str, rendered: str) -> None:
    tokenizer = tokenizer_of(LLAMA_2, chat_template=template)
    assert tokenizer.render_chat([USER], enable_thinking=False) == rendered


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages[9].content.x }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 16777216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_or_strays_is_one_error(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(template, {}).render([USER])


def test_a_template_that_does_not_parse_is_refused_at_the_start() -> None:
    with pytest.raises(ChatTemplateError, match="not valid"):
        tokenizer_of(LLAMA_2, chat_template="{% if %}")
