"""`llamacli serve`: from flags to a running server, and from the first signal to its orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.commands import rehearsal, terminal
from llamacli.commands.ready_file import ReadyFile
from llamacli.commands.rehearsal import Rehearsing
from llamacli.config import Directories, Settings
from llamacli.engine.sequence import SamplingParams
from llamacli.engine.supervisor import EngineProcess
from llamacli.errors import UsageError
from llamacli.server import listen, presence
from llamacli.server.absent import NoEngine
from llamacli.server.access import Origins, is_origin
from llamacli.server.accounts import Accounts
from llamacli.server.app import App, Served
from llamacli.server.connection import Patience
from llamacli.server.gate import Gate
from llamacli.server.ledger import FILENAME
from llamacli.server.log import Log, Relay
from llamacli.server.metrics import Metrics
from llamacli.server.presence import FileState
from llamacli.server.service import Service
from llamacli.server.simulation import MAX_SECONDS
from llamacli.server.trace import COUNTED_FROM

if TYPE_CHECKING:
    from llamacli.models.store import ModelFile

_REPACK = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What `serve` wants beside the settings.

    uds        a Unix socket instead of host and port
    queue      requests that may wait for a slot
    api_keys   keys beside those of `llamacli keys create`
    max_body   bytes
    grace      seconds for answers that are being written when the server is to end
    repack     auto, on or off: whether the weights are rewritten for this CPU
    patience   with clients
    ready_file   is written when requests can come
    until_eof    ends with stdin, as with a signal
    testing    what is different for tests of clients
    """

    host: str = "127.0.0.1"
    port: int = 8080
    uds: Path | None = None
    slots: int = 4
    queue: int = 64
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body: int = 10 << 20
    grace: float = 30.0
    repack: str = "auto"
    patience: Patience = field(default_factory=Patience)
    ready_file: Path | None = None
    until_eof: bool = False
    testing: rehearsal.Wishes = field(default_factory=rehearsal.Wishes)

    def __post_init__(self) -> None:
        if self.repack not in _REPACK:
            raise UsageError(f"--repack must be auto, on or off, not {self.repack}")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be between 0 and 65535, not {self.port}")
        if self.queue < 0:
            raise UsageError(f"--queue must be 0 or more, not {self.queue}")
        if self.max_body < 1:
            raise UsageError(f"--max-body must be 1 byte or more, not {self.max_body}")
        if not self.grace >= 0:  # nor is NaN
            raise UsageError(f"--grace must be 0 or more seconds, not {self.grace:g}")
        for name in ("headers", "body", "reading"):
            seconds = getattr(self.patience, name)
            if not seconds > 0:
                raise UsageError(f"--{name}-timeout must be more than 0 seconds, not {seconds:g}")
        if self.no_auth and self.api_keys:
            raise UsageError("--no-auth and --api-key contradict each other")
        for origin in self.cors_origins:
            if origin != "*" and not is_origin(origin):
                raise UsageError(
                    "--cors-origin must be * or an origin as browsers send it, like https://app.example, "
                    f"not {origin[:100]}"
                )

    @property
    def is_local(self) -> bool:
        return self.uds is not None or listen.is_loopback(self.host)


def run(settings: Settings, wishes: Wishes, places: Directories) -> int:
    """Serve until a signal ends it. Returns the exit code. Raises LlamacliError before anything is loaded."""
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    if wishes.until_eof and not terminal.stdin_is_connected():
        raise UsageError("--until-eof needs a pipe or a socket on standard input, held open by another program")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a client that goes away must not take us along
    log = Log(sys.stderr, as_json=not sys.stderr.isatty(), quiet=settings.quiet)
    logging.getLogger().addHandler(Relay(log))
    try:
        return _serve(settings, wishes, places, log)
    finally:
        log.close()


