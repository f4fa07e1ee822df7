"""The OpenAPI 3.1 description of every route (https://spec.openapis.org/oas/v3.1.0), served at /openapi.json.

What bodies look like is in schemas.py. The API page takes its tables from here, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamacli import __version__
from llamacli.server import access, contract, failure, schemas
from llamacli.server.about import About
from llamacli.server.exchange import EVENTS, JSON
from llamacli.server.metrics import CONTENT_TYPE as METRICS_TYPE
from llamacli.server.recording import FORMAT, VERSION
from llamacli.server.schemas import Schema, components, ref
from llamacli.server.stage import PREFIX

PLAIN = "text/plain"
HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a caller meets it: when it comes, and what is to be done."""

    name: str
    when: str
    remedy: str


PROBLEMS = {
    400: Problem(
        "BadRequest",
        "The body is not JSON, a field is missing, of the wrong type or out of range, or the prompt does not fit the "
        "context.",
        "The message names the field, what it must be and what came. Correct it; the same request fails again.",
    ),
    401: Problem(
        "Unauthorized",
        "The key is missing, unknown or revoked.",
        "Send a key in one of the three ways. `llamacli keys create --name NAME` makes one.",
    ),
    403: Problem(
        "Forbidden",
        "A web page from elsewhere calls, or the Host is not this machine.",
        "Call from this machine's own pages, or start the server with `--cors-origin ORIGIN`.",
    ),
    404: Problem("NotFound", "There is no such address, or no such model.", "Compare it with the list of endpoints."),
    405: Problem(
        "MethodNotAllowed", "The address is right and the method is not.", "The header Allow has those it takes."
    ),
    408: Problem("RequestTimeout", "The body did not arrive in time.", "Send it again, at once."),
    413: Problem("ContentTooLarge", "The body is larger than the server takes.", "Send less, or raise `--max-body`."),
    429: Problem(
        "TooManyRequests",
        "The key has used up its requests of this minute or its tokens of this day, or the queue is full.",
        "Wait for the seconds in Retry-After, then send it again.",
    ),
    500: Problem(
        "InternalServerError",
        "Something went wrong that no request should be able to cause.",
        "Look for the trace id in the server's log.",
    ),
    503: Problem(
        "ServiceUnavailable",
        "The model is loading, its process is being replaced, or the server is going down.",
        "Wait for the seconds in Retry-After, then send it again.",
    ),
}
_ALWAYS = (403, 500)
_WORK = (400, 401, 408, 413, 429, 503)
_TRACE_HEADER = {"X-Trace-Id": {"$ref": "#/components/headers/TraceId"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a route.

    request     name of the body's schema; `media` is the body's content type
    answers     content type → schema, of status 200
    problems    statuses besides those that every route may answer with
    """

    method: str
    path: str
    id: str
    summary: str
    tag: str
    answers: Mapping[str, Schema]
    request: str | None = None
    example: object = None
    media: str = JSON
    problems: Sequence[int] = ()
    is_open: bool = False


def _stream(piece: Schema) -> Schema:
    """A schema of one event: as whoever reads an event stream gets them."""
    data: Schema = {
        "type": "string",
        "anyOf": [{"contentMediaType": JSON, "contentSchema": piece}, {"const": "[DONE]"}],
    }
    return {
        "type": "object",
        "description": "Server-sent events. This is one of them; the last one is [DONE].",
        "properties": {"data": data},
        "required": ["data"],
    }


_LLAMA2, _OPENAI, _SERVER, _SIMULATION = "Llama 2 API", "OpenAI API", "Server", "Simulation"
_EXAMPLE = {"prompt": "Tell me about llama2", "system prompt": "You are a Llama 2 expert", "max_tokens": 100}


def operations(about: About) -> list[Operation]:
    text: Schema = {"type": "string"}
    get_data = [
        Operation(
            method="post",
            path=path,
            id="getData" if i == 0 else f"getData{i + 1}",
            summary="Answer a prompt" if i == 0 else f"The same as {contract.PATHS[0]}",
            tag=_LLAMA2,
            request="GetDataRequest",
            example=_EXAMPLE,
            answers={JSON: ref("GetDataAnswer"), EVENTS: _stream(ref("GetDataEvent"))},
            problems=_WORK,
        )
        for i, path in enumerate(contract.PATHS)
    ]
    hello = [{"role": "user", "content": "Tell me about llama2"}]
    return [
        *get_data,
        Operation(
            method="post",
            path="/v1/chat/completions",
            id="chat",
            summary="Answer a conversation",
            tag=_OPENAI,
            request="ChatRequest",
            example={"model": about.model, "messages": hello},
            answers={
                JSON: ref("ChatCompletion"),
                EVENTS: _stream({"type": "object", "description": "A chat.completion.chunk."}),
            },
            problems=(*_WORK, 404),
        ),
        Operation(
            method="post",
            path="/v1/completions",
            id="complete",
            summary="Continue a text",
            tag=_OPENAI,
            request="CompletionRequest",
            example={"model": about.model, "prompt": "Llama 2 is", "max_tokens": 20},
            answers={JSON: ref("Completion"), EVENTS: _stream({"type": "object", "description": "A text_completion."})},
            problems=(*_WORK, 404),
        ),
        Operation(
            method="post",
            path="/v1/embeddings",
            id="embed",
            summary="Vectors of texts",
            tag=_OPENAI,
            request="EmbeddingRequest",
            example={"model": about.model, "input": "Tell me about llama2"},
            answers={JSON: ref("Embeddings")},
            problems=(*_WORK, 404),
        ),
        Operation(
            method="get",
            path="/v1/models",
            id="listModels",
            summary="The model that is served",
            tag=_OPENAI,
            answers={JSON: ref("Models")},
            problems=(401,),
        ),
        Operation(
            method="get",
            path="/v1/models/{model}",
            id="showModel",
            summary="Whether a model is served",
            tag=_OPENAI,
            answers={JSON: ref("Model")},
            problems=(401, 404),
        ),
        Operation(
            method="get",
            path="/health",
            id="health",
            summary="The process is up",
            tag=_SERVER,
            answers={JSON: ref("Health")},
            is_open=True,
        ),
        Operation(
            method="get",
            path="/ready",
            id="ready",
            summary="The model is loaded; 503 as long as it is not",
            tag=_SERVER,
            answers={JSON: ref("Readiness")},
            is_open=True,
        ),
        Operation(
            method="get",
            path="/metrics",
            id="metrics",
            summary="Figures for Prometheus",
            tag=_SERVER,
            answers={METRICS_TYPE: text},
            problems=() if about.is_local else (401,),
            is_open=about.is_local,
        ),
        Operation(
            method="get",
            path="/openapi.json",
            id="describe",
            summary="This description",
            tag=_SERVER,
            answers={JSON: {"type": "object"}},
            is_open=True,
        ),
        Operation(
            method="get",
            path="/",
            id="page",
            summary="The API page",
            tag=_SERVER,
            answers={HTML: text},
            is_open=True,
        ),
        *(_simulation() if about.simulates else ()),
    ]


def _simulation() -> list[Operation]:
    """What a test does with its server (--allow-simulation)."""
    recorded = f'{{"format": "{FORMAT}", "version": {VERSION}}}\n'
    told = [
        ("reply", "replies", "Put an answer ready", "Reply", JSON, {"text": "Llama 2 is a family of models."}),
        ("simulate", "rules", "Let requests fail", "Rule", JSON, {"simulate": "status=429, retry-after=2", "count": 1}),
        ("replay", "recording", "Answer from a recording", "Recording", PLAIN, recorded),
    ]
    return [
        *(
            Operation(
                method="post",
                path=f"{PREFIX}/{path}",
                id=name,
                summary=summary,
                tag=_SIMULATION,
                request=request,
                media=media,
                example=example,
                answers={JSON: ref("Done")},
                problems=(400, 401, 408, 413),
            )
            for name, path, summary, request, media, example in told
        ),
        Operation(
            method="get",
            path=f"{PREFIX}/requests",
            id="heard",
            summary="What clients have sent",
            tag=_SIMULATION,
            answers={JSON: ref("Heard")},
            problems=(401,),
        ),
        Operation(
            method="delete",
            path=PREFIX,
            id="forget",
            summary="Begin anew",
            tag=_SIMULATION,
            answers={JSON: ref("Done")},
            problems=(401,),
        ),
    ]


def describe(about: About) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    listed = operations(about)
    for operation in listed:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    keys: list[dict[str, list[str]]] = [{"header": []}, {"bearer": []}, {"query": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Llama 2 API",
            "version": __version__,
            "summary": f"{about.model}, served by llamacli.",
            "description": (
                f"The body may have {about.max_body:,} bytes. Every answer carries X-Trace-Id. Addresses that are not "
                "listed answer 404, methods that are not listed 405: in OpenAI's shape below /v1/ (getData excepted), "
                "in the Llama 2 API's elsewhere."
            ),
        },
        "servers": [{"url": about.url}],
        "security": keys if about.needs_key else [{}, *keys],
        "tags": [{"name": name} for name in dict.fromkeys(each.tag for each in listed)],
        "paths": paths,
        "components": {
            "schemas": components(about.defaults) | (schemas.simulation() if about.simulates else {}),
            "responses": {
                name + problem.name: _problem(status, problem, schema)
                for name, schema in (("", "Error"), ("OpenAI", "OpenAIError"))
                for status, problem in PROBLEMS.items()
            },
            "headers": {
                "TraceId": {
                    "description": "The caller's own, from traceparent or X-Request-Id, or a new one.",
                    "schema": {"type": "string"},
                },
                "RetryAfter": {
                    "description": "Seconds until it is worth trying again.",
                    "schema": {"type": "integer", "minimum": 1},
                },
            },
            "securitySchemes": {
                "header": {"type": "apiKey", "in": "header", "name": "Ocp-Apim-Subscription-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "query": {"type": "apiKey", "in": "query", "name": access.KEY_PARAMETER},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    shape = "OpenAI" if failure.speaks_openai(operation.path) else ""
    found: dict[str, Any] = {"operationId": operation.id, "summary": operation.summary, "tags": [operation.tag]}
    if operation.request:
        content = {"schema": ref(operation.request), "example": operation.example}
        found["requestBody"] = {"required": True, "content": {operation.media: content}}
    if "{model}" in operation.path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.is_open:
        found["security"] = []
    answer: dict[str, Any] = {
        "description": "The answer.",
        "headers": _TRACE_HEADER,
        "content": {kind: {"schema": schema} for kind, schema in operation.answers.items()},
    }
    responses = {"200": answer}
    if operation.id == "ready":
        responses["503"] = answer | {"description": "It is not ready."}
    for status in sorted({*_ALWAYS, *operation.problems}):
        responses[str(status)] = {"$ref": f"#/components/responses/{shape}{PROBLEMS[status].name}"}
    return found | {"responses": responses}


def _problem(status: int, problem: Problem, schema: str) -> dict[str, Any]:
    headers: dict[str, Any] = dict(_TRACE_HEADER)
    if status in (429, 503):
        headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
    return {
        "description": f"{problem.when} {problem.remedy}",
        "headers": headers,
        "content": {JSON: {"schema": ref(schema)}},
    }
