"""The route table, and what every request passes: trace id, origin, key, the error door, metrics and log."""

from __future__ import annotations

import json
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from time import perf_counter, time

from llamacli.engine.sequence import SamplingParams
from llamacli.errors import LlamacliError
from llamacli.server import access, contract, description, embeddings, failure, openai, site
from llamacli.server.about import About, url_of
from llamacli.server.answering import Answering, Opens
from llamacli.server.exchange import ClientGone, Exchange, Receive, Scope, Send, event
from llamacli.server.failure import Failure
from llamacli.server.gate import Gate, Pass
from llamacli.server.log import Log, Record
from llamacli.server.metrics import CONTENT_TYPE as METRICS_TYPE
from llamacli.server.metrics import Metrics
from llamacli.server.recorder import Tape
from llamacli.server.rehearsal import Rehearsal
from llamacli.server.service import Service
from llamacli.server.simulation import CutOff
from llamacli.server.stage import ROUTES, Sent

MODEL_PATH = "/v1/models/"
MAX_LOGGED = 300  # characters of a path
CLIENT_GONE = 499  # nginx's number for a client that went away; for the log alone

Handler = Callable[["Call"], Awaitable[None]]


@dataclass(slots=True)
class Call:
    """One request on its way through the server.

    moment   seconds since 1970
    raw      its body; None before it has been read
    script   what answers in the engine's place
    tape, sent   of a rehearsal: what listens to the answer, and what is remembered of the request
    """

    exchange: Exchange
    record: Record
    started: float
    entry: Pass = field(default_factory=Pass)
    moment: int = 0
    raw: bytes | None = None
    script: Opens | None = None
    tape: Tape | None = None
    sent: Sent | None = None

    @property
    def trace_id(self) -> str:
        return self.record.trace_id


