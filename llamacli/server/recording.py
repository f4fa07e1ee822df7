"""A recording: requests and what was answered, one JSON object a line. Read, checked, and written.

    {"format": "llamacli-recording", "version": 1, "model": "tiny", "defaults": {"temperature": 0.6, ...}}
    {"request": {"path": "/v1/getData", "json": {"prompt": "hi"}}, "traceId": "...",
     "response": {"status": 200, "headers": {...}, "after": 0.12, "json": {...}}}

An answer's body is written as `json` where that gives its very bytes back (compact, in the order of its keys), else as
`text`, else as `base64`. A streamed answer has `chunks` instead, as they went out: each has the seconds `after` the one
before and its `events`, the data of server-sent events, or else `text` or `base64`.

Knows nothing of sockets, nor of when two requests are the same.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamacli.errors import UsageError

FORMAT = "llamacli-recording"
VERSION = 1
MAX_WAIT = 3600.0  # seconds between two chunks
MIN_SECRET = 8  # characters: shorter ones (openai's "none") are no secrets, and may be words of an answer
SCRUBBED = "SCRUBBED"
MAX_DEPTH = 100  # arrays and objects in each other; what goes deeper than that is taken as text
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_BODIES = ("json", "text", "base64")
_DATA, _END = "data: ", "\n\n"
_EVENT = re.compile(rb"^data: ?(\{.*\})\r?$", re.MULTILINE)

_Edit = tuple[int, int, bytes]  # bytes from, up to, and what takes their place


@dataclass(frozen=True, slots=True)
class Chunk:
    """`after`: seconds since the chunk before, or since the request."""

    data: bytes
    after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A request and its answer.

    line       where it stands, counted from 1; 0 before it is written
    headers    of the answer
    chunks     the answer's body; one for an answer that came whole
    """

    path: str
    body: bytes
    status: int
    headers: tuple[tuple[str, str], ...]
    chunks: tuple[Chunk, ...]
    is_stream: bool = False
    trace_id: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """`defaults`: what its server assumed where a request said nothing."""

    name: str = "the recording"
    model: str = "recorded"
    defaults: Mapping[str, object] = field(default_factory=dict)
    entries: tuple[Recorded, ...] = ()


