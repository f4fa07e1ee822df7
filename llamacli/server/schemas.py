"""What requests and answers look like, as JSON Schema (2020-12, which OpenAPI 3.1 speaks).

Ranges are those of the code that reads the fields. JSON's null counts as absent, so that what is optional may be null.
Knows nothing of routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacli.engine.sequence import MAX_SEED, SamplingParams
from llamacli.server import ask, contract, embeddings, openai, tools

Schema = dict[str, Any]

MAX_TOKEN_ID = 2**31 - 1
_NO_OTHERS: Schema = {"type": "null"}  # a field that is not known is refused, unless it is null and so absent


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def text(description: str, **more: object) -> Schema:
    return {"type": "string", "description": description} | more


def _optional(kind: str, description: str, **more: object) -> Schema:
    found = {"type": [kind, "null"], "description": description} | more
    return {name: value for name, value in found.items() if value is not None}


def _between(ends: tuple[float, float]) -> Schema:
    return {"minimum": ends[0], "maximum": ends[1]}


def _object(properties: Mapping[str, Schema], *required: str, **more: object) -> Schema:
    """With all of its properties required where none is named."""
    return {"type": "object", "properties": dict(properties), "required": list(required or properties)} | more


def _array(items: Schema, **more: object) -> Schema:
    return {"type": "array", "items": items} | more


# -- requests ---------------------------------------------------------------------------------------------------


def sampling(defaults: SamplingParams) -> dict[str, Schema]:
    """The fields that all routes which write know."""
    stop: Schema = {
        "description": f"A string, or up to {ask.MAX_STOPS}, that end the answer and are not part of it.",
        "anyOf": [
            {"type": "string", "minLength": 1},
            _array({"type": "string", "minLength": 1}, maxItems=ask.MAX_STOPS),
            {"type": "null"},
        ],
    }
    most = defaults.max_tokens
    longest = "" if most else " Without it: what is left of the context."
    return {
        "max_tokens": _optional(
            "integer", f"The longest answer, in tokens.{longest}", minimum=1, default=defaults.max_tokens
        ),
        "temperature": _optional(
            "number",
            "How freely words are drawn; 0 always takes the likeliest.",
            **_between(ask.TEMPERATURE),
            default=defaults.temperature,
        ),
        "top_p": _optional(
            "number",
            "Draw from the likeliest tokens that together have this probability.",
            **_between(ask.SHARE),
            default=defaults.top_p,
        ),
        "top_k": _optional(
            "integer",
            "Draw from this many of the likeliest tokens; 0 is all.",
            minimum=0,
            maximum=ask.MAX_TOP_K,
            default=defaults.top_k,
        ),
        "min_p": _optional(
            "number",
            "Leave out tokens below this share of the likeliest one's probability.",
            **_between(ask.SHARE),
            default=defaults.min_p,
        ),
        "repeat_penalty": _optional(
            "number",
            "Above 1, tokens that were there lately become less likely.",
            exclusiveMinimum=ask.REPEAT_PENALTY[0],
            maximum=ask.REPEAT_PENALTY[1],
            default=defaults.repeat_penalty,
        ),
        "seed": _optional(
            "integer",
            "The same seed repeats an answer on the same server. Without it one is drawn.",
            minimum=0,
            maximum=MAX_SEED,
            default=defaults.seed,
        ),
        "stop": stop,
        "stream": _optional("boolean", "Send the answer piece by piece, as server-sent events.", default=False),
        "response_format": {
            "description": "Hold the answer to JSON: any object, or what a JSON schema allows.",
            "anyOf": [ref("ResponseFormat"), {"type": "null"}],
        },
        "ignore_eos": _optional("boolean", "Write on to max_tokens, whatever the model would.", default=False),
    }


def get_data(defaults: SamplingParams) -> Schema:
    first, *others = contract.SYSTEM_NAMES
    systems = {first: _optional("string", "Who the model is to be, and how it is to answer.")}
    systems |= {name: _optional("string", f'Another spelling of "{first}"; only one may be given.') for name in others}
    prompt = text("What the model is to answer.", pattern=r"\S", examples=["Tell me about llama2"])
    return _object(
        {"prompt": prompt} | systems | sampling(defaults),
        "prompt",
        description="Fields that mean nothing here are named in the answer's `ignored`.",
    )


def _openai(defaults: SamplingParams) -> dict[str, Schema]:
    """What chat and plain completions share."""
    options = {
        "include_usage": _optional("boolean", "Send the usage in an event of its own before [DONE]."),
        "include_obfuscation": {"description": "Without effect."},
    }
    written = sampling(defaults) | {
        "model": _optional("string", "As GET /v1/models names it; another name is a 404."),
        "n": _optional(
            "integer",
            f"How many answers; with the prompts, {openai.MAX_ANSWERS} at most.",
            minimum=1,
            maximum=openai.MAX_N,
            default=1,
        ),
        "max_completion_tokens": _optional("integer", "The newer name of max_tokens.", minimum=1),
        "frequency_penalty": _optional(
            "number", "By how often a token was there lately.", **_between(openai.PENALTY), default=0
        ),
        "presence_penalty": _optional(
            "number", "Whether a token was there lately.", **_between(openai.PENALTY), default=0
        ),
        "logit_bias": _optional(
            "object",
            "Token id → what is added to its logit.",
            propertyNames={"pattern": r"^[0-9]{1,9}$"},
            additionalProperties={"type": ["number", "null"], **_between(openai.BIAS)},
        ),
        "stream_options": _optional(
            "object", "Only together with stream.", properties=options, additionalProperties=_NO_OTHERS
        ),
    }
    return written | {name: {"description": "Without effect on the answer."} for name in openai.WITHOUT_EFFECT}


def chat(defaults: SamplingParams) -> Schema:
    properties = {
        "messages": _array(
            ref("Message"), minItems=1, description="System prompts, then user and assistant in turn; the user last."
        ),
        "logprobs": _optional("boolean", "Report the probability of each token.", default=False),
        "top_logprobs": _optional(
            "integer",
            "And of so many alternatives. Needs logprobs.",
            minimum=0,
            maximum=openai.MAX_TOP_LOGPROBS,
        ),
        "tools": {
            "description": "Functions that the answer may call.",
            "anyOf": [_array(ref("Tool")), {"type": "null"}],
        },
        "tool_choice": {
            "description": "Whether a function must be called, or which.",
            "anyOf": [{"enum": ["none", "auto", "required", None]}, _named_function()],
        },
        "modalities": {"description": "Only text is written.", "enum": [["text"], None]},
    }
    return _object(properties | _openai(defaults), "messages", additionalProperties=_NO_OTHERS)


def completion(defaults: SamplingParams) -> Schema:
    token: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
    prompts: Schema = {
        "description": "Texts to be continued as they are, or token ids.",
        "anyOf": [
            {"type": "string", "minLength": 1},
            _array({"type": "string", "minLength": 1}, minItems=1, maxItems=openai.MAX_ANSWERS),
            _array(token, minItems=1),
            _array(_array(token, minItems=1), minItems=1, maxItems=openai.MAX_ANSWERS),
        ],
    }
    properties = {
        "prompt": prompts,
        "logprobs": _optional(
            "integer",
            "Report the probability of each token, and of so many alternatives.",
            minimum=0,
            maximum=openai.MAX_TOP_LOGPROBS,
        ),
        "echo": {"description": "Not supported.", "enum": [False, None]},
        "suffix": {"description": "Not supported.", "enum": ["", None]},
        "best_of": _optional("integer", "Only the number that n is.", minimum=1, maximum=openai.MAX_N),
    }
    return _object(properties | _openai(defaults), "prompt", additionalProperties=_NO_OTHERS)


def embedding() -> Schema:
    token: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
    many = {"minItems": 1, "maxItems": embeddings.MAX_INPUTS}
    one_or_tokens: Schema = {"anyOf": [{"type": "string", "minLength": 1}, _array(token, minItems=1)]}
    properties: dict[str, Schema] = {
        "input": {
            "description": "A text, texts, or the token ids of one or of many.",
            "anyOf": [{"type": "string", "minLength": 1}, _array(token, **many), _array(one_or_tokens, **many)],
        },
        "model": _optional("string", "As GET /v1/models names it; another name is a 404."),
        "encoding_format": {"enum": ["float", "base64", None], "default": "float"},
        "dimensions": {"description": "Not supported.", "type": "null"},
        "user": {"description": "Without effect."},
    }
    return _object(properties, "input", additionalProperties=_NO_OTHERS)


def _named_function() -> Schema:
    named = {"type": {"enum": ["function", None]}, "function": _object({"name": {"type": "string"}})}
    return _object(named, "function")


def _message() -> Schema:
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}})
    content: Schema = {"anyOf": [{"type": "string"}, _array(part)]}
    function = _object({"name": {"type": "string"}, "arguments": {"type": "string"}})
    call = _object({"id": _optional("string", "By which its result names it."), "function": function}, "function")
    others: dict[str, Schema] = {name: {} for name in ("refusal", "annotations", "audio")}
    others["name"] = _optional("string", "Of a user: told to the model where there are several.")

    def of(roles: list[str], *required: str, **more: Schema) -> Schema:
        properties = {"role": {"enum": roles}, "content": content, **more, **others}
        return _object(properties, "role", *required, additionalProperties=_NO_OTHERS)

    optional: Schema = {"anyOf": [*content["anyOf"], {"type": "null"}]}
    caller = of(["assistant"], "tool_calls", content=optional, tool_calls=_array(call, minItems=1))
    return {
        "anyOf": [
            of(["system", "developer", "user"], "content"),
            of(["assistant"], "content", tool_calls={"enum": [[], None]}),
            caller,
            of(["tool"], "content", tool_call_id=_optional("string", "Of an earlier call.")),
        ]
    }


def _tool() -> Schema:
    function = {
        "name": text("What a call of it says.", pattern=f"^{tools.NAME}$"),
        "description": _optional("string", "What it does, for the model."),
        "parameters": _optional("object", "The JSON schema of its arguments."),
        "strict": _optional("boolean", "Without effect: arguments always obey the schema."),
    }
    described = _object(function, "name", additionalProperties=_NO_OTHERS)
    return _object(
        {"type": {"enum": ["function", None]}, "function": described}, "function", additionalProperties=_NO_OTHERS
    )


def _response_format() -> Schema:
    described = {
        "schema": {"type": "object", "description": "A JSON schema. What cannot be held to is a 400 that names it."},
        "name": _optional("string", "Without effect."),
        "description": _optional("string", "Without effect."),
        "strict": _optional("boolean", "Without effect: the answer always obeys the schema."),
    }
    by_schema = {
        "type": {"const": "json_schema"},
        "json_schema": _object(described, "schema", additionalProperties=_NO_OTHERS),
    }
    kinds = ({"type": {"enum": ["text", "json_object"]}}, by_schema)
    return {"anyOf": [_object(each, additionalProperties=_NO_OTHERS) for each in kinds]}


# -- answers ----------------------------------------------------------------------------------------------------

_COUNT: Schema = {"type": "integer", "minimum": 0}
_REASON: Schema = {
    "enum": ["stop", "length"],
    "description": "`stop`: the answer is whole. `length`: max_tokens, or the end of the context, has cut it.",
}
_TRACE = text("Finds the request in the server's log; also in the header X-Trace-Id.")


def _usage(*more: str) -> Schema:
    details = _object({"cached_tokens": _COUNT})
    known = dict.fromkeys(("prompt_tokens", *more, "total_tokens"), _COUNT)
    return _object(known | {"prompt_tokens_details": details}, *known)


def _listed(items: Schema, **more: Schema) -> Schema:
    return _object({"object": {"const": "list"}, "data": _array(items), **more})


def _choices(kind: str, choice: dict[str, Schema]) -> Schema:
    reasons = {"enum": ["stop", "length", "tool_calls"]}
    known = {"index": _COUNT, **choice, "finish_reason": reasons, "logprobs": {"type": ["object", "null"]}}
    head: dict[str, Schema] = {
        "id": {"type": "string"},
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": {"type": "string"},
    }
    return _object(head | {"choices": _array(_object(known), minItems=1), "usage": _usage("completion_tokens")})


def answers() -> dict[str, Schema]:
    end: dict[str, Schema] = {
        "model": text("The model that has written it."),
        "finish_reason": _REASON,
        "usage": _usage("completion_tokens") | {"description": "Tokens of the prompt, of the answer, and of both."},
        "traceId": _TRACE,
        "ignored": _array(
            {"type": "string"}, description="Fields of the request that mean nothing here; left out if there are none."
        ),
    }
    required = [name for name in end if name != "ignored"]
    head: dict[str, Schema] = {
        "status": {"const": 200, "description": "The HTTP status."},
        "content-type": {"const": "application/json", "description": "As in the header of the same name."},
    }
    written = {"response": text("What the model has written.")}
    call = _object({"name": {"type": "string"}, "arguments": text("JSON, as a string.")})
    calls = _array(_object({"id": {"type": "string"}, "type": {"const": "function"}, "function": call}))
    message = _object(
        {
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "refusal": {"type": "null"},
            "tool_calls": calls,
        },
        *("role", "content"),
    )
    vector: Schema = {"anyOf": [_array({"type": "number"}), text("Base64 of float32 in little endian.")]}
    embedded = _object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": vector})
    return {
        "GetDataAnswer": _object(head | written | end, *head, *written, *required),
        "GetDataEvent": _object(
            {"response": text("The next piece.")} | end,
            "response",
            description="The last one alone has the fields besides `response`; `data: [DONE]` follows it.",
        ),
        "ChatCompletion": _choices("chat.completion", {"message": message}),
        "Completion": _choices("text_completion", {"text": {"type": "string"}}),
        "Embeddings": _listed(embedded, model={"type": "string"}, usage=_usage()),
        "Model": _object(
            {
                "id": {"type": "string"},
                "object": {"const": "model"},
                "created": {"type": "integer"},
                "owned_by": {"type": "string"},
            }
        ),
        "Models": _listed(ref("Model")),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object({"status": {"enum": ["ready", "loading", "draining", "failed"]}}),
    }


def errors() -> dict[str, Schema]:
    """In the shape of the Llama 2 API and in OpenAI's."""
    code: Schema = {"type": "integer", "minimum": 400, "maximum": 599, "description": "The HTTP status."}
    told = text("What is wrong, and what to do.")
    inner = {
        "message": told,
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "The field at fault."},
        "code": {"type": "string"},
    }
    return {
        "Error": _object({"code": code, "message": told, "traceId": _TRACE}, additionalProperties=False),
        "OpenAIError": _object({"error": _object(inner)}),
    }


