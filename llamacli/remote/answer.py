"""What a server says in the Llama 2 API or in OpenAI's: the pieces of an answer, how it ended, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llamacli.errors import RemoteError
from llamacli.remote.events import events
from llamacli.remote.post import Reply

EVENTS = "text/event-stream"
MAX_MESSAGE = 500  # characters of a server's own words
DONE = "[DONE]"


@dataclass(slots=True)
class Ending:
    """What a server has told about its answer so far; None where it has not. The counts are tokens."""

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    model: str | None = None

    @property
    def usage(self) -> dict[str, int | None]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
        }


# Takes what there is to know from one JSON object, and returns its text; None if there is no place for one in it.
Reader = Callable[[dict[str, Any], Ending], str | None]


def from_contract(value: dict[str, Any], ending: Ending) -> str | None:
    """The Llama 2 API: a whole answer, or an event of one."""
    _note(ending, value.get("finish_reason"), value.get("usage"), value.get("model"))
    return _text(value.get("response"))


def from_chat(value: dict[str, Any], ending: Ending) -> str | None:
    """A chunk of an OpenAI chat completion."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    _note(ending, choice.get("finish_reason"), value.get("usage"), value.get("model"))
    return _text(delta.get("content")) if isinstance(delta, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _note(ending: Ending, reason: object, usage: object, model: object) -> None:
    if isinstance(reason, str):
        ending.finish_reason = reason
    if isinstance(model, str):
        ending.model = model
    if isinstance(usage, dict):
        details = usage.get("prompt_tokens_details")
        ending.prompt_tokens = _count(usage.get("prompt_tokens"))
        ending.completion_tokens = _count(usage.get("completion_tokens"))
        ending.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def pieces(reply: Reply, read: Reader, ending: Ending, where: str) -> Iterator[str]:
    """The text of an answer as it comes: events, or one JSON object. Raises RemoteError for anything else."""
    if reply.content_type == EVENTS:
        yield from _streamed(reply, read, ending, where)
        return
    value = _parsed(reply.body(), where, reply.content_type)
    text = read(value, ending)
    if text is None:
        raise _error_in(value, where) or RemoteError(f"{where} answered with JSON in which there is no answer")
    yield text


def _streamed(reply: Reply, read: Reader, ending: Ending, where: str) -> Iterator[str]:
    is_done = False
    for data in events(reply.parts()):
        if data.strip() == DONE:
            is_done = True
            break
        value = _parsed(data.encode("utf-8", "replace"), where, "an event")
        text = read(value, ending)
        if text is None and (error := _error_in(value, where)):
            raise error
        if text:
            yield text
    if not is_done and ending.finish_reason is None:
        raise RemoteError(f"{where} broke off in the middle of its answer")


def _parsed(raw: bytes, where: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        shown = "nothing" if not raw.strip() else f"what is not JSON ({what or 'of unknown type'})"
        raise RemoteError(f"{where} answered with {shown}: is the address right?") from None
    if not isinstance(value, dict):
        raise RemoteError(f"{where} answered with JSON in which there is no answer")
    return value


def _error_in(value: dict[str, Any], where: str) -> RemoteError | None:
    """The error that a JSON object tells of, in place of an answer or of its end."""
    message, trace = _said(value)
    if not message:
        return None
    code = value.get("code")
    status = f" ({code})" if isinstance(code, int) else ""
    return RemoteError(f"{where} has failed{status}: {message}{_traced(trace)}")


def refusal(reply: Reply, where: str) -> RemoteError:
    """Why a server gave no answer: its status, its message, its trace id. Reads the body."""
    message, trace = "", ""
    try:
        value = json.loads(reply.body().decode("utf-8-sig"))
    except (RemoteError, ValueError, RecursionError):
        value = None  # a proxy's page, most often: the status says as much
    if isinstance(value, dict):
        message, trace = _said(value)
    message = message or reply.reason[:100] or "no reason given"
    remedies = {401: "; give a key that it knows as --api-key or LLAMACLI_API_KEY", 404: "; is the address right?"}
    wait = reply.retry_after
    remedy = remedies.get(reply.status, "") if wait is None else f"; it asks to wait {wait} s"
    trace = trace or reply.header("x-trace-id")
    return RemoteError(f"{where} answered {reply.status}: {message}{remedy}{_traced(trace)}")


def _said(value: dict[str, Any]) -> tuple[str, str]:
    """Message and trace id of an error in the Llama 2 API's shape, or in OpenAI's."""
    inner = value.get("error")
    told = inner if isinstance(inner, dict) else value
    message = inner if isinstance(inner, str) else told.get("message")
    trace = value.get("traceId")
    shown = " ".join(message.split())[:MAX_MESSAGE] if isinstance(message, str) else ""
    return shown, trace if isinstance(trace, str) else ""


def _traced(trace: str) -> str:
    return f" (trace id {trace[:128]})" if trace else ""
