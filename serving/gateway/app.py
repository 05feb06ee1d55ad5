"""The gateway's ASGI app. `_generate` is the life of a chat request; each line of it is a room of its own.

No Ray here: a Serve replica (`deployment.py`) feeds the catalog and the directory's table in, tests do it by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import Any

import msgspec

from serving import tasks
from serving.errors import (
    BadRequest,
    DeadlinePassed,
    EngineBroken,
    Internal,
    LimitReached,
    QueueFull,
    RequestError,
    ScopeMissing,
    UnknownModel,
)
from serving.gateway import routes
from serving.gateway.admission import Admission
from serving.gateway.attempts import Attempts, crashed
from serving.gateway.delivery import used
from serving.gateway.exchange import ClientGone, Exchange, Receive, Scope, Send, rest
from serving.gateway.fuse import Charge
from serving.gateway.hold import KeepAlive
from serving.gateway.keys import Key, KeyRing
from serving.gateway.order import RANK
from serving.gateway.own import OwnRoutes, visible
from serving.gateway.prefix import BLOCK_BYTES, blocks_of, stable_hash
from serving.gateway.queue import Ticket
from serving.gateway.relay import Engines, error_event
from serving.gateway.routes import Route
from serving.gateway.sent import Store
from serving.gateway.sizes import check_input, has_media
from serving.gateway.state import Fleet, ModelConfig, Name
from serving.telemetry.logs import RequestLog
from serving.telemetry.metrics import (
    KEYS_SHOWN,
    UNKNOWN_MODEL,
    GatewayMetrics,
    ModelMetrics,
    set_all,
    slo_verdict,
)
from serving.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

MAX_REQUESTS = 10_000  # inside one gateway at once; file descriptors and memory are finite
SILENCE_CHECK_EVERY_S = 0.5
BODY_TIMEOUT_S = 60.0  # for the whole request body to arrive
LAST_WORD_S = 5.0  # for a client to take its error
KEYS_CHECK_EVERY_S = 1.0
CLASS_HEADER = b"x-steelyard-class"
TIMEOUT_HEADER = b"x-steelyard-timeout"
SESSION_HEADER = b"x-session-id"


class Gateway:
    """One gateway process: `await gateway.start()` once, then it is an ASGI app."""

    def __init__(
        self,
        *,
        gateway_id: str,
        keys: KeyRing,
        secret: str,
        metrics: GatewayMetrics,
        log: RequestLog,
        node: str = "",
        tracing: Tracing | None = None,
    ) -> None:
        self.id = gateway_id
        self.fleet = Fleet(gateway_id, node)
        self._admission = Admission(self.fleet.elsewhere)
        self.metrics = metrics
        metrics.before_text = self._observe
        self._suspects = asyncio.Event()  # there are new ones
        self.fleet.fuse.on_suspects = self._suspects.set
        self.requests = 0  # inside now
        self.draining = False  # `/readyz` says so; what is connected is answered all the same
        self.private_port = 0  # the listener for siblings; set by whoever opens it
        self.keys = keys
        self._secret = secret
        self._log = log
        self._tracing = tracing
        self._engines: Engines | None = None
        self._store = Store()
        self._own = OwnRoutes(gateway_id, self.fleet, metrics, secret, lambda: self.draining)
        self.sources = self._own.sources  # name -> exposition of what has no listener of its own
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._engines = Engines(self._secret)
        await self._own.start()
        self._tasks = [
            tasks.for_ever("reading the keys file", self._reload_keys),
            tasks.for_ever("minding silent engines", self._mind_silence),
            tasks.for_ever("recalling suspects", self._recall_suspects),
        ]

    async def stop(self) -> None:
        """After the last request. Closes connections to engines and writes out the log."""
        for task in self._tasks:
            task.cancel()
        if self._engines is not None:
            self._engines.close()
        await self._own.stop()
        await asyncio.to_thread(self._log.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(Exchange(scope, receive, send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    # -- the flow ------------------------------------------------------------------------------------------------

    async def _http(self, x: Exchange) -> None:
        """Every request ends in exactly one terminal event: an answer, an error, or a client that left."""
        self.requests += 1
        try:
            await self._dispatch(x)
        except RequestError as e:
            await self._failed(x, e)
        except ClientGone:
            x.line.client_gone, x.line.reason = True, "client_gone"
        except Exception:
            log.exception("unexpected", extra={"request_id": x.request_id})
            await self._failed(x, Internal())
        finally:
            self.requests -= 1
            if x.path in routes.SERVED or x.line.status >= 400:
                self._write_down(x)

    async def _dispatch(self, x: Exchange) -> None:
        if self.private_port and x.came_by[1] == self.private_port:
            await self._own.sibling(x)
            return
        if routes.OWN.get(x.path) == "":  # health needs no key
            routes.match(x.method, x.path)
            await self._own.answer(x.path, x, None)
            return
        key = self.keys.check(x.token, time.time())
        x.line.key_id = key.id
        route = routes.match(x.method, x.path)
        if isinstance(route, Route):
            await self._generate(x, route, key)
            return
        scope = routes.OWN[route]
        if scope and not key.allows(scope):
            raise ScopeMissing(f"this key lacks the scope `{scope}`")
        await self._own.answer(route, x, key)

    async def _generate(self, x: Exchange, route: Route, key: Key) -> None:
        engines = self._engines
        assert engines is not None
        if self._tracing is not None:
            self._trace(x, key, self._tracing)
        if self.requests > MAX_REQUESTS:
            raise QueueFull(f"this gateway already holds {MAX_REQUESTS} requests", retry_after_s=1)
        body = await self._body(x)
        fields = routes.parse(body)
        name, model = self._admit(x, key, fields["model"])
        self._admission.check_body(key, model, len(body))
        routes.check(route, fields, model.allow)
        check_input(model.limits.max_input_tokens, route, fields, len(body))
        line = self.fleet.line(name)
        ticket = _ticket(x, key, model, line.size_of(route, fields, len(body)))
        charge = Charge(self.fleet.fuse, line.version_id, route.path, name.adapter, fields)
        if charge.blown:
            raise crashed(charge, self.metrics.of(model.name), ticket)
        ticket.adapter = name.adapter
        if len(line.upstreams) > 1:  # else there is nothing to choose
            if len(body) >= BLOCK_BYTES:
                ticket.blocks = blocks_of(route, fields, name.adapter)
            ticket.session = _session(x, key, fields)
        x.line.stream = bool(fields.get("stream"))
        body, withhold = _adapted(body, fields, route, name)
        metrics = self.metrics.of(name.model, name.version, name.adapter or "")
        metrics.held.inc()
        entered = False
        try:
            self._enter(key, model, ticket, metrics)
            entered = True
            with _Watch(x, ticket.deadline - x.t0):
                keep_alive = KeepAlive(x, model.limits.keep_alive_after_s if x.line.stream and key.keep_alive else None)
                attempts = Attempts(
                    *(self.fleet, engines, self._store, x, route, line, model),
                    *(metrics, ticket, charge, keep_alive, body, withhold),
                )
                await attempts.answer()
            media = has_media(route, fields, len(body))
            line.sizes.learn(len(body), x.line.prompt_tokens, x.line.completion_tokens, media=media)
        finally:
            metrics.held.dec()
            if entered:
                self._admission.leave(key, model, ticket.tokens, used(x))
            if x.line.queue_ms is not None:  # of all its attempts together: one that is told `busy` waits on
                metrics.queue_wait(ticket.class_).observe(x.line.queue_ms / 1e3)

    def _enter(self, key: Key, model: ModelConfig, ticket: Ticket, metrics: ModelMetrics) -> None:
        try:
            self._admission.enter(key, model, ticket.tokens, time.monotonic())
        except LimitReached as e:
            metrics.rejected(e.code, ticket.class_)
            raise

    # -- the rooms of the flow -----------------------------------------------------------------------------------

    async def _body(self, x: Exchange) -> bytes:
        limit = max((m.limits.max_body_bytes for m in self.fleet.models.values()), default=1 << 20)
        reading = x.body(limit)
        try:
            waits_for = reading.send(None)
        except StopIteration as end:  # it came with the headers
            return bytes(end.value)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await rest(reading, waits_for)
        except TimeoutError:
            raise DeadlinePassed(f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None

    def _admit(self, x: Exchange, key: Key, wanted: str) -> tuple[Name, ModelConfig]:
        """What the name means (404 names what this key may use), and whether the key covers it (403)."""
        try:
            name, model = self.fleet.resolve(wanted)
        except UnknownModel:
            shown = wanted if len(wanted) <= 100 else wanted[:100] + "..."
            some = ", ".join(visible(self.fleet.catalog, key)) or "nothing that this key may use"
            raise UnknownModel(f"there is no model {shown!r}; there is: {some}", param="model") from None
        if not key.allows(f"infer:{name.model}@{name.version}"):
            raise ScopeMissing(f"this key lacks the scope `infer:{name.model}`")
        x.line.model, x.line.version, x.line.adapter = name.model, name.version, name.adapter
        return name, model

    def _trace(self, x: Exchange, key: Key, tracing: Tracing) -> None:
        x.trace = tracing.begin(x.headers, trusted=key.allows("trace"))
        if x.trace is not None:
            x.line.trace_id = x.trace.id
            x.trace.step("auth", x.t0, time.monotonic())

    async def _failed(self, x: Exchange, error: RequestError) -> None:
        if x.ended:  # all was sent; only the engine's own end is missing
            return
        x.line.reason = error.code
        # Bounded: a client that does not read would hold the last word, and the request, for ever.
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                if x.started:
                    await x.end(error_event(x.path, x.dialect, error, x.request_id))
                else:
                    # Not after a 413: most clients read nothing before they have sent all, and would see a reset.
                    await x.fail(error, close=isinstance(error, DeadlinePassed))

    def _observe(self) -> None:
        """Gauges of what is elsewhere, when somebody looks."""
        fleet, m = self.fleet, self.metrics
        for c in fleet.catalog.models:
            for version in c.versions:  # series from the start: a rate sees their first increase
                m.of(c.name, version)
        set_all(m.replicas, fleet.replica_counts())
        set_all(m.replicas_required, fleet.required())
        set_all(m.objective, {(c.name,): c.slo.objective for c in fleet.catalog.models})
        expiries = self.keys.expiries(KEYS_SHOWN, time.time())
        set_all(m.key_expiry, {(key_id,): at for key_id, at in expiries.items()})

    def _write_down(self, x: Exchange) -> None:
        now = time.monotonic()
        e2e = now - x.t0
        line = x.line
        line.e2e_ms = round(e2e * 1e3, 3)
        if line.client_gone and not line.status:
            line.status = 499
        if line.status >= 500 or line.reason == EngineBroken.code:
            line.level = "error"
        route = x.path if x.path in routes.SERVED or x.path in routes.OWN else "other"
        reason = line.reason or "ok"
        metrics = self.metrics.of(line.model or UNKNOWN_MODEL, line.version or "", line.adapter or "")
        metrics.request_done(route, line.status, reason, e2e)
        model = self.fleet.models.get(line.model or "")
        if model is not None:
            ttft_s = None if line.ttft_ms is None else line.ttft_ms / 1e3
            verdict = slo_verdict(line.status, reason, ttft_s, model.slo.ttft_s)
            if verdict is not None:
                metrics.judged(verdict)
        if route == "other":
            line.route = x.path[:200]
        self._log.write(line)
        if x.trace is not None and self._tracing is not None:
            self._tracing.end(x.trace, line, x.method, x.t0, now)

    async def _recall_suspects(self) -> None:
        """Once for all who were inside an engine that died."""
        while True:
            await self._suspects.wait()
            self._suspects.clear()
            now = time.monotonic()
            for line in tuple(self.fleet.lines.values()):
                if line.running:
                    await line.recall_suspects(now)

    async def _mind_silence(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_CHECK_EVERY_S)
            now = time.monotonic()
            for line in self.fleet.lines.values():
                if line.running:
                    line.give_up_on_the_silent(now)

    async def _reload_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_CHECK_EVERY_S)
            error = self.keys.reload_if_changed()
            if error is not None:
                log.error("the keys file cannot be used, the last good keys stay: %s", error)


class _Watch:
    """While a request runs: a client that leaves, or a deadline that passes, cancels it once.

    One task per request waits for the disconnect; nothing is polled. The cancellation comes out of the `with` block as
    ClientGone or DeadlinePassed.
    """

    def __init__(self, x: Exchange, timeout_s: float) -> None:
        self._x = x
        self._timeout_s = timeout_s
        self._why: type[Exception] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(
            max(0.0, self._x.t0 + self._timeout_s - time.monotonic()), self._cancel, DeadlinePassed
        )
        self._listener = loop.create_task(self._until_disconnect())

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: Any) -> None:
        self._timer.cancel()
        self._listener.cancel()
        del self._listener  # cancelled, it keeps its traceback, and with that this object: a ring
        if kind is not None and issubclass(kind, asyncio.CancelledError) and self._why is not None:
            self._task.uncancel()
            if self._why is ClientGone:
                raise ClientGone from None
            raise DeadlinePassed(f"the request ran longer than its limit of {self._timeout_s:g} s") from None

    async def _until_disconnect(self) -> None:
        while (await self._x.receive())["type"] != "http.disconnect":
            pass
        if self._x.ended:  # the server says the same when all is sent
            return
        self._x.line.client_gone = True
        self._cancel(ClientGone)

    def _cancel(self, why: type[Exception]) -> None:
        if self._why is None:
            self._why = why
            self._task.cancel()


def _ticket(x: Exchange, key: Key, model: ModelConfig, tokens: int) -> Ticket:
    """The request's claim to a slot. Its client may ask for less than its key and model grant: a lower class by
    `x-steelyard-class`, a shorter time by `x-steelyard-timeout` (seconds)."""
    rank = RANK[key.class_]
    asked = x.headers.get(CLASS_HEADER)
    if asked is not None:
        lower = RANK.get(asked.decode("latin-1"))
        if lower is None:
            raise BadRequest(f"`x-steelyard-class` is one of {', '.join(RANK)}")
        if lower < rank:
            raise ScopeMissing(f"this key's requests are `{key.class_}`: `x-steelyard-class` can only lower that")
        rank = lower
    timeout_s = model.limits.request_timeout_s
    given = x.headers.get(TIMEOUT_HEADER)
    if given is not None:
        try:
            wanted = float(given)
        except ValueError:
            wanted = math.nan
        if not 0 < wanted < math.inf:
            raise BadRequest("`x-steelyard-timeout` is a number of seconds, above 0")
        timeout_s = min(timeout_s, wanted)
    return Ticket(since=x.t0, deadline=x.t0 + timeout_s, key=key.id, rank=rank, weight=float(key.weight), tokens=tokens)


def _session(x: Exchange, key: Key, fields: dict[str, Any]) -> int | None:
    """What requests of one conversation have in common, by the client's word; other keys' words are others."""
    given = x.headers.get(SESSION_HEADER) or fields.get("prompt_cache_key")
    if isinstance(given, str):
        given = given.encode("utf-8", "replace")
    return stable_hash(given, stable_hash(key.id.encode())) if isinstance(given, bytes) else None


def _adapted(body: bytes, fields: dict[str, Any], route: Route, name: Name) -> tuple[bytes, bool]:
    """The body for the engine, and whether the usage event must be kept from the client, who did not ask for it.

    Unchanged but for what must differ, which is added at the end: no second encoding.
    """
    withhold = False
    if name.sent_as is not None:
        body = routes.splice(body, b'"model":' + msgspec.json.encode(name.sent_as))
    if route.usage_by_option and fields.get("stream") is True:
        options = fields.get("stream_options") or {}
        if isinstance(options, dict) and not options.get("include_usage"):
            withhold = True
            # Alone, vLLM ignores it; with the usage that we ask for it would put counts into every event.
            asked = {k: v for k, v in options.items() if k != "continuous_usage_stats"} | {"include_usage": True}
            body = routes.splice(body, b'"stream_options":' + msgspec.json.encode(asked))
    return body, withhold