def simulation() -> dict[str, Schema]:
    """What a test tells its server, and what it hears from it: see replies.py, rules.py and recording.py."""
    pattern = _optional("string", "A regular expression that is found in the request's body.")
    route = _optional("string", "Only for requests to this path.")
    reply = {
        "text": _optional("string", "What the model says, whole or streamed as the client asks."),
        "pieces": _optional("array", "The same, cut into events.", items={"type": "string"}),
        "finish_reason": {"enum": ["stop", "length"], "default": "stop"},
        "json": {"description": "A body."},
        "body": _optional("string", "A body of another type."),
        "events": _optional("array", "Those of a stream, JSON or text.", minItems=1),
        "status": {"type": "integer", "minimum": 200, "maximum": 599, "default": 200},
        "message": _optional("string", "Of an error: a status of 400 or more without a body."),
        "retry_after": _optional("integer", "Seconds, in the header of an error."),
        "headers": _optional("object", "More of them.", additionalProperties={"type": "string"}),
        "content_type": _optional("string", "Of a body."),
        "route": route,
        "when": pattern,
        "times": _optional("integer", "So often; else until the next one, the last one for ever.", minimum=1),
    }
    rule = {
        "simulate": text("What is to happen, as in the header X-Simulate."),
        "route": route,
        "body": pattern,
        "nth": {
            "description": "Of the requests that fit, counted from 1.",
            "anyOf": [{"type": ["integer", "null"], "minimum": 1}, _array({"type": "integer", "minimum": 1})],
        },
        "probability": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
        "seed": {"description": "Of the probability."},
        "count": _optional("integer", "No more often.", minimum=0),
    }
    strings: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
    sent = {
        "method": {"type": "string"},
        "path": {"type": "string"},
        "query": strings,
        "headers": strings,
        "status": text("Of its answer; 0 while there is none.") | {"type": "integer"},
        "body": text("In base64."),
    }
    return {
        "Reply": {"type": "object", "properties": reply, "additionalProperties": False},
        "Rule": _object(rule, "simulate", additionalProperties=False),
        "Recording": text("JSON Lines, as --record writes them."),
        "Heard": _object({"requests": _array(_object(sent))}),
        "Done": _object({"status": {"const": "ok"}}),
    }


def components(defaults: SamplingParams) -> dict[str, Schema]:
    """All that a description refers to by name."""
    requests = {
        "GetDataRequest": get_data(defaults),
        "ChatRequest": chat(defaults),
        "CompletionRequest": completion(defaults),
        "EmbeddingRequest": embedding(),
    }
    parts = {"Message": _message(), "Tool": _tool(), "ResponseFormat": _response_format()}
    return requests | parts | answers() | errors()
