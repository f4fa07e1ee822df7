"""An answer computed by a server, elsewhere or on this machine: asked in a thread, its pieces as they come."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Queue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from llamacli import __version__
from llamacli.commands.deliver import EXIT_CUT
from llamacli.commands.journal import Outcome
from llamacli.commands.question import RunOptions, Texts, sampling, system_prompt
from llamacli.commands.terminal import Notices
from llamacli.config import Resolved
from llamacli.errors import RemoteError, UsageError
from llamacli.remote import address
from llamacli.remote.address import Address
from llamacli.remote.answer import Ending, Reader, from_contract, pieces, refusal
from llamacli.remote.post import Reply, post

if TYPE_CHECKING:
    from llamacli.schema.form import Form

KEY_HEADER = "Ocp-Apim-Subscription-Key"
MAX_AHEAD = 1024  # pieces that nobody has written yet; a slow reader slows the server
LONGEST_WAIT = 5  # seconds that a busy server may ask us to wait before we try once more
_BUSY = (429, 503)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
_END = object()


@dataclass(slots=True)
class Inquiry:
    """One question to one server.

    started   perf_counter() when the program began
    silence   seconds without a byte after which the server is given up
    is_patient   a server that is busy for a moment is asked once more

    Times are seconds since the program began.
    """

    where: Address
    body: dict[str, Any]
    read: Reader
    notices: Notices
    started: float
    silence: float
    key: str | None = None
    is_patient: bool = True
    ending: Ending = field(default_factory=Ending)
    asked: float = 0.0
    first: float | None = None
    last: float | None = None

    def pieces(self) -> Iterator[str]:
        """The answer's text as it comes. Raises RemoteError."""
        try:
            for piece in _beside(self._ask):
                self.last = perf_counter() - self.started
                self.first = self.last if self.first is None else self.first
                yield piece
        except RemoteError as error:
            raise self._without_key(error) from None

    def _ask(self) -> Iterator[str]:
        where = self.where.shown
        self.asked = perf_counter() - self.started
        reply = self._post()
        wait = reply.retry_after
        if reply.status in _BUSY and self.is_patient and wait is not None and wait <= LONGEST_WAIT:
            self.notices.say(f"{where} is busy ({reply.status}); asking once more in {wait} s")
            time.sleep(wait)
            reply = self._post()
        if reply.status != 200:
            raise refusal(reply, where)
        yield from pieces(reply, self.read, self.ending, where)

    def _post(self) -> Reply:
        headers = {
            "Content-Type": "application/json",
            "Cache-Control": "no-cache",
            "Accept": "text/event-stream, application/json",
            "User-Agent": f"llamacli/{__version__}",
        }
        if self.key is not None:
            headers[KEY_HEADER] = self.key
        body = json.dumps(self.body, ensure_ascii=False).encode()
        return post(self.where, body, headers, silence=self.silence)

    def _without_key(self, error: RemoteError) -> RemoteError:
        """A server may repeat the key that it refuses; we do not."""
        return RemoteError(str(error).replace(self.key, "[key]")) if self.key else error

    def timings(self) -> dict[str, float | None]:
        total = perf_counter() - self.started
        first, last, n = self.first, self.last, self.ending.completion_tokens
        return {
            "load_s": None,
            "prefill_s": None if first is None else round(first - self.asked, 4),
            "first_token_s": None if first is None else round(first, 4),
            "decode_tokens_per_s": round((n - 1) / (last - first), 2)
            if n and first and last and last > first
            else None,
            "total_s": round(total, 4),
        }

    def exit_code(self, max_tokens: int | None) -> int:
        """3 for an answer that ended for want of room, not because it was long enough."""
        ending, n = self.ending, self.ending.completion_tokens
        if ending.finish_reason != "length":
            return 0
        if max_tokens is not None and (n is None or n >= max_tokens):
            return 0
        n_prompt = ending.prompt_tokens
        held = f": prompt and answer have filled the context of {n_prompt + n:,} tokens" if n and n_prompt else ""
        self.notices.say(f"the answer was cut{held}. Shorten the input, or ask for less")
        return EXIT_CUT


