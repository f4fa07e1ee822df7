"""What a request wants of the engine, whichever API it came by; and the fields that the APIs share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from llamacli.engine.sequence import MAX_SEED, SamplingParams
from llamacli.errors import UsageError
from llamacli.prompt import Message
from llamacli.schema import grammar
from llamacli.server.failure import Failure
from llamacli.server.fields import Fields

TEMPERATURE = (0, 2)
SHARE = (0, 1)  # top_p and min_p
REPEAT_PENALTY = (0, 2)  # 0 itself is refused
MAX_STOPS = 16
MAX_TOP_K = 2**31 - 1
MAX_KEPT = 256  # grammars of schemas that clients send again and again


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
    """Prompts, each of them to be answered `n` times. `is_stored`: what is computed of them may go to the disk."""

    sources: tuple[Source, ...]
    params: SamplingParams
    n: int = 1
    stream: bool = False
    is_stored: bool = True


def sampling(fields: Fields, defaults: SamplingParams) -> SamplingParams:
    """The sampling fields that all routes know, over the server's own defaults."""
    given: dict[str, Any] = {
        "max_tokens": fields.integer("max_tokens", 1),
        "temperature": fields.number("temperature", *TEMPERATURE),
        "top_p": fields.number("top_p", *SHARE),
        "top_k": fields.integer("top_k", 0, MAX_TOP_K),
        "min_p": fields.number("min_p", *SHARE),
        "repeat_penalty": fields.number("repeat_penalty", *REPEAT_PENALTY, is_low_allowed=False),
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
        wanted.refuse("type", "text, json_object or json_schema")
    described = wanted.object("json_schema") if kind == "json_schema" else None
    if kind == "json_schema" and described is None:
        wanted.refuse("json_schema", "an object with the schema")
    if wanted.has("schema"):
        where = wanted.name("schema")
        form = '{"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise Failure(400, f"{where} is not where a schema goes: send {form}", param=where)
    wanted.refuse_unknown()
    if described is not None:
        return _grammar_of(described)
    return grammar.any_object() if kind == "json_object" else None


def _grammar_of(described: Fields) -> str:
    """Raises Failure 400 naming what is not supported of the schema."""
    found = described.take("schema")
    if not isinstance(found, Mapping):
        described.refuse("schema", "a JSON schema")
    for name in ("name", "description"):
        described.text(name)
    described.flag("strict")
    described.refuse_unknown()
    where = described.name("schema")
    try:
        return _compiled(json.dumps(found))
    except UsageError as error:
        raise Failure(400, f"{where}: {error}", param=where) from None
    except RecursionError:
        raise Failure(400, f"{where} is nested too deeply", param=where) from None


@lru_cache(MAX_KEPT)
def _compiled(schema: str) -> str:
    return grammar.to_grammar(json.loads(schema))