def _serve(settings: Settings, wishes: Wishes, places: Directories, log: Log) -> int:
    defaults = wishes.testing.defaults(_defaults(settings))
    ready_file = ReadyFile(wishes.ready_file) if wishes.ready_file else None
    if ready_file:
        ready_file.prepare()
    rehearsing = rehearsal.prepared(wishes.testing, settings, defaults, wishes.api_keys, log)
    engine, file = _engine(settings, wishes, places, log) if wishes.testing.needs_model else (NoEngine(), None)
    listen.lift_descriptor_limit()
    bound = listen.bind_unix(wishes.uds) if wishes.uds else listen.bind(wishes.host, wishes.port)
    accounts = _accounts(wishes, places, log)
    rehearsing.keep_keys_of(accounts)
    # What is there for tests is no place for the questions of a user's own `run`.
    own = _bind_own(places, file, log) if file is not None and not wishes.testing.is_on else None
    loop_factory = _loop_factory()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            server = _Server(settings, wishes, bound, own, accounts, engine, log, rehearsing, ready_file)
            return runner.run(server.run())
    finally:
        rehearsing.close()
        if ready_file:
            ready_file.remove()
        if accounts is not None:
            accounts.close()
        if wishes.uds:
            wishes.uds.unlink(missing_ok=True)
        if own:
            own.path.unlink(missing_ok=True)


def _engine(settings: Settings, wishes: Wishes, places: Directories, log: Log) -> tuple[EngineProcess, ModelFile]:
    """The model's engine, not yet started, and its file. Raises LlamacliError."""
    from llamacli import launch as launching
    from llamacli.commands.obtain import models_in, obtain, obtain_draft
    from llamacli.commands.terminal import Notices
    from llamacli.models.notes import Notes

    is_alike = wishes.testing.is_deterministic
    options = launching.ServeOptions(slots=wishes.slots, repack=_REPACK[wishes.repack])
    if is_alike:  # one after the other, and weights as they are in the file whatever memory is free
        options = launching.ServeOptions(slots=1, repack=False, is_alike=True)
    notes = Notes(places.cache)
    notices = Notices(quiet=settings.quiet)
    file = obtain(settings, models_in(places), notes, notices)
    draft = None if is_alike else obtain_draft(settings, models_in(places), notes, notices)
    recipe = launching.serving(settings, file, places.cache, options, draft)
    patience = MAX_SECONDS if wishes.testing.allows_simulation else wishes.patience.reading
    return EngineProcess(recipe, notice=lambda line: log.event("notice", line), stall_seconds=patience), file


@dataclass(frozen=True, slots=True)
class _Own:
    """The socket by which `run` of the same user finds this server. `states` of the model's files, before they load."""

    path: Path
    bound: socket.socket
    states: tuple[FileState, ...]


def _bind_own(places: Directories, file: ModelFile, log: Log) -> _Own | None:
    """None where there is no place for it: then `run` loads the model itself."""
    try:
        states = presence.states_of(file.files)
        path = presence.prepare(places.run)
        return _Own(path, listen.bind_unix(path), states)
    except (OSError, UsageError) as error:
        log.event("notice", f"llamacli run will not find this server by itself: {error}")
        return None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _accounts(wishes: Wishes, places: Directories, log: Log) -> Accounts | None:
    """Keys and usage. Raises UsageError where everybody could call a server without a key."""
    if wishes.no_auth:
        return None
    accounts = Accounts(places.data / FILENAME, given=wishes.api_keys, report=lambda line: log.event("accounts", line))
    if accounts.ring.is_open and not wishes.is_local:
        accounts.close()
        raise UsageError(
            f"{wishes.host} can be reached by others, and there is no key: llamacli keys create --name NAME makes one, "
            "--no-auth serves everybody"
        )
    return accounts