class _Bad(Exception):
    """What is wrong with a line."""


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Recording:
    """Raises UsageError naming the line and what is wrong with it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the recording {path} cannot be read: {error.strerror}") from None
    return parse(raw, path.name)


def parse(raw: bytes, name: str) -> Recording:
    """A recording that is called `name` in errors. Raises UsageError."""
    lines = raw.split(b"\n")
    head: dict[str, Any] | None = None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = _object(line, is_cut=number == len(lines))
            if head is None:
                head = _checked_head(value)
            else:
                entries.append(_entry(value, number))
        except RecursionError:
            raise UsageError(f"{name}, line {number}: it is nested too deeply") from None
        except _Bad as error:
            raise UsageError(f"{name}, line {number}: {error}") from None
    if head is None:
        raise UsageError(f"{name}, line 1: it is empty; a recording begins with its format and version")
    return Recording(
        name=name, model=head.get("model", "recorded"), defaults=head.get("defaults", {}), entries=tuple(entries)
    )


def _object(line: bytes, *, is_cut: bool) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Bad(f"byte {error.start + 1} is not UTF-8") from None
    except RecursionError:
        raise _Bad("it is nested too deeply") from None
    except ValueError as error:
        if is_cut:
            raise _Bad("it breaks off in the middle: remove it, what stands before is whole") from None
        raise _Bad(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Bad("it must be a JSON object")
    return value


def _checked_head(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("format") != FORMAT:
        raise _Bad(f'this is no recording: one begins with {{"format": "{FORMAT}", "version": {VERSION}, ...}}')
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _Bad("version must be a number")
    if version > VERSION:
        raise _Bad(f"it has version {version}; this llamacli reads up to {VERSION}: update llamacli")
    if not isinstance(value.get("model", ""), str):
        raise _Bad("model must be a string")
    if not isinstance(value.get("defaults", {}), dict):
        raise _Bad("defaults must be an object")
    return value


def _entry(value: dict[str, Any], line: int) -> Recorded:
    _know(value, "", ("request", "response", "traceId"))
    request, response = _inner(value, "request"), _inner(value, "response")
    _know(request, "request.", ("path", *_BODIES))
    _know(response, "response.", ("status", "headers", "after", "chunks", *_BODIES))
    path, trace_id = request.get("path"), value.get("traceId", "")
    if not isinstance(path, str) or not path.startswith("/"):
        raise _Bad("request.path must be a string such as /v1/getData")
    if not isinstance(trace_id, str) or not trace_id.isascii() or not trace_id.isprintable():
        raise _Bad("traceId must be a string of printable ASCII characters")
    status = response.get("status")
    if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599:
        raise _Bad("response.status must be a number between 200 and 599")
    is_stream = "chunks" in response
    return Recorded(
        path=path,
        body=_body(request, "request"),
        status=status,
        headers=_headers(response.get("headers", {})),
        chunks=_chunks(response) if is_stream else (Chunk(_body(response, "response"), _after(response, "response")),),
        is_stream=is_stream,
        trace_id=trace_id,
        line=line,
    )


def _know(value: Mapping[str, Any], prefix: str, names: Sequence[str]) -> None:
    for name in value:
        if name not in names:
            raise _Bad(f"{prefix}{name[:50]} is unknown; known are {', '.join(names)}")


def _inner(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise _Bad(f"{name} must be an object")
    return found


def _body(value: dict[str, Any], where: str) -> bytes:
    given = [name for name in _BODIES if name in value]
    if len(given) != 1:
        raise _Bad(f"{where} must have one of {', '.join(_BODIES)}")
    found = value[given[0]]
    if given[0] == "json":
        return _compact(found).encode("utf-8", "surrogatepass")
    if not isinstance(found, str):
        raise _Bad(f"{where}.{given[0]} must be a string")
    return _from_text(found, where) if given[0] == "text" else _from_base64(found, where)


def _from_text(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _Bad(f"{where}.text holds half of a surrogate pair") from None


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise _Bad(f"{where}.base64 is not base64") from None


def _after(value: dict[str, Any], where: str) -> float:
    after = value.get("after", 0)
    is_number = isinstance(after, int | float) and not isinstance(after, bool) and math.isfinite(after)
    if not is_number or not 0 <= after <= MAX_WAIT:
        raise _Bad(f"{where}.after must be seconds, between 0 and {MAX_WAIT:g}")
    return float(after)


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise _Bad("response.headers must be an object of strings")
    for name, text in value.items():
        if not is_header(name, text):
            raise _Bad(f"response.headers.{name[:50]} is no header")
    return tuple((name.lower(), text) for name, text in value.items())


def is_header(name: str, text: str) -> bool:
    """Whether an answer may have it. How its body is framed is not for a header to say."""
    is_framing = name.lower() in ("content-length", "transfer-encoding")
    return _HEADER_NAME.fullmatch(name) is not None and text.isascii() and text.isprintable() and not is_framing


def _chunks(response: dict[str, Any]) -> tuple[Chunk, ...]:
    if any(name in response for name in (*_BODIES, "after")):
        raise _Bad("response has chunks and a body: leave one out")
    found = response["chunks"]
    if not isinstance(found, list) or not found:
        raise _Bad("response.chunks must be an array with at least one chunk")
    return tuple(_chunk(each, f"response.chunks[{i}]") for i, each in enumerate(found))


def _chunk(value: object, where: str) -> Chunk:
    if not isinstance(value, dict):
        raise _Bad(f"{where} must be an object")
    _know(value, f"{where}.", ("after", "events", *_BODIES[1:]))
    if "events" not in value:
        return Chunk(_body(value, where), _after(value, where))
    events = value["events"]
    if not isinstance(events, list) or not events or len(value.keys() & {"text", "base64"}):
        raise _Bad(f"{where} must have events (an array with at least one), or text, or base64")
    return Chunk("".join(map(_event, events)).encode("utf-8", "surrogatepass"), _after(value, where))


# -- writing ---------------------------------------------------------------------------------------------------------


def head(model: str, defaults: Mapping[str, object]) -> bytes:
    """The first line."""
    return _line({"format": FORMAT, "version": VERSION, "model": model, "defaults": dict(defaults)})


def written(entry: Recorded, secrets: Iterable[str] = ()) -> bytes:
    """A line. `secrets` are left out, wherever they stand."""
    plain = [secret for secret in secrets if len(secret) >= MIN_SECRET]
    hidden = [form for secret in plain for form in (secret, json.dumps(secret)[1:-1])]  # as JSON spells it, too
    response: dict[str, Any] = {"status": entry.status, "headers": dict(entry.headers)}
    parts = _without([chunk.data for chunk in entry.chunks], hidden, is_stream=entry.is_stream)
    chunks = [(round(chunk.after, 4), data) for chunk, data in zip(entry.chunks, parts, strict=True)]
    if entry.is_stream:
        response["chunks"] = [{"after": after} | _shown_events(data) for after, data in chunks]
    else:
        ((after, data),) = chunks
        response |= {"after": after} | _shown(data)
    (body,) = _without([entry.body], hidden)
    value = {"request": {"path": entry.path} | _shown_request(body), "response": response, "traceId": entry.trace_id}
    return _line(_scrubbed(value, hidden) if hidden else value)


def _without(parts: Sequence[bytes], secrets: Sequence[str], *, is_stream: bool = False) -> Sequence[bytes]:
    """Secrets may be cut in two: by the borders of parts, and in a stream by those of events."""
    if not secrets:
        return parts
    longest_first = sorted({secret.encode("utf-8", "surrogatepass") for secret in secrets}, key=len, reverse=True)
    pattern = re.compile(b"|".join(map(re.escape, longest_first)))
    edits = [(*found.span(), SCRUBBED.encode()) for found in pattern.finditer(b"".join(parts))]
    parts = _edited(parts, edits)
    return _edited(parts, _edits_of_events(b"".join(parts), pattern)) if is_stream else parts


def _edited(parts: Sequence[bytes], edits: Sequence[_Edit]) -> list[bytes]:
    """The parts after edits of the whole, in order. What an edit puts in is in the part where its place began."""
    edited, start = [], 0
    waiting = deque(edits)
    done = 0  # bytes of the whole
    for part in parts:
        end, kept = start + len(part), []
        while waiting and waiting[0][0] < end:
            first, last, new = waiting.popleft()
            kept += [part[max(0, done - start) : first - start], new]
            done = last
        kept.append(part[max(0, done - start) :])
        edited.append(b"".join(kept))
        start, done = end, max(done, end)
    return edited


def _edits_of_events(whole: bytes, pattern: re.Pattern[bytes]) -> list[_Edit]:
    """What must be changed in a stream so that no texts that are told in pieces hold a secret once they are joined."""
    events, texts = [], defaultdict(list)
    for found in _EVENT.finditer(whole):
        with suppress(ValueError, RecursionError):
            value = json.loads(found[1])
            if not is_deep(value):
                events.append((found.span(1), value))
                for place, holder, name in _strings(value):
                    texts[place].append((len(events) - 1, holder, name))
    changed = set()
    for pieces in texts.values():
        said = [holder[name].encode("utf-8", "surrogatepass") for _, holder, name in pieces]
        edits = [(*found.span(), SCRUBBED.encode()) for found in pattern.finditer(b"".join(said))]
        if not edits:
            continue
        for (event, holder, name), old, new in zip(pieces, said, _edited(said, edits), strict=True):
            if new != old:
                holder[name] = new.decode("utf-8", "surrogatepass")
                changed.add(event)
    return [(*events[i][0], _compact(events[i][1]).encode("utf-8", "surrogatepass")) for i in sorted(changed)]


def _strings(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The texts of an event: where each stands (of several answers, in which), what holds it, and under what name."""
    for name, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, str):
            yield (*place, str(name)), value, name
        elif isinstance(each, dict | list):
            index = each.get("index", name) if isinstance(each, dict) else name
            yield from _strings(each, (*place, str(index)))