def _beside(work: Callable[[], Iterator[str]]) -> Iterator[str]:
    """What a function yields in a daemon thread, so that Ctrl-C is heard while it waits for names or bytes."""
    queue: Queue[Any] = Queue(MAX_AHEAD)

    def fill() -> None:
        try:
            for item in work():
                queue.put(item)
            queue.put(_END)
        except BaseException as error:
            queue.put(error)

    threading.Thread(target=fill, name="remote", daemon=True).start()
    while (item := queue.get()) is not _END:
        if isinstance(item, BaseException):
            raise item
        yield item


class Remote:
    """An answer from any server that speaks the Llama 2 API. Raises UsageError for an address that is none."""

    def __init__(
        self, resolved: Resolved, options: RunOptions, form: Form | None, notices: Notices, *, started: float
    ) -> None:
        settings = resolved.settings
        assert settings.remote is not None
        self._settings = settings
        self._source = str(resolved.sources["remote"])
        self._where = address.of(settings.remote)
        self._key = _key(options.api_key)
        self._system = system_prompt(settings.system)
        self._fields = _chosen(resolved, options)
        self._form = form
        self._stream = options.stream
        self._notices = notices
        self._started = started
        self._inquiry: Inquiry | None = None

    def ask(self, texts: Texts) -> None:
        body: dict[str, Any] = {"prompt": texts.content}
        if self._system:
            body["system prompt"] = self._system
        body |= self._fields | ({"stream": True} if self._stream else {})
        if self._form is not None:
            body["response_format"] = _response_format(self._form)
        self._inquiry = Inquiry(
            self._where,
            body,
            from_contract,
            self._notices,
            self._started,
            silence=self._settings.remote_timeout,
            key=self._key,
        )
        self._notices.detail(f"asking {self._where.shown} ({self._source})")

    @property
    def _asked(self) -> Inquiry:
        assert self._inquiry is not None
        return self._inquiry

    def pieces(self) -> Iterator[str]:
        if self._form is not None and self._form.choices:
            return iter([_unquoted("".join(self._asked.pieces()))])
        return self._asked.pieces()

    def exit_code(self) -> int:
        return self._asked.exit_code(self._settings.max_tokens)

    def outcome(self) -> Outcome:
        """Never the address: it may hold a key."""
        ending = self._asked.ending
        return Outcome(finish_reason=ending.finish_reason, usage=dict(ending.usage), seed=self._fields.get("seed"))

    def record(self, answer: str) -> dict[str, object]:
        ending = self._asked.ending
        return {
            "answer": answer,
            "finish_reason": ending.finish_reason,
            "usage": ending.usage,
            "seed": self._fields.get("seed"),
            "sampling": {name: self._fields.get(name) for name in SAMPLING},
            "model": {"name": ending.model, "path": None, "sha256": None, "revision": None, "template": None},
            "context_size": None,
            "device": "remote",
            "settings": {"remote": {"value": self._where.shown, "why": self._source}},
            "input": {"tokens": None, "kept": None, "parts": 1},
            "speculation": None,
            "timings": self._asked.timings(),
        }


def _response_format(form: Form) -> dict[str, Any]:
    """The form as both APIs know it. A choice is asked for as a JSON string."""
    schema = form.schema if form.schema is not None else {"type": "string", "enum": list(form.choices)}
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _unquoted(answer: str) -> str:
    """A text that came as a JSON string; or as it is, from a server that does not know response_format."""
    try:
        value = json.loads(answer)
    except ValueError:
        return answer.strip()
    return value if isinstance(value, str) else answer.strip()


def _chosen(resolved: Resolved, options: RunOptions) -> dict[str, Any]:
    """What the user has chosen, by flag, variable or file: what is left is the server's to choose."""
    params = sampling(resolved.settings, options)
    names = [name for name in ("max_tokens", *SAMPLING, "seed") if resolved.sources[name].kind != "default"]
    chosen: dict[str, Any] = {name: getattr(params, name) for name in names}
    return chosen | ({"stop": list(params.stop)} if params.stop else {})


def _key(given: str | None) -> str | None:
    """The key to send. LLAMACLI_API_KEY may hold several, for a server to take; a client sends the first."""
    keys = [given] if given is not None else os.environ.get("LLAMACLI_API_KEY", "").split()[:1]
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise UsageError("the key of --api-key or LLAMACLI_API_KEY holds what no HTTP header can carry")
        return key
    return None
