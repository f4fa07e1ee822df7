"""What a line asks, and the line that answers it: our own form, or the one of OpenAI's batches.

Reference: https://platform.openai.com/docs/guides/batch. Nothing here knows the engine or a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llamacli.batch.lines import Line
from llamacli.batch.template import Template
from llamacli.engine.sequence import MAX_SEED, FinishReason, SamplingParams, draw_seed
from llamacli.errors import EngineError, LlamacliError, UsageError
from llamacli.prompt import Message
from llamacli.schema import form as forms
from llamacli.schema import reading
from llamacli.schema.form import Form
from llamacli.server import failure, openai
from llamacli.server.answer import Answer, wire
from llamacli.server.ask import Conversation, Source, sampling
from llamacli.server.failure import Failure
from llamacli.server.fields import Fields
from llamacli.server.openai import Piece

CUT = 3  # `run` exits with it: the context ended the answer
_SYSTEMS = ("system", "system prompt", "system_prompt")
_URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What counts for a line that says nothing else. With a template the line's values are its own and no settings."""

    params: SamplingParams
    system: str | None = None
    form: Form | None = None
    template: Template | None = None
    model: str = ""


class Shape(Protocol):
    """How a line is answered."""

    def answered(self, answers: Sequence[Answer], added: str, piece: Piece) -> dict[str, Any]:
        """`added` is what closed an answer with a form, and is not the model's."""

    def failed(self, error: LlamacliError) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A line with what it asks: each source is answered once for each of its params. Or why it cannot be asked."""

    line: Line
    shape: Shape
    sources: tuple[Source, ...] = ()
    params: tuple[SamplingParams, ...] = ()
    form: Form | None = None
    problem: LlamacliError | None = None


def id_of(line: Line) -> Any:
    """What the answer to a line is called: its own name for itself, or else its number."""
    if line.values is None:
        return None
    own = line.values.get("custom_id", line.values.get("id"))
    return line.number if own is None else own


def job(line: Line, defaults: Defaults) -> Job:
    """Never raises: a line that asks for what cannot be had is answered with an error."""
    values = line.values
    if values is None:
        return Job(line, Plain(line, None), problem=UsageError(f"line {line.number:,}: {line.problem}"))
    is_openai = defaults.template is None and ("custom_id" in values or "body" in values)
    try:
        if is_openai:
            return _of_openai(line, values, defaults)
        return _of_template(line, values, defaults) if defaults.template else _of_fields(line, Fields(values), defaults)
    except (Failure, LlamacliError) as error:
        problem = _at(line, error)
    except Exception as error:  # one strange line is no reason to leave the others without an answer
        problem = UsageError(f"line {line.number:,}: it cannot be read: {type(error).__name__}: {str(error)[:200]}")
    if not is_openai:
        return Job(line, Plain(line, None), problem=problem)
    shape = OpenAi(line, None, str(values.get("url")), defaults.model)
    return Job(line, _Refused(shape.invalid(str(problem))), problem=problem)


def _at(line: Line, error: Failure | LlamacliError) -> LlamacliError:
    """The error with its line."""
    kind = type(error) if isinstance(error, LlamacliError) else UsageError
    return kind(f"line {line.number:,}: {error}")


# -- our own form -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    line: Line
    params: SamplingParams | None
    form: Form | None = None
    metadata: Any = None

    def answered(self, answers: Sequence[Answer], added: str, piece: Piece) -> dict[str, Any]:
        (answer,) = answers
        assert self.params is not None and answer.usage is not None
        text = answer.text.rstrip("\n")
        found = self._head() | {
            "answer": text,
            "finish_reason": wire(answer.finish_reason),
            "usage": {
                "prompt_tokens": answer.usage.prompt_tokens,
                "completion_tokens": answer.usage.completion_tokens,
                "cached_tokens": answer.usage.cached_tokens,
            },
            "seed": self.params.seed,
        }
        if added:
            found["closed_with"] = added
        error = self._error(answer, text)
        return found | {"error": error} if error else found

    def _error(self, answer: Answer, text: str) -> dict[str, Any] | None:
        assert answer.usage is not None
        if answer.finish_reason is FinishReason.FAILED:
            return _error(EngineError("llama.cpp failed in the middle of the answer"))
        if answer.finish_reason is FinishReason.CONTEXT:
            n = answer.usage.prompt_tokens + answer.usage.completion_tokens
            return {"code": CUT, "message": f"the answer was cut: prompt and answer have filled {n:,} tokens"}
        try:
            if self.form is not None:
                self.form.check(text)
        except LlamacliError as error:
            return _error(error)
        return None

    def failed(self, error: LlamacliError) -> dict[str, Any]:
        return self._head() | {"line": self.line.number, "error": _error(error)}

    def _head(self) -> dict[str, Any]:
        head = {"id": id_of(self.line)}
        return head if self.metadata is None else head | {"metadata": self.metadata}


def _error(error: LlamacliError) -> dict[str, Any]:
    return {"code": error.exit_code, "message": str(error)}


def _of_template(line: Line, values: Mapping[str, Any], defaults: Defaults) -> Job:
    assert defaults.template is not None
    return _plain(line, defaults.template.filled(values), defaults.system, defaults.params, defaults.form)


def _of_fields(line: Line, fields: Fields, defaults: Defaults) -> Job:
    if not isinstance(fields.take("id"), str | int | None):
        fields.refuse("id", "a string or a whole number")
    prompt = fields.text("prompt")
    if prompt is None:
        raise UsageError('prompt is missing: a line is a JSON object such as {"prompt": "Tell me about llama2"}')
    systems = [name for name in _SYSTEMS if fields.text(name) is not None]
    if len(systems) > 1:
        raise UsageError(f'the system prompt is given twice, as "{systems[0]}" and as "{systems[1]}": leave one out')
    system = fields.text(systems[0]) if systems else defaults.system
    form = _form(fields) or defaults.form
    if fields.has("response_format"):
        raise UsageError("response_format is for OpenAI's lines: say schema, json_object or choices")
    params = sampling(fields, defaults.params)
    metadata = fields.take("metadata")
    fields.refuse_unknown()
    return _plain(line, prompt, system, params, form, metadata)


def _plain(
    line: Line, prompt: str, system: str | None, params: SamplingParams, form: Form | None, metadata: Any = None
) -> Job:
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    if form is not None and params.stop:
        raise UsageError("stop might cut an answer that must have a form: leave it out")
    params = replace(params, seed=draw_seed()) if params.seed is None else params
    messages = (*([Message("system", system)] if system else []), Message("user", prompt))
    shape = Plain(line, params, form, metadata)
    return Job(line, shape, (Conversation(messages),), (params,), form)


def _form(fields: Fields) -> Form | None:
    """The form that a line asks for."""
    given = [name for name in ("schema", "json_object", "choices") if fields.has(name)]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: an answer has one form")
    schema, is_object = fields.take("schema"), fields.flag("json_object")
    choices = fields.texts("choices", forms.MAX_CHOICES)
    if isinstance(schema, str):
        schema = reading.short_form(schema)
    if schema is not None:
        return forms.of_schema(schema, "schema")
    if choices:
        return forms.of_choices(choices, "choices")
    return forms.json_object("json_object") if is_object else None


# -- OpenAI's form ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenAi:
    line: Line
    request: openai.Request | None
    url: str
    model: str

    def answered(self, answers: Sequence[Answer], added: str, piece: Piece) -> dict[str, Any]:
        assert self.request is not None
        if any(answer.finish_reason is FinishReason.FAILED for answer in answers):
            return self.failed(EngineError("llama.cpp failed in the middle of the answer"))
        is_chat = self.url == _URLS[0]
        kind = "chatcmpl" if is_chat else "cmpl"
        frame = openai.frame(kind, str(self.line.number), self.request.model or self.model, int(time.time()))
        shape = openai.ChatShape if is_chat else openai.CompletionShape
        return self._line(200, json.loads(shape(frame, self.request, piece).whole(answers)))

    def failed(self, error: LlamacliError) -> dict[str, Any]:
        return self.refused(failure.of(error))

    def refused(self, why: Failure) -> dict[str, Any]:
        return self._line(why.status, json.loads(failure.body(why, _URLS[0], "")))

    def invalid(self, message: str) -> dict[str, Any]:
        """Of a line that is no request."""
        return self._head() | {"response": None, "error": {"code": "invalid_request", "message": message}}

    def _line(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{self.line.number}", "body": body}
        return self._head() | {"response": response, "error": None}

    def _head(self) -> dict[str, Any]:
        return {"id": f"batch_req_{self.line.number}", "custom_id": id_of(self.line)}


@dataclass(frozen=True, slots=True)
class _Refused:
    """A line of OpenAI's form that has its answer already."""

    answer: dict[str, Any]

    def answered(self, answers: Sequence[Answer], added: str, piece: Piece) -> dict[str, Any]:
        return self.answer

    def failed(self, error: LlamacliError) -> dict[str, Any]:
        return self.answer