@dataclass(frozen=True, slots=True)
class Route:
    """is_open    needs no key
    is_work    asks the engine: counts against the limits of a key, and in its usage
    """

    handler: Handler
    is_open: bool = False
    is_work: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model as clients know it.

    name       what it is called in answers
    names      everything that means it in a request
    piece_of   a token's own bytes
    """

    name: str
    names: frozenset[str]
    piece_of: openai.Piece
    created: int = field(default_factory=lambda: int(time()))

    @property
    def plain_name(self) -> str:
        """Without its directory: who has no key need not learn where the file lies."""
        return PurePath(self.name).stem if self.name.endswith(".gguf") else self.name


class App:
    """The ASGI application.

    defaults   sampling where a request says nothing
    max_body   bytes, which must be there within body_seconds
    rehearsal    what is different where clients are tested
    own_socket   path of the Unix socket that only this server's user can open: who comes by it may do everything
    """

    def __init__(
        self,
        service: Service,
        *,
        served: Served,
        defaults: SamplingParams,
        origins: access.Origins,
        gate: Gate,
        metrics: Metrics,
        log: Log,
        max_body: int,
        body_seconds: float,
        rehearsal: Rehearsal | None = None,
        own_socket: str | None = None,
    ) -> None:
        self._own_socket = own_socket
        self._service = service
        self._served = served
        self._defaults = defaults
        self._origins = origins
        self._gate = gate
        self._metrics = metrics
        self._log = log
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._rehearsal = rehearsal or Rehearsal()
        self._routes = self._table()

    def _table(self) -> dict[str, dict[str, Route]]:
        table = {path: {"POST": Route(self._get_data, is_work=True)} for path in contract.PATHS}
        table["/"]["GET"] = Route(self._page, is_open=True)
        table |= {path: {"GET": Route(self._asset, is_open=True)} for path in site.ASSETS}
        if self._rehearsal.stage is not None:
            table |= {path: {method: Route(self._obey)} for path, method in ROUTES.items()}
        return table | {
            "/openapi.json": {"GET": Route(self._describe, is_open=True)},
            "/v1/chat/completions": {"POST": Route(self._chat, is_work=True)},
            "/v1/completions": {"POST": Route(self._completion, is_work=True)},
            "/v1/embeddings": {"POST": Route(self._embeddings, is_work=True)},
            "/v1/models": {"GET": Route(self._models)},
            "/health": {"GET": Route(self._health, is_open=True)},
            "/ready": {"GET": Route(self._ready, is_open=True)},
            "/metrics": {"GET": Route(self._show_metrics, is_open=self._origins.is_loopback)},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "started without lifespan and websockets"
        exchange = Exchange(scope, receive, send)
        origin = self._rehearsal.origin
        is_work = exchange.method == "POST" and self._is_work(exchange.path)
        trace = origin.trace_id(exchange.headers, is_work=is_work)
        record = Record(exchange.method, exchange.shown_path[:MAX_LOGGED], trace)
        call = Call(exchange, record, perf_counter(), moment=origin.now())
        exchange.extra.append(("x-trace-id", call.trace_id))
        try:
            with suppress(ClientGone, CutOff):  # while it was told of an error
                await self._guarded(call)
        finally:
            self._note(call)

    async def _guarded(self, call: Call) -> None:
        """The one door for errors: what is expected is told to the client; a bug is too, and its traceback logged."""
        try:
            await self._handle(call)
        except Failure as error:
            await self._fail(call, error)
        except LlamacliError as error:
            await self._fail(call, failure.of(error))
        except ClientGone:
            call.record.status = CLIENT_GONE
        except CutOff:
            pass  # the client has got what was asked for
        except Exception as error:
            self._log.event("bug", "".join(traceback.format_exception(error)).rstrip())
            message = f"an unexpected error ({type(error).__name__}); the server's log tells more under this trace id"
            await self._fail(call, Failure(500, message))

    async def _handle(self, call: Call) -> None:
        exchange = call.exchange
        if exchange.refusal is not None:
            raise exchange.refusal
        is_own = exchange.socket is not None and exchange.socket == self._own_socket
        if not is_own:
            self._origins.check(exchange.headers)
        exchange.extra += self._origins.answer_headers(exchange.headers)
        if access.is_preflight(exchange.method, exchange.headers):
            await exchange.respond(204, b"", headers=access.preflight_headers(exchange.headers))
            return
        if self._rehearsal.stage is not None:
            call.raw = await self._body(call)
            call.sent = self._rehearsal.hear(exchange, call.raw)
        route = self._route(exchange)
        if not route.is_open and not is_own:
            call.entry = self._gate.check(exchange)
            call.record.key = call.entry.name
        if route.is_work:
            self._gate.admit(call.entry)
        if self._rehearsal.is_idle:
            await route.handler(call)
        else:
            await self._rehearse(call, route)

    async def _rehearse(self, call: Call, route: Route) -> None:
        rehearsal, exchange, record = self._rehearsal, call.exchange, call.record
        if not route.is_work:
            await rehearsal.befall(exchange, record, call.raw or b"", is_work=False)
            await route.handler(call)
            return

        async def run(script: Opens | None) -> None:
            call.script = script
            await route.handler(call)

        with self._service.beside():
            call.raw = await self._body(call)
            call.tape = rehearsal.listen(exchange)
            await rehearsal.befall(exchange, record, call.raw, is_work=True)
            await rehearsal.answer(exchange, record, call.raw, run)

    def _route(self, exchange: Exchange) -> Route:
        methods = self._routes.get(exchange.path)
        model_path = exchange.path.startswith(MODEL_PATH)
        if methods is None and model_path:
            methods = {"GET": Route(self._model)}
        if methods is None:
            raise Failure(
                404, f"there is nothing at {exchange.shown_path[:100]}; the Llama 2 API is at POST /v1/getData"
            )
        route = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if route is None:
            allowed = ", ".join(sorted(methods))
            raise Failure(
                405, f"{exchange.path} answers {allowed}, not {exchange.method[:20]}", headers={"allow": allowed}
            )
        return route

    async def _fail(self, call: Call, error: Failure) -> None:
        """Tell the client: by an event in place of the end where its answer has begun already."""
        exchange = call.exchange
        call.record.error = error.message
        body = failure.body(error, exchange.path, call.trace_id)
        if exchange.status is None:
            await exchange.respond(error.status, body, headers=error.headers.items())
        else:
            call.record.status = error.status
            await exchange.events(event(body.decode()), last=True, closes=True)

    def _note(self, call: Call) -> None:
        record, exchange = call.record, call.exchange
        record.status = record.status or exchange.status or CLIENT_GONE
        record.seconds = perf_counter() - call.started
        route = exchange.path if exchange.path in self._routes else "other"
        if exchange.path.startswith(MODEL_PATH):
            route = f"{MODEL_PATH}{{model}}"
        self._metrics.request(route, record.status, record.prompt_tokens, record.completion_tokens)
        is_counted = exchange.method == "POST" and self._is_work(exchange.path)
        self._gate.leave(call.entry, record, is_counted=is_counted)
        self._log.request(record)
        if call.tape is not None:
            self._rehearsal.keep(call.tape, exchange, record, call.raw or b"")
        if call.sent is not None:
            call.sent.status = record.status

    def _is_work(self, path: str) -> bool:
        return any(route.is_work for route in self._routes.get(path, {}).values())

    # -- routes that ask the model --

    async def _get_data(self, call: Call) -> None:
        request = contract.read(await self._body(call), self._defaults)
        shape = contract.ContractShape(self._served.name, call.trace_id, request.ignored)
        await self._answering(call).answer(call.exchange, call.record, request.ask, shape)

    async def _chat(self, call: Call) -> None:
        request = openai.read_chat(await self._body(call), self._defaults)
        model = self._model_of(call, request.model)
        frame = openai.frame("chatcmpl", call.trace_id, model, call.moment)
        shape = openai.ChatShape(frame, request, self._served.piece_of)
        await self._answering(call).answer(call.exchange, call.record, request.ask, shape)

    async def _completion(self, call: Call) -> None:
        request = openai.read_completion(await self._body(call), self._defaults)
        model = self._model_of(call, request.model)
        frame = openai.frame("cmpl", call.trace_id, model, call.moment)
        shape = openai.CompletionShape(frame, request, self._served.piece_of)
        await self._answering(call).answer(call.exchange, call.record, request.ask, shape)

    async def _embeddings(self, call: Call) -> None:
        request = embeddings.read(await self._body(call))
        model = self._model_of(call, request.model)
        made = await self._answering(call).embed(call.exchange, call.record, request.inputs)
        await call.exchange.respond(200, embeddings.body(request, made.vectors, made.n_tokens, model))

    async def _body(self, call: Call) -> bytes:
        if call.raw is None:
            call.raw = await call.exchange.body(self._max_body, self._body_seconds)
        return call.raw

    def _answering(self, call: Call) -> Answering:
        return Answering(call.script or self._service, self._metrics)

    def _model_of(self, call: Call, name: str | None) -> str:
        """What an answer calls its model. Raises Failure 404 for one that is not served here."""
        if call.script is not None:  # a test speaks for whatever model its client asks for
            return name or self._served.name
        self._check_model(name)
        return self._served.name

    def _check_model(self, name: str | None, shown: str | None = None) -> None:
        if name is not None and name not in self._served.names:
            shown = name if shown is None else shown
            raise Failure(
                404,
                f"the model {shown[:100]!r} is not served here; this server has {self._served.name!r}",
                param="model",
                code="model_not_found",
            )

    # -- routes that do not --

    async def _obey(self, call: Call) -> None:
        assert self._rehearsal.stage is not None
        await _send_json(call, 200, self._rehearsal.stage.obey(call.exchange, await self._body(call)))

    async def _models(self, call: Call) -> None:
        listed = [openai.model_object(self._served.name, self._served.created)]
        await _send_json(call, 200, {"object": "list", "data": listed})

    async def _model(self, call: Call) -> None:
        exchange = call.exchange
        self._check_model(exchange.path.removeprefix(MODEL_PATH), exchange.shown_path.removeprefix(MODEL_PATH))
        await _send_json(call, 200, openai.model_object(self._served.name, self._served.created))

    async def _health(self, call: Call) -> None:
        await _send_json(call, 200, {"status": "ok"})

    async def _ready(self, call: Call) -> None:
        state = "draining" if self._service.is_draining else self._service.engine.state
        await _send_json(call, 200 if state == "ready" else 503, {"status": state})

    async def _show_metrics(self, call: Call) -> None:
        await call.exchange.respond(200, self._metrics.text(), METRICS_TYPE)

    # -- what the server says of itself --

    async def _page(self, call: Call) -> None:
        await _send_asset(call, site.page(self._about(call)))

    async def _asset(self, call: Call) -> None:
        await _send_asset(call, site.ASSETS[call.exchange.path])

    async def _describe(self, call: Call) -> None:
        await _send_json(call, 200, description.describe(self._about(call)))

    def _about(self, call: Call) -> About:
        engine, facts = self._service.engine, self._service.engine.facts
        return About(
            url=url_of(call.exchange),
            model=self._served.plain_name,
            needs_key=self._gate.needs_key,
            is_local=self._origins.is_loopback,
            defaults=self._defaults,
            max_body=self._max_body,
            slots=self._service.slots,
            queue=self._service.queue,
            state="draining" if self._service.is_draining else engine.state,
            simulates=self._rehearsal.stage is not None,
            context=facts.n_limit if facts else None,
            format=facts.format if facts else None,
            device=facts.device if facts else None,
        )


async def _send_asset(call: Call, asset: site.Asset) -> None:
    await call.exchange.respond(200, asset.body, asset.content_type, headers=site.HEADERS)


async def _send_json(call: Call, status: int, value: object) -> None:
    await call.exchange.respond(status, json.dumps(value, ensure_ascii=False).encode())
