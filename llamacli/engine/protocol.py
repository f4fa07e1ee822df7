"""What the server's process and the engine's process say to each other, and how it becomes bytes.

A frame is its length (uint32, little endian) and one value in marshal's format: tuples of numbers, texts and bytes.
Marshal takes as long as pickle for these (1 us for the deltas of eight sequences), a fifth of what json takes, and
unlike pickle it cannot be made to call anything. Both processes run the same interpreter, so its version does not
matter. What came since the last step goes into one frame, each way.
"""

from __future__ import annotations

import marshal
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

from llamacli import errors
from llamacli.engine.sequence import Alternative, Delta, FinishReason, Logprobs, SamplingParams, Usage

MAX_FRAME = 1 << 30  # bytes; no prompt comes near it, so a longer one means that the two sides have lost step
_MARSHAL_VERSION = 2  # later ones look for objects that occur twice, which costs more than it saves here
_LENGTH = struct.Struct("<I")


class Ask:
    """What the server's side wants. A frame from it is a list of tuples, each of which begins with one of these.

    No enum: marshal takes plain numbers only.
    """

    ADD = 0  # request id, prompt as bytes of array("i"), values of SamplingParams, trim
    CANCEL = 1  # request id
    PAUSE = 2  # request id
    RESUME = 3  # request id
    ENCODE = 4  # question id, a text or a tuple of (role, content)
    EMBED = 5  # question id, a list of texts, or of token ids as bytes of array("i"); CANCEL takes it back


class Tell:
    """What the engine's side answers. A frame from it is one tuple, which begins with one of these."""

    READY = 0  # ModelFacts as a dict
    NOTICE = 1  # a line for the user
    FAILED = 2  # an error's name and message: it will not be ready
    STEP = 3  # packed deltas, {token: bytes} told for the first time, [(request id, error, message)], Load, ids begun
    ENCODED = 4  # question id, bytes of array("i"), format, trim
    NOT_ENCODED = 5  # question id, an error's name and message: for EMBED too
    EMBEDDED = 6  # question id, vectors as bytes of float32, number of tokens


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the engine's process makes its engine.

    factory   "module:function"; called with `options` and a function that takes lines for the user, it returns a
              worker.Workshop
    options   keyword arguments, of types that marshal knows
    path      directories to import from after all others
    """

    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model that an engine runs.

    n_limit    tokens that a sequence may hold, prompt and answer
    n_cells    cells of the KV cache, all sequences together
    slots      sequences that are computed at once
    format     how prompts are made of messages: a prompt.Format
    choices    what was chosen for this machine: name → (value, why)
    """

    name: str
    path: str
    n_vocab: int
    n_limit: int
    n_cells: int
    slots: int
    format: str
    device: str = "CPU"
    choices: Mapping[str, tuple[object, str]] = field(default_factory=dict)


PARAMS = tuple(each.name for each in fields(SamplingParams))
_values_of = attrgetter(*PARAMS)


class Refusal(NamedTuple):
    """A request that the engine did not take."""

    id: int
    error: str
    message: str


def packed(message: Any) -> bytes:
    body = marshal.dumps(message, _MARSHAL_VERSION)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that these bytes complete. Raises ConnectionError for what cannot be a frame."""
        self._buffer += data
        messages = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > MAX_FRAME:
                raise ConnectionError(f"a frame of {length:,} bytes")
            end = at + _LENGTH.size + length
            if end > len(self._buffer):
                break
            with memoryview(self._buffer) as view:
                messages.append(marshal.loads(view[at + _LENGTH.size : end]))
            at = end
        del self._buffer[:at]
        return messages


class Channel:
    """The engine's end of the socket. Any thread may send; one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._frames = Frames()
        self._received: list[Any] = []
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Returns when the other side's buffer has it: an engine must not run ahead of who reads it."""
        frame = packed(message)
        with self._sending:
            self._socket.sendall(frame)

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other side is gone."""
        while not self._received:
            data = self._socket.recv(1 << 18)
            if not data:
                raise EOFError
            self._received = self._frames.feed(data)[::-1]
        return self._received.pop()


def packed_params(params: SamplingParams) -> tuple[Any, ...]:
    values: tuple[Any, ...] = _values_of(params)
    if params.logit_bias:
        return tuple(dict(value) if isinstance(value, Mapping) else value for value in values)
    return values


def unpacked_params(values: Iterable[Any]) -> SamplingParams:
    """Raises UsageError for a value out of range."""
    return SamplingParams(**dict(zip(PARAMS, values, strict=True)))


def packed_delta(delta: Delta, request: int) -> tuple[Any, ...]:
    """A delta under its request's id. Most are a text and a token."""
    if delta.logprobs is None and delta.finish_reason is None:
        return (request, delta.text, delta.token)
    logprobs, usage = delta.logprobs, delta.usage
    return (
        request,
        delta.text,
        delta.token,
        None if logprobs is None else (logprobs.token, logprobs.logprob, tuple(map(tuple, logprobs.top))),
        None if delta.finish_reason is None else str(delta.finish_reason),
        None if usage is None else (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
    )


def unpacked_delta(values: tuple[Any, ...]) -> Delta:
    if len(values) == 3:
        return Delta(*values)
    request, text, token, logprobs, reason, usage = values
    return Delta(
        request,
        text,
        token,
        None if logprobs is None else Logprobs(logprobs[0], logprobs[1], tuple(Alternative(*a) for a in logprobs[2])),
        None if reason is None else FinishReason(reason),
        None if usage is None else Usage(*usage),
    )


def error_named(name: str, message: str) -> errors.LlamacliError:
    """The error that the other side has caught, as it was."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.LlamacliError):
        return kind(message)
    return errors.EngineError(f"{name}: {message}")
