"""An answer from a server on this machine that has this very model loaded: nothing is loaded twice.

Only where it is the answer that would be computed here. If the server cannot begin with it, it is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from llamacli.commands.deliver import say_it_completes
from llamacli.commands.journal import Outcome, known_as
from llamacli.commands.question import RunOptions, Texts
from llamacli.commands.remote import SAMPLING, Inquiry
from llamacli.commands.terminal import Notices
from llamacli.config import Settings
from llamacli.engine.sequence import SamplingParams
from llamacli.errors import RemoteError
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.remote.address import Address
from llamacli.remote.answer import from_chat
from llamacli.server.presence import Presence, running, states_of

_COMPLETION = "completion"  # prompt.Format.COMPLETION; to import that room would take longer than the server's answer


def choose(place: Path, settings: Settings, options: RunOptions, file: ModelFile, notices: Notices) -> Presence | None:
    """The server to ask. None, and for -v the reason, where the answer is to be computed here."""
    for server in running(place):
        obstacle = _obstacle(server, settings, options, file)
        if obstacle is None:
            return server
        notices.detail(f"not asking the running server {server.pid} ({server.name}): {obstacle}")
    return None


def _obstacle(server: Presence, settings: Settings, options: RunOptions, file: ModelFile) -> str | None:
    try:
        states = states_of(file.files)
    except OSError as error:
        return f"the model cannot be looked at: {error.strerror}"
    if states != server.files:
        return "it serves another model" if states[0][0] != server.files[0][0] else "the model's file has changed since"
    return _unlike(server, settings, options)


def _unlike(server: Presence, settings: Settings, options: RunOptions) -> str | None:
    """What would make its answer another one than ours."""
    is_repeatable = settings.seed is not None or settings.temperature == 0
    guesses, _ = server.choices.get("speculation", ("prompt lookup", ""))
    rewritten, _ = server.choices.get("rewritten", (True, ""))
    obstacles = {
        "--local": settings.local,
        "--raw": options.raw,
        "a session goes on here": options.has_session,
        "--show-prompt": options.show_prompt,
        "--no-cache": settings.no_cache,
        "--cache-size 0": settings.cache_size == 0,
        "the answer's form is kept here": options.has_form,
        f"--on-overflow {settings.on_overflow} counts tokens": settings.on_overflow != "error",
        f"its context holds {server.n_limit:,} tokens": (
            server.n_limit != settings.ctx_size if settings.ctx_size else not server.is_whole
        ),
        f"--gpu-layers {settings.gpu_layers}": settings.gpu_layers != server.gpu_layers,
        "--require-gpu": settings.require_gpu and server.device == "CPU",
        f"--kv-type {settings.kv_type}": settings.kv_type != server.choices.get("kv_type", ("f16", ""))[0],
        f"--threads {settings.threads}": settings.threads not in (None, server.threads),
        f"it ends answers after {server.max_tokens} tokens": (
            server.max_tokens is not None and settings.max_tokens is None
        ),
        "--no-speculation": settings.no_speculation,
        "--draft-model": settings.draft_model is not None,
        f"it guesses tokens otherwise ({guesses}); the answer is to be repeatable": (
            is_repeatable and guesses != "prompt lookup"
        ),
        "its weights are in this CPU's own order and round otherwise; the answer is to be repeatable": (
            is_repeatable and bool(rewritten)
        ),
    }
    return next((why for why, applies in obstacles.items() if applies), None)


class Attached:
    """An answer that a server on this machine gives over its Unix socket."""

    def __init__(
        self,
        server: Presence,
        file: ModelFile,
        settings: Settings,
        params: SamplingParams,
        notices: Notices,
        notes: Notes,
        texts: Texts,
        *,
        started: float,
    ) -> None:
        self._server = server
        self._file = file
        self._params = params
        self._notices = notices
        self._notes = notes
        here = Address("http", f"the running server {server.pid}", 80, "/v1/chat/completions", server.socket)
        body = _body(texts, settings.system, params)
        silence = settings.remote_timeout
        self._inquiry = Inquiry(here, body, from_chat, notices, started, silence=silence, is_patient=False)
        self._pieces = self._inquiry.pieces()

    def begin(self) -> None:
        """Wait for the first piece of the answer. Raises RemoteError while nothing of it has been shown."""
        first = next(self._pieces, "")
        self._pieces = chain([first], self._pieces)

    def pieces(self) -> Iterator[str]:
        server = self._server
        if server.format == _COMPLETION:
            say_it_completes(self._file.name, self._notices)
        self._notices.detail(f"answered by the running server {server.pid} ({server.name}, {server.device})")
        return self._pieces

    def exit_code(self) -> int:
        return self._inquiry.exit_code(self._params.max_tokens)

    def outcome(self) -> Outcome:
        ending = self._inquiry.ending
        return Outcome(
            model=known_as(self._file),
            finish_reason=ending.finish_reason,
            usage=dict(ending.usage),
            seed=self._params.seed,
        )

    def record(self, answer: str) -> dict[str, object]:
        server, file, params = self._server, self._file, self._params
        timings = self._inquiry.timings()  # before the checksum is taken, which may take seconds
        chosen = {name: {"value": value, "why": why} for name, (value, why) in server.choices.items()}
        attached = {"value": True, "why": f"the running server {server.pid} has this model loaded; --local refuses it"}
        return {
            "answer": answer,
            "finish_reason": self._inquiry.ending.finish_reason,
            "usage": self._inquiry.ending.usage,
            "seed": params.seed,
            "sampling": {name: getattr(params, name) for name in SAMPLING},
            "model": {
                "name": file.name,
                "path": str(file.path.resolve()),
                "sha256": file.sha256 or checksum.sha256(file.path, self._notes),
                "revision": file.revision,
                "template": server.format,
            },
            "context_size": server.n_limit,
            "device": server.device,
            "settings": {"attached": attached} | chosen | {"on_overflow": "error"},
            "input": {"tokens": None, "kept": None, "parts": 1},
            "speculation": None,
            "timings": timings,
        }


def _body(texts: Texts, system: str | None, params: SamplingParams) -> dict[str, Any]:
    """The whole of what is wanted, so that no default of the server's counts."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": texts.content})
    wanted = {name: getattr(params, name) for name in (*SAMPLING, "seed", "max_tokens")}
    given = {name: value for name, value in wanted.items() if value is not None}
    stop = {"stop": list(params.stop)} if params.stop else {}
    return {"messages": messages, "stream": True, "stream_options": {"include_usage": True}} | given | stop


def begun(attached: Attached, notices: Notices) -> bool:
    """Whether the server has begun to answer. If not, nothing is lost but a moment."""
    try:
        attached.begin()
    except RemoteError as error:
        notices.detail(f"computing here: {error}")
        return False
    return True
