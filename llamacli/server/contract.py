"""The Llama 2 API: POST {"prompt": ...}, answered under "response". Fields, answers and stream events.

Knows the shape of the hosted API and nothing of sockets or of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llamacli.engine.sequence import Delta, SamplingParams
from llamacli.prompt import Message
from llamacli.server.answer import Answer, wire
from llamacli.server.ask import Ask, Conversation, sampling
from llamacli.server.exchange import DONE, event
from llamacli.server.failure import Failure
from llamacli.server.fields import parse

PATHS = ("/v1/getData", "/llama-2/v1/getData", "/")
SYSTEM_NAMES = ("system prompt", "system_prompt", "system")


@dataclass(frozen=True, slots=True)
class Request:
    """`ignored` are the fields that mean nothing here."""

    ask: Ask
    ignored: tuple[str, ...]


def read(raw: bytes, defaults: SamplingParams) -> Request:
    """The request in a body. Raises Failure 400."""
    fields = parse(raw)
    prompt = fields.text("prompt")
    if prompt is None:
        raise Failure(400, 'prompt is missing: send a JSON object such as {"prompt": "Tell me about llama2"}')
    if not prompt.strip():
        raise Failure(400, "prompt is empty: say what the model should answer")
    given = [name for name in SYSTEM_NAMES if fields.has(name)]
    if len(given) > 1:
        raise Failure(400, f'the system prompt is given twice, as "{given[0]}" and as "{given[1]}": leave one out')
    systems = [fields.text(name) for name in SYSTEM_NAMES]
    system = next((text for text in systems if text), None)
    messages = [Message("system", system)] if system else []
    ask = Ask(
        sources=(Conversation((*messages, Message("user", prompt))),),
        params=sampling(fields, defaults),
        stream=bool(fields.flag("stream")),
    )
    return Request(ask, tuple(fields.unknown))


@dataclass(frozen=True, slots=True)
class ContractShape:
    """Writes the answer to one request."""

    model: str
    trace_id: str
    ignored: tuple[str, ...] = ()

    def whole(self, answers: Sequence[Answer]) -> bytes:
        answer = answers[0]
        head: dict[str, object] = {"status": 200, "content-type": "application/json", "response": answer.text}
        return _json(head | self._end(answer)).encode()

    def opening(self) -> bytes:
        return b""

    def piece(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        text = "".join(delta.text for delta in deltas)
        if answer.finish_reason is not None:
            return event(_json({"response": text} | self._end(answer)))
        return event(_json({"response": text})) if text else b""

    def closing(self, answers: Sequence[Answer]) -> bytes:
        return DONE

    def _end(self, answer: Answer) -> dict[str, object]:
        assert answer.usage is not None
        end: dict[str, object] = {
            "model": self.model,
            "finish_reason": wire(answer.finish_reason),
            "usage": {
                "prompt_tokens": answer.usage.prompt_tokens,
                "completion_tokens": answer.usage.completion_tokens,
                "total_tokens": answer.usage.prompt_tokens + answer.usage.completion_tokens,
            },
            "traceId": self.trace_id,
        }
        return end | {"ignored": list(self.ignored)} if self.ignored else end


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