def _scrubbed(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, SCRUBBED)
        return value
    if isinstance(value, list):
        return [_scrubbed(each, secrets) for each in value]
    if isinstance(value, dict):
        return {_scrubbed(name, secrets): _scrubbed(each, secrets) for name, each in value.items()}
    return value


def _shown_request(raw: bytes) -> dict[str, Any]:
    """What it means counts, not how it was written."""
    with suppress(ValueError, RecursionError):
        value = json.loads(raw.decode("utf-8-sig"))
        if isinstance(value, dict) and not is_deep(value):
            return {"json": value}
    return _shown(raw)


def _shown(raw: bytes) -> dict[str, Any]:
    with suppress(UnicodeDecodeError):
        text = raw.decode()
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
            if not is_deep(value) and _compact(value) == text:
                return {"json": value}
        return {"text": text}
    return {"base64": base64.b64encode(raw).decode()}


def _shown_events(raw: bytes) -> dict[str, Any]:
    with suppress(UnicodeDecodeError):
        text = raw.decode()
        values = []
        for part in text.removesuffix(_END).split(_END):
            data = part.removeprefix(_DATA)
            value: Any = data
            with suppress(ValueError, RecursionError):
                parsed = json.loads(data)
                is_plain = isinstance(parsed, dict) and not is_deep(parsed)
                value = parsed if is_plain and _compact(parsed) == data else data
            values.append(value)
        return {"events": values} if "".join(map(_event, values)) == text else {"text": text}
    return {"base64": base64.b64encode(raw).decode()}


def is_deep(value: object) -> bool:
    """Whether JSON is nested deeper than MAX_DEPTH. The parser goes further down than what walks through values can."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for container in inner for each in container]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _event(value: Any) -> str:
    return f"{_DATA}{value if isinstance(value, str) else _compact(value)}{_END}"


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _line(value: object) -> bytes:
    # Lone surrogates, which bodies may hold, come out as JSON's own escapes.
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"
