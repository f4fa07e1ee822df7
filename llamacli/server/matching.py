"""Says when two requests are the same question: on one route, with bodies that mean the same.

The order of keys, white space, fields that only repeat a default and the three spellings of the system prompt make no
difference. Knows nothing of answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llamacli.errors import UsageError
from llamacli.server import contract, openai
from llamacli.server.recording import is_deep

GET_DATA = contract.PATHS[0]
SYSTEM = contract.SYSTEM_NAMES[0]
# What a request need not say, on any route. The server's own sampling defaults come on top.
_PLAIN: Mapping[str, object] = {
    "stream": False,
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "ignore_eos": False,
    "echo": False,
    "response_format": {"type": "text"},
    "encoding_format": "float",
}
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
FIELDS = frozenset(
    {
        *_PLAIN,
        *SAMPLING,
        *("prompt", SYSTEM, "model", "messages", "stop", "tools", "tool_choice", "logprobs", "top_logprobs"),
        *("logit_bias", "stream_options", "suffix", "best_of", "modalities", "input", "dimensions"),
    }
)
_SHAPE = "stream"  # never left out: an answer in events is none for a client that wants a whole one


@dataclass(frozen=True, slots=True)
class Question:
    """A request as far as it matters for its answer.

    fields   of its body, in their plainest form; None where the body is no JSON object, or too deep a one
    """

    route: str
    raw: bytes
    fields: Mapping[str, Any] | None

    @property
    def prompt(self) -> str:
        """What the model is asked, as text."""
        if self.fields is None:
            return self.raw.decode("utf-8", "replace")
        for name in ("prompt", "messages", "input"):
            if name in self.fields:
                found = self.fields[name]
                return found if isinstance(found, str) else _dumped(found)
        return ""


@dataclass(frozen=True, slots=True)
class Matcher:
    """defaults   sampling where a request says nothing
    match_on   the fields that count; None: all of them
    """

    defaults: Mapping[str, object]
    match_on: frozenset[str] | None = None

    def question(self, path: str, raw: bytes) -> Question:
        try:
            value = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            value = None
        route = route_of(path)
        fields = self._plain(route, value) if isinstance(value, dict) and not is_deep(value) else None
        return Question(route, raw, fields)

    def key(self, question: Question) -> str | bytes:
        """Equal for questions that match."""
        if question.fields is None:
            return question.route.encode() + b"\n" + question.raw
        wanted = self.match_on
        counted = {name: value for name, value in question.fields.items() if wanted is None or name in wanted}
        return f"{question.route}\n{_dumped(counted)}"

    def differing(self, one: Question, other: Question) -> list[str]:
        """Names of the fields that keep two questions on one route from matching."""
        a, b = one.fields, other.fields
        if a is None or b is None:
            return ["the body"]
        names = [name for name in {**a, **b} if self.match_on is None or name in self.match_on]
        return [name for name in names if _dumped(a.get(name)) != _dumped(b.get(name))]

    def _plain(self, route: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        plain = {_name(route, name): value for name, value in fields.items() if value is not None}
        if route != GET_DATA:
            plain = {name: value for name, value in plain.items() if name not in openai.WITHOUT_EFFECT}
        if isinstance(plain.get("stop"), str):
            plain["stop"] = [plain["stop"]]
        if plain.get(SYSTEM) == "":
            del plain[SYSTEM]
        assumed = {**_PLAIN, **self.defaults}
        return {
            name: value
            for name, value in plain.items()
            if name not in assumed or _dumped(value) != _dumped(assumed[name])
        }


def route_of(path: str) -> str:
    """One name for the three addresses of the Llama 2 API; any other path is its own."""
    return GET_DATA if path in contract.PATHS else path


def chosen(names: Iterable[str]) -> frozenset[str] | None:
    """What --match-on chooses: None for nothing in particular. Raises UsageError for a field that no route knows."""
    wanted = [name.strip() for each in names for name in each.split(",")]
    if not wanted:
        return None
    plain = [_name(GET_DATA, name) for name in wanted]
    for name in plain:
        if name not in FIELDS:
            raise UsageError(f"--match-on {name[:50]!r} is no field of a request: {', '.join(sorted(FIELDS))}")
    return frozenset({*plain, _SHAPE})


def _name(route: str, name: str) -> str:
    if route == GET_DATA and name in contract.SYSTEM_NAMES:
        return SYSTEM
    return "max_tokens" if route != GET_DATA and name == "max_completion_tokens" else name


def _dumped(value: object) -> str:
    return json.dumps(_evened(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _evened(value: object) -> object:
    """1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _evened(each) for name, each in value.items()}
    return [_evened(each) for each in value] if isinstance(value, list) else value
