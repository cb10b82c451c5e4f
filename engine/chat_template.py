"""A model's chat template, rendered in a sandbox.

The template is the model directory's and is trusted only that far: it may compute, not reach Python.
Messages are a client's: data to it, never template code. The environment is the one that Hugging Face
templates expect.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_CHARACTERS = 1 << 24  # of one prompt: a template that writes more has gone astray


class ChatTemplateError(Exception):
    """A chat cannot be rendered: the template refuses these messages, is wrong itself, or there is none."""


class ChatTemplate:
    """Compiled once; `render` may be called from any thread."""

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """`named_tokens`: bos_token, eos_token …, by which templates write them."""
        self._named_tokens = dict(named_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt's text. `variables`: tools, add_generation_prompt, documents and what else it knows.

        Raises ChatTemplateError, whatever the template stumbled over: its code meets data of any shape.
        """
        pieces, length = [], 0
        try:
            for piece in self._template.generate(self._named_tokens | variables, messages=messages):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    raise ChatTemplateError(f"the chat template wrote more than {_MAX_CHARACTERS} characters")
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        return "".join(pieces)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, a mark for training, renders as what stands inside."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja's own filter, which escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """The local date, which some templates write into the system prompt: such prompts change every day."""
    return datetime.now().strftime(pattern)