def _of_openai(line: Line, values: Mapping[str, Any], defaults: Defaults) -> Job:
    shape = OpenAi(line, None, str(values.get("url")), defaults.model)
    problem = _misshapen(values)
    if problem:
        problem = f"line {line.number:,}: {problem}"
        return Job(line, _Refused(shape.invalid(problem)), problem=UsageError(problem))
    url = values["url"]
    read = openai.read_chat if url == _URLS[0] else openai.read_completion
    try:
        body = _with_system(values["body"], url, defaults.system)
        request = read(json.dumps(body, ensure_ascii=False).encode(), defaults.params)
        if request.ask.stream:
            raise Failure(400, "stream has no meaning in a batch: leave it out", param="stream")
        form = _default_form(body, request, defaults.form)
    except Failure as why:
        return Job(line, _Refused(shape.refused(why)), problem=_at(line, why))
    ask = request.ask
    seed = draw_seed() if ask.params.seed is None else ask.params.seed
    params = tuple(replace(ask.params, seed=(seed + i) % (MAX_SEED + 1)) for i in range(ask.n))
    return Job(line, replace(shape, request=request), ask.sources, params, form)


def _with_system(body: Mapping[str, Any], url: str, system: str | None) -> Mapping[str, Any]:
    """The body, with the batch's system prompt where it has none of its own."""
    if not system:
        return body
    if url != _URLS[0]:
        raise Failure(400, f"a text for {url} has no system prompt: leave --system out", param="prompt")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return body
    roles = [each.get("role") for each in messages if isinstance(each, dict)]
    if "system" in roles or "developer" in roles:
        return body
    # Behind the others, so that what is wrong with one of them is told with its own number.
    return {**body, "messages": [*messages, {"role": "system", "content": system}]}


def _default_form(body: Mapping[str, Any], request: openai.Request, form: Form | None) -> Form | None:
    """The batch's form, for a body that does not say itself what its answer is like."""
    says_it = body.get("response_format") is not None or body.get("tools") or request.ask.params.grammar is not None
    if form is None or says_it:
        return None
    if request.ask.params.stop:
        raise Failure(400, f"stop might cut an answer that {form.source} gives a form: leave it out", param="stop")
    return form


def _misshapen(values: Mapping[str, Any]) -> str:
    """What is wrong with a line's envelope; nothing where it is all right."""
    if not isinstance(values.get("custom_id"), str):
        return "custom_id must be a string"
    if values.get("method", "POST") != "POST":
        return "method must be POST"
    if values.get("url") not in _URLS:
        return f"url must be {' or '.join(_URLS)}"
    if not isinstance(values.get("body"), dict):
        return "body must be a JSON object"
    unknown = [name for name in values if name not in ("custom_id", "method", "url", "body")]
    return f"not supported: {', '.join(unknown)[:200]}" if unknown else ""
