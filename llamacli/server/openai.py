"""OpenAI's chat completions and completions: request bodies, answers and stream chunks.

Reference: https://platform.openai.com/docs/api-reference. What would change the answer and is not supported is
refused by name; what has no effect on it is accepted.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamacli.engine.sequence import Alternative, Delta, FinishReason, Logprobs, SamplingParams
from llamacli.prompt import Message
from llamacli.server import tools
from llamacli.server.answer import Answer, total, wire
from llamacli.server.ask import Ask, Conversation, Source, Text, Tokens, sampling
from llamacli.server.exchange import DONE, event
from llamacli.server.failure import Failure
from llamacli.server.fields import Fields, parse

MAX_N = 16
MAX_TOP_LOGPROBS = 20
PENALTY = (-2, 2)
BIAS = (-100, 100)
MAX_ANSWERS = 64  # of one request: prompts times n
# Fields that do not change what a model like this one answers.
WITHOUT_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
Piece = Callable[[int], bytes]  # a token's own bytes


@dataclass(frozen=True, slots=True)
class Request:
    """`model` is the name that the client gave; None when it gave none."""

    ask: Ask
    model: str | None
    include_usage: bool
    tools: tools.Tools | None = None


def read_chat(raw: bytes, defaults: SamplingParams) -> Request:
    """A body of /v1/chat/completions. Raises Failure 400."""
    fields = parse(raw)
    callable_tools = tools.read(fields)
    messages = _messages(fields, callable_tools)
    params = _params(fields, defaults)
    logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise Failure(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if logprobs:
        params = replace(params, logprobs=top or 0)
    if callable_tools:
        if params.grammar is not None:
            raise Failure(400, "response_format and tools contradict each other: leave one out", param="tools")
        if logprobs:
            raise Failure(400, "logprobs and tools cannot be combined: leave one out", param="logprobs")
        params = replace(params, grammar=callable_tools.grammar)
    if fields.take("modalities") not in (None, ["text"]):
        raise Failure(400, 'modalities must be ["text"]: this model only writes', param="modalities")
    return _request(fields, (Conversation(messages),), params, callable_tools)


def read_completion(raw: bytes, defaults: SamplingParams) -> Request:
    """A body of /v1/completions. Raises Failure 400."""
    fields = parse(raw)
    sources = _sources(fields)
    params = _params(fields, defaults)
    logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    if logprobs is not None:
        params = replace(params, logprobs=logprobs)
    if fields.flag("echo"):
        raise Failure(400, "echo is not supported: put the prompt before the answer yourself", param="echo")
    if fields.text("suffix"):
        raise Failure(400, "suffix is not supported: this model does not fill gaps", param="suffix")
    if fields.integer("best_of", 1, MAX_N) not in (None, fields.integer("n", 1, MAX_N) or 1):
        raise Failure(400, "best_of is not supported, unless it is n: ask for n answers and choose", param="best_of")
    return _request(fields, sources, params, None)


def _request(
    fields: Fields, sources: tuple[Source, ...], params: SamplingParams, callable_tools: tools.Tools | None
) -> Request:
    """The fields that both routes share, and the refusal of all that are left."""
    n = fields.integer("n", 1, MAX_N) or 1
    if n * len(sources) > MAX_ANSWERS:
        raise Failure(400, f"{len(sources)} prompts with n = {n} are more than {MAX_ANSWERS} answers", param="n")
    stream = bool(fields.flag("stream"))
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise Failure(400, "stream_options needs stream to be true", param="stream_options")
    include_usage = bool(options and options.flag("include_usage"))
    if options is not None:
        options.know(["include_obfuscation"])
        options.refuse_unknown()
    model = fields.text("model")
    fields.know(WITHOUT_EFFECT)
    fields.refuse_unknown()
    return Request(Ask(sources=sources, params=params, n=n, stream=stream), model, include_usage, callable_tools)


def _params(fields: Fields, defaults: SamplingParams) -> SamplingParams:
    params = sampling(fields, defaults)
    longest = fields.integer("max_completion_tokens", 1)
    if longest is not None and params.max_tokens not in (None, longest) and fields.has("max_tokens"):
        raise Failure(
            400, "max_tokens and max_completion_tokens contradict each other: leave one out", param="max_tokens"
        )
    given: dict[str, Any] = {
        "max_tokens": longest,
        "frequency_penalty": fields.number("frequency_penalty", *PENALTY),
        "presence_penalty": fields.number("presence_penalty", *PENALTY),
        "logit_bias": _logit_bias(fields),
    }
    return replace(params, **{name: value for name, value in given.items() if value is not None})


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    given = fields.take("logit_bias")
    if given is None:
        return None
    if not isinstance(given, dict):
        fields.refuse("logit_bias", "an object of token ids and numbers")
    biases = Fields(given, "logit_bias.")
    read = {}
    for token in given:
        bias = biases.number(token, *BIAS)
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Failure(400, f"logit_bias.{token[:40]}: the names must be token ids", param="logit_bias")
        if bias is not None:
            read[int(token)] = bias
    return read


def _sources(fields: Fields) -> tuple[Source, ...]:
    """The prompts: a string, strings, token ids, or several lists of token ids."""
    prompt = fields.take("prompt")
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        fields.refuse("prompt", "a string, an array of strings, or token ids")
    if all(isinstance(each, str) for each in prompt):
        if not all(prompt):
            raise Failure(400, "prompt holds an empty string", param="prompt")
        return tuple(Text(each) for each in prompt)
    if all(_is_token(each) for each in prompt):
        return (Tokens(tuple(prompt)),)
    if all(isinstance(each, list) and each and all(map(_is_token, each)) for each in prompt):
        return tuple(Tokens(tuple(each)) for each in prompt)
    raise Failure(400, "prompt mixes strings and token ids, or holds what is neither", param="prompt")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


# -- messages ---------------------------------------------------------------------------------------------------


def _messages(fields: Fields, callable_tools: tools.Tools | None) -> tuple[Message, ...]:
    """The conversation as Llama 2 knows it: one system prompt at most, then user and assistant in turn.

    Messages of one side that follow one another are joined by an empty line, as are system prompts. Where several users
    speak, each is named.
    """
    given = fields.objects("messages")
    if not given:
        fields.refuse("messages", "an array with at least one message")
    systems = [callable_tools.system_prompt()] if callable_tools else []
    turns: list[Message] = []
    called: dict[str, str] = {}
    users = {each.text("name") for each in given if each.take("role") == "user"}
    for each in given:
        message = _message(each, called)
        if len(users) > 1 and each.take("role") == "user" and each.has("name"):
            message = Message("user", f"{each.text('name')}: {message.content}")
        if message.role == "system":
            systems.append(message.content)
        elif turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, f"{turns[-1].content}\n\n{message.content}")
        else:
            turns.append(message)
    if not turns or turns[-1].role != "user":
        raise Failure(400, "the last message must be the user's (or a tool's)", param="messages")
    if turns[0].role != "user":
        raise Failure(400, "the first message after the system prompt must be the user's", param="messages")
    system = "\n\n".join(text for text in systems if text)
    return ((Message("system", system),) if system else ()) + tuple(turns)


def _message(fields: Fields, called: dict[str, str]) -> Message:
    """called   id of an earlier call → what it called; takes up the calls of this message"""
    role = fields.choice("role", "system", "developer", "user", "assistant", "tool")
    if role is None:
        fields.refuse("role", "system, developer, user, assistant or tool")
    fields.know(["name", "refusal", "annotations", "audio"])
    calls = _earlier_calls(fields) if role == "assistant" else []
    called |= {each.id: tools.told_apart(each, calls) for each in calls}
    content = _content(fields, is_optional=bool(calls))
    if role == "tool":
        content = f"The function{_caller(fields, called)} returned: {content}"
    if calls:
        content = "\n".join(part for part in (content, tools.spoken(calls)) if part)
    fields.refuse_unknown()
    if role == "user" and not content.strip():
        raise Failure(400, f"{fields.name('content')} is empty", param=fields.name("content"))
    names = {"developer": "system", "tool": "user"}
    return Message(names.get(role, role), content)


def _caller(fields: Fields, called: Mapping[str, str]) -> str:
    """Which call a result is of: those of several calls come in any order."""
    call_id = fields.text("tool_call_id")
    if call_id is None:
        return ""
    if call_id not in called:
        fields.refuse("tool_call_id", "the id of an earlier call in the messages")
    return f" {called[call_id]}"


def _content(fields: Fields, *, is_optional: bool) -> str:
    """A string, or parts of type text."""
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if value is None and is_optional:
        return ""
    if not isinstance(value, list):
        fields.refuse("content", "a string or an array of parts")
    texts = []
    for part in fields.objects("content") or []:
        kind = part.text("type")
        if kind != "text":
            raise Failure(400, f"{part.name('type')} is {kind}: only text can be read", param=part.name("type"))
        text = part.text("text")
        if text is None:
            part.refuse("text", "a string")
        texts.append(text)
    return "".join(texts)


def _earlier_calls(fields: Fields) -> list[tools.Call]:
    calls = []
    for each in fields.objects("tool_calls") or []:
        function = each.object("function")
        name = function.text("name") if function else None
        arguments = function.text("arguments") if function else None
        if name is None or arguments is None:
            raise Failure(400, f"{each.name('function')} must have a name and arguments", param=each.name("function"))
        calls.append(tools.Call(name, arguments, each.text("id") or ""))
    return calls


# -- answers ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Frame:
    """What all answers and chunks of a request have in common."""

    id: str
    model: str
    created: int

    def dump(self, kind: str, choices: Sequence[dict[str, Any]], **more: object) -> str:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return json.dumps(head | {"choices": choices} | more, ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class ChatShape:
    """Answers of /v1/chat/completions."""

    frame: _Frame
    request: Request
    piece_of: Piece
    _readers: dict[int, tools.CallReader] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer]) -> bytes:
        choices = [
            self._message(answer)
            | {"logprobs": _chat_logprobs(answer.logprobs, self.piece_of) if self._wants_logprobs else None}
            for answer in answers
        ]
        return self.frame.dump("chat.completion", choices, usage=usage_of(answers, self.request.ask.n)).encode()

    def _message(self, answer: Answer) -> dict[str, Any]:
        call, is_cut = None, False
        if self.request.tools:
            is_cut = _is_cut(answer)
            call = tools.call_in(answer.text, is_cut=is_cut)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if call:
            message |= {"content": None, "tool_calls": [_call_object(self._call_id(answer), call)]}
        return {
            "index": answer.index,
            "message": message,
            "finish_reason": _chat_reason(answer.finish_reason, is_call=call is not None and not is_cut),
        }

    def opening(self) -> bytes:
        n = len(self.request.ask.sources) * self.request.ask.n
        return b"".join(self._chunk(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(n))

    def piece(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        text = "".join(delta.text for delta in deltas)
        logprobs = [delta.logprobs for delta in deltas if delta.logprobs] if self._wants_logprobs else []
        events = b""
        is_call = False
        if self.request.tools:
            events, is_call = self._call_pieces(answer, text)
        elif text or logprobs:
            events = self._chunk(answer.index, {"content": text}, logprobs)
        if answer.finish_reason is not None:
            reason = _chat_reason(answer.finish_reason, is_call=is_call and not _is_cut(answer))
            events += self._chunk(answer.index, {}, reason=reason)
        return events

    def closing(self, answers: Sequence[Answer]) -> bytes:
        if not self.request.include_usage:
            return DONE
        return event(self.frame.dump("chat.completion.chunk", [], usage=usage_of(answers, self.request.ask.n))) + DONE

    @property
    def _wants_logprobs(self) -> bool:
        return self.request.ask.params.logprobs is not None

    def _call_pieces(self, answer: Answer, text: str) -> tuple[bytes, bool]:
        reader = self._readers.setdefault(answer.index, tools.CallReader())
        was_named = reader.name is not None
        ended = answer.finish_reason is not None
        content, arguments = reader.feed(text, ended=ended, is_cut=ended and _is_cut(answer))
        events = self._chunk(answer.index, {"content": content}) if content else b""
        if reader.name is not None and not was_named:
            call = _call_object(self._call_id(answer), tools.Call(reader.name, ""))
            events += self._chunk(answer.index, {"tool_calls": [{"index": 0} | call]})
        if arguments:
            change = {"index": 0, "function": {"arguments": arguments}}
            events += self._chunk(answer.index, {"tool_calls": [change]})
        return events, reader.name is not None

    def _call_id(self, answer: Answer) -> str:
        return f"call_{self.frame.id.rpartition('-')[2]}_{answer.index}"

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[Logprobs] = (), *, reason: str | None = None
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _chat_logprobs(logprobs, self.piece_of) if logprobs else None,
            "finish_reason": reason,
        }
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        return event(self.frame.dump("chat.completion.chunk", [choice], **usage))


@dataclass(slots=True)
class CompletionShape:
    """Answers of /v1/completions."""

    frame: _Frame
    request: Request
    piece_of: Piece
    _offsets: dict[int, int] = field(default_factory=dict)
    _decoders: dict[int, codecs.IncrementalDecoder] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer]) -> bytes:
        choices = [
            self._choice(answer.index, answer.text, answer.logprobs, wire(answer.finish_reason)) for answer in answers
        ]
        return self.frame.dump("text_completion", choices, usage=usage_of(answers, self.request.ask.n)).encode()

    def opening(self) -> bytes:
        return b""

    def piece(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        text = "".join(delta.text for delta in deltas)
        logprobs = [delta.logprobs for delta in deltas if delta.logprobs]
        if not text and not logprobs and answer.finish_reason is None:
            return b""
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        choice = self._choice(answer.index, text, logprobs, wire(answer.finish_reason))
        return event(self.frame.dump("text_completion", [choice], **usage))

    def closing(self, answers: Sequence[Answer]) -> bytes:
        if not self.request.include_usage:
            return DONE
        return event(self.frame.dump("text_completion", [], usage=usage_of(answers, self.request.ask.n))) + DONE

    def _choice(self, index: int, text: str, logprobs: Sequence[Logprobs], reason: str | None) -> dict[str, Any]:
        wanted = self.request.ask.params.logprobs is not None
        return {
            "text": text,
            "index": index,
            "logprobs": self._logprobs(index, logprobs) if wanted else None,
            "finish_reason": reason,
        }

    def _logprobs(self, index: int, logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        decoder = self._decoders.setdefault(index, codecs.getincrementaldecoder("utf-8")("replace"))
        offsets = []
        for each in logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(decoder.decode(self.piece_of(each.token)))
        return {
            "tokens": [_named(self.piece_of(each.token)) for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{_named(self.piece_of(a.token)): a.logprob for a in each.top} for each in logprobs],
            "text_offset": offsets,
        }


def frame(kind: str, trace_id: str, model: str, created: int) -> _Frame:
    return _Frame(f"{kind}-{trace_id}", model, created)


def usage_of(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    used = total(answers, n)
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def _call_object(call_id: str, call: tools.Call) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_reason(reason: FinishReason | None, *, is_call: bool) -> str | None:
    said = wire(reason)
    return "tool_calls" if is_call and said == "stop" else said


def _is_cut(answer: Answer) -> bool:
    """Whether a call that this answer may be lacks its end."""
    return answer.finish_reason is not FinishReason.STOP or not tools.is_whole(answer.text)


def _shown(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _named(piece: bytes) -> str:
    """A token as completions name it: parts of characters by their bytes, or many would go by one name."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _chat_logprobs(logprobs: Sequence[Logprobs], piece_of: Piece) -> dict[str, Any]:
    def described(alternative: Alternative | Logprobs) -> dict[str, Any]:
        piece = piece_of(alternative.token)
        return {"token": _shown(piece), "logprob": alternative.logprob, "bytes": list(piece)}

    content = [described(each) | {"top_logprobs": [described(a) for a in each.top]} for each in logprobs]
    return {"content": content, "refusal": None}


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "llamacli"}