class _Server:
    """The parts of a running server, put together."""

    def __init__(
        self,
        settings: Settings,
        wishes: Wishes,
        bound: socket.socket,
        own: _Own | None,
        accounts: Accounts | None,
        engine: EngineProcess | NoEngine,
        log: Log,
        rehearsing: Rehearsing,
        ready_file: ReadyFile | None,
    ) -> None:
        self._settings = settings
        self._wishes = wishes
        self._bound = bound
        self._own = own
        self._engine = engine
        self._log = log
        self._ready_file = ready_file
        self._name = rehearsing.model
        is_alike = wishes.testing.is_deterministic
        self._service = Service(engine, 1 if is_alike else wishes.slots, wishes.queue, is_in_order=is_alike)
        self._stop = asyncio.Event()
        self._is_urgent = False
        app = App(
            self._service,
            served=Served(
                name=self._name,
                names=_names(self._name) | rehearsing.names,
                piece_of=engine.piece,
                **({"created": COUNTED_FROM} if is_alike else {}),
            ),
            defaults=wishes.testing.defaults(_defaults(settings)),
            origins=Origins(wishes.is_local, frozenset(wishes.cors_origins), is_socket=wishes.uds is not None),
            gate=Gate(accounts),
            metrics=Metrics(lambda: engine.stats),
            log=log,
            max_body=wishes.max_body,
            body_seconds=wishes.patience.body,
            rehearsal=rehearsing.rehearsal,
            own_socket=str(own.path) if own else None,
        )
        self._http = listen.Http(app, wishes.patience, tells_date=not is_alike)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup does
            # A terminal that closes may send it twice, from the kernel and from the shell: no reason to hurry.
            loop.add_signal_handler(signal.SIGHUP, self._stop.set)
        if self._wishes.until_eof:
            self._watch_stdin(loop)
        serving = asyncio.ensure_future(
            self._http.serve(sockets=[self._bound, *([self._own.bound] if self._own else [])])
        )
        starting = asyncio.ensure_future(self._engine.start())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises what the loading raised
                self._announce()
                self._tell_choices()
                self._log.event("ready", self._ready_line())
                self._tell_ready()
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            self._withdraw()
            starting.cancel()
            stopping.cancel()
            self._http.should_exit = True
            await self._engine.stop(0)
            await serving
        return 0

    def _ready_line(self) -> str:
        where = str(self._wishes.uds) if self._wishes.uds else listen.url_of(self._bound)
        return f"serving {self._name} at {where}"

    def _tell_choices(self) -> None:
        """What the engine has chosen for this machine, and why, with --verbose."""
        facts = self._engine.facts
        if self._settings.verbose and facts is not None:
            for name, (value, why) in facts.choices.items():
                self._log.event("choice", f"{name} = {value} ({why})")

    def _tell_ready(self) -> None:
        if self._ready_file is not None:
            uds = self._wishes.uds
            url = "http://localhost" if uds else listen.url_of(self._bound)
            key = next(iter(self._wishes.api_keys), None)
            self._ready_file.write(url=url, key=key, model=self._name, socket=uds)

    def _on_signal(self) -> None:
        self._is_urgent = self._stop.is_set()
        self._stop.set()
        if self._is_urgent:
            self._service.hurry()

    def _watch_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """End when whoever holds the other end of stdin lets go of it, killed or not."""

        def read() -> None:
            if not os.read(terminal.STDIN, 1 << 16):
                loop.remove_reader(terminal.STDIN)
                self._stop.set()

        loop.add_reader(terminal.STDIN, read)

    def _announce(self) -> None:
        facts = self._engine.facts
        if self._own is None or facts is None:
            return
        settings = self._settings
        with suppress(OSError):
            presence.announce(
                presence.Presence(
                    pid=os.getpid(),
                    host=presence.this_machine(),
                    socket=str(self._own.path),
                    files=self._own.states,
                    name=self._name,
                    format=facts.format,
                    n_limit=facts.n_limit,
                    is_whole=settings.ctx_size is None and "context_limit" not in facts.choices,
                    max_tokens=settings.max_tokens,
                    gpu_layers=settings.gpu_layers,
                    threads=settings.threads,
                    device=facts.device,
                    choices=facts.choices,
                )
            )

    def _withdraw(self) -> None:
        if self._own is not None:
            presence.withdraw(self._own.path)

    async def _drain(self) -> None:
        self._withdraw()
        n_unfinished = self._service.n_unfinished
        if n_unfinished:
            self._log.event("draining", f"finishing {n_unfinished} answers; a second signal stops at once")
        if not await self._service.drain(self._wishes.grace):
            self._log.event("draining", f"{self._service.n_unfinished} answers were not finished in time")


def _names(name: str) -> frozenset[str]:
    """Everything that means the model in a request."""
    return frozenset({name, Path(name).stem if name.endswith(".gguf") else name})


def _defaults(settings: Settings) -> SamplingParams:
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
    )
