"""What a request wants of the engine, whichever API it came by; and the fields that the APIs share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llamacli.engine.sequence import MAX_SEED, SamplingParams
from llamacli.prompt import Message
from llamacli.server.failure import Failure
from llamacli.server.fields import Fields

MAX_STOPS = 16
MAX_TOP_K = 2**31 - 1

# A JSON object without white space, in which a sampler could lose itself.
JSON_OBJECT = r"""
root ::= object
object ::= "{" (pair ("," pair)*)? "}"
pair ::= string ":" value
value ::= object | "[" (value ("," value)*)? "]" | string | number | "true" | "false" | "null"
string ::= "\"" ([^"\\\x00-\x1f\x7f] | "\\" ["\\/bfnrt])* "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that the model's chat template is put around."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be continued as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids to be continued as they are."""

    tokens: tuple[int, ...]


Source = Conversation | Text | Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Prompts, each of them to be answered `n` times."""

    sources: tuple[Source, ...]
    params: SamplingParams
    n: int = 1
    stream: bool = False


def sampling(fields: Fields, defaults: SamplingParams) -> SamplingParams:
    """The sampling fields that all routes know, over the server's own defaults."""
    given: dict[str, Any] = {
        "max_tokens": fields.integer("max_tokens", 1),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, MAX_TOP_K),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": fields.number("repeat_penalty", 0, 2, is_low_allowed=False),
        "seed": fields.integer("seed", 0, MAX_SEED),
        "stop": fields.texts("stop", MAX_STOPS) or None,
        "ignore_eos": fields.flag("ignore_eos"),
        "grammar": response_grammar(fields.object("response_format")),
    }
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def response_grammar(wanted: Fields | None) -> str | None:
    """The grammar that holds the answer to its response_format; None for plain text."""
    if wanted is None:
        return None
    kind = wanted.choice("type", "text", "json_object", "json_schema")
    if kind is None:
        wanted.refuse("type", "text or json_object")
    if kind == "json_schema":
        raise Failure(400, "response_format json_schema is not supported; json_object is", param="response_format")
    return JSON_OBJECT if kind == "json_object" else None
