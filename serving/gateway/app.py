"""The gateway's ASGI app. `_generate` is the life of a chat request; each line of it is a room of its own.

No Ray here: a Serve replica (`deployment.py`) feeds the catalog and the directory's table in, tests do it by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Awaitable
from typing import Any

import msgspec

from serving.errors import (
    BadRequest,
    DeadlinePassed,
    EngineBroken,
    Internal,
    LimitReached,
    NoReplica,
    QueueFull,
    RequestCrashedEngine,
    RequestError,
    ScopeMissing,
    UnknownModel,
    WaitTooLong,
)
from serving.gateway import retry, routes
from serving.gateway.admission import Admission
from serving.gateway.exchange import ClientGone, Exchange, Receive, Scope, Send, rest
from serving.gateway.fuse import Charge
from serving.gateway.hold import NO_CACHE, KeepAlive
from serving.gateway.keys import Key, KeyRing
from serving.gateway.order import RANK
from serving.gateway.own import OwnRoutes, visible
from serving.gateway.prefix import BLOCK_BYTES, blocks_of, stable_hash
from serving.gateway.queue import Ticket, VersionLine, bound_wait
from serving.gateway.relay import Broken, Busy, Engines, Recalled, Reply, error_event
from serving.gateway.routes import Route
from serving.gateway.routing import Upstream
from serving.gateway.sizes import check_input, has_media
from serving.gateway.state import Fleet, ModelConfig, Name
from serving.telemetry.logs import RequestLog
from serving.telemetry.metrics import (
    KEYS_SHOWN,
    UNKNOWN_MODEL,
    GatewayMetrics,
    ModelMetrics,
    StreamMeter,
    set_all,
    slo_verdict,
)
from serving.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

MAX_REQUESTS = 10_000  # inside one gateway at once; file descriptors and memory are finite
MAX_ATTEMPTS = 3  # at different replicas; `_spent` says which count
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
        self._own = OwnRoutes(gateway_id, self.fleet, metrics, secret, lambda: self.draining)
        self.sources = self._own.sources  # name -> exposition of what has no listener of its own
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._engines = Engines(self._secret)
        await self._own.start()
        minding = self._reload_keys(), self._mind_silence(), self._recall_suspects()
        self._tasks = [asyncio.create_task(one) for one in minding]

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
            raise self._crashed(charge, self.metrics.of(model.name), ticket)
        ticket.adapter = name.adapter
        if len(line.upstreams) > 1:  # else there is nothing to choose
            if len(body) >= BLOCK_BYTES:
                ticket.blocks = blocks_of(route, fields, name.adapter)
            ticket.session = _session(x, key, fields)
        x.line.stream = bool(fields.get("stream"))
        body, withhold_usage = _adapted(body, fields, route, name)
        metrics = self.metrics.of(name.model, name.version, name.adapter or "")
        metrics.held.inc()
        entered = False
        try:
            self._enter(key, model, ticket, metrics)
            entered = True
            with _Watch(x, ticket.deadline - x.t0):
                keep_alive = KeepAlive(x, model.limits.keep_alive_after_s if x.line.stream and key.keep_alive else None)
                await self._answer(x, route, line, model, metrics, ticket, keep_alive, body, withhold_usage, charge)
            media = has_media(route, fields, len(body))
            line.sizes.learn(len(body), x.line.prompt_tokens, x.line.completion_tokens, media=media)
        finally:
            metrics.held.dec()
            if ticket.again is not None:
                ticket.again.close()
            if entered:
                self._admission.leave(key, model, ticket.tokens, _used(x))
            if x.line.queue_ms is not None:  # of all its attempts together: one that is told `busy` waits on
                metrics.queue_wait(ticket.class_).observe(x.line.queue_ms / 1e3)

    def _enter(self, key: Key, model: ModelConfig, ticket: Ticket, metrics: ModelMetrics) -> None:
        try:
            self._admission.enter(key, model, ticket.tokens, time.monotonic())
        except LimitReached as e:
            metrics.rejected(e.code, ticket.class_)
            raise

    async def _answer(
        self,
        x: Exchange,
        route: Route,
        line: VersionLine,
        model: ModelConfig,
        metrics: ModelMetrics,
        ticket: Ticket,
        keep_alive: KeepAlive,
        body: bytes,
        withhold_usage: bool,
        charge: Charge,
    ) -> None:
        """Binds the request to a replica and relays; failures before the first byte are tried elsewhere."""
        self.fleet.arrived[line.version_id] += 1
        again, failed, news_s = False, "", 0.0
        while True:
            ticket.suspicion = charge.suspicion
            if ticket.suspicion is not None:
                if not again:
                    self._admit_suspect(line, model, metrics, ticket)
                ticket.again = ticket.again or retry.Retry(line.retries, line.trials)
            if ticket.again is not None:
                await self._turn(x, line, model, metrics, ticket, ticket.again, charge, news_s)
                news_s = 0.0
            if failed:
                metrics.retried(failed)
                failed = ""
            upstream = await self._slot(x, line, model, metrics, ticket, keep_alive, again)
            if charge.blown:  # while it waited, engines died with the same request inside
                line.release(ticket)
                raise self._crashed(charge, metrics, ticket)
            if ticket.suspicion is None and charge.suspicion is not None:
                line.unsent(ticket)
                again = True
                continue
            x.line.replica = upstream.endpoint.id
            settle = line.release
            metrics.running.inc()
            trial_s = 0.0 if ticket.again is None else ticket.again.sent()
            try:
                reply = await self._open(x, upstream, route, body, withhold_usage, ticket, trial_s, charge)
                x.line.attempts += 1
                if ticket.again is not None:
                    ticket.again.close()
                line.entered(ticket)
                if reply.scan is not None:
                    line.answered_first(ticket)
                await self._deliver(x, route, reply, metrics)
                self.fleet.finished[line.version_id] += 1
                if reply.crashed:
                    _count_death(x, charge, begun=True)
                elif reply.scan is None or reply.finished:
                    charge.survived()
                _attempted(x, metrics, "died" if reply.scan is not None and reply.scan.died else "ok")
                return
            except Busy as e:
                _attempted(x, metrics, "busy")
                settle, again = line.busy, True
                if e.occupied and ticket.again is not None:
                    settle = line.unsent
                    ticket.again.occupied()
            except Recalled:
                _attempted(x, metrics, "recalled")
                settle, again = line.unsent, True
            except Broken as e:
                x.line.attempts += 1
                _attempted(x, metrics, e.outcome)
                log.warning("attempt %d failed: %s", x.line.attempts, e, extra={"request_id": x.request_id})
                settle, again, failed = (line.broken if e.gone else line.failed), True, e.outcome
                ticket.again = ticket.again or retry.Retry(line.retries, line.trials)
                trial_s = ticket.again.trial_s
                ticket.again.close()
                ticket.avoid |= line.on_node_of(upstream) if e.unreachable else {upstream.endpoint.id}
                if e.killed:
                    # Who came to an engine that stood still already is not the one that stopped it.
                    _count_death(x, charge, trial_s if e.outcome == "died" else 0.0)
                elif e.outcome == "connect_error":
                    ticket.again.unreached += 1
                elif _spent(x, ticket.again, charge) >= MAX_ATTEMPTS:
                    raise _out_of_attempts(x, line) from None
                if e.killed or ticket.suspicion is not None:  # who finds nobody at its home may come after a copy
                    news_s = retry.news_s(line.siblings, last=charge.blown)
                if e.answered and not line.ready_ids() - ticket.avoid:
                    raise EngineBroken(f"{line.version_id}: its engine answered with an internal error") from None
            except asyncio.CancelledError:
                _attempted(x, metrics, "client_gone" if x.line.client_gone else "timeout")
                raise
            finally:
                metrics.running.dec()
                settle(ticket)

    def _admit_suspect(self, line: VersionLine, model: ModelConfig, metrics: ModelMetrics, ticket: Ticket) -> None:
        others = self.fleet.waiting(model) - line.waiting
        try:
            line.admit_suspect(ticket, others=others, max_queue=model.limits.max_queue)
        except QueueFull as e:
            metrics.rejected(e.code, ticket.class_)
            raise

    def _crashed(self, charge: Charge, metrics: ModelMetrics, ticket: Ticket) -> RequestCrashedEngine:
        metrics.rejected(RequestCrashedEngine.code, ticket.class_)
        log.error("refused: engines died with %s inside; it stays refused for a while", charge.print)
        return RequestCrashedEngine(
            "engines died while they had this request: it is not tried again, and the same one is refused for some minutes"
        )

    async def _turn(
        self,
        x: Exchange,
        line: VersionLine,
        model: ModelConfig,
        metrics: ModelMetrics,
        ticket: Ticket,
        again: retry.Retry,
        charge: Charge,
        news_s: float,
    ) -> None:
        """Waits for a place among the retries, as long as the request may wait at all. `news_s`: first for the other gateways'
        word, by which it may have been the last time; that counts against its deadline only."""
        began = heard = time.monotonic()
        waited_s = (x.line.queue_ms or 0.0) / 1e3
        home = None if ticket.suspicion is None else functools.partial(line.home, ticket)
        waiting = metrics.waiting(ticket.class_)
        waiting.inc()
        try:
            if news_s:
                await asyncio.sleep(news_s)
                heard = time.monotonic()
            if charge.blown:
                raise self._crashed(charge, metrics, ticket)
            if _spent(x, again, charge) >= MAX_ATTEMPTS:
                raise _out_of_attempts(x, line)
            async with asyncio.timeout(bound_wait(model.limits.max_wait_s - waited_s, ticket.deadline)):
                await again.turn(home)
        except TimeoutError:
            raise EngineBroken(
                "an engine failed with it, and too many other requests are being tried again", retry_after_s=1
            ) from None
        finally:
            waiting.dec()
            now = time.monotonic()
            x.line.queue_ms = round((waited_s + now - heard) * 1e3, 3)
            if x.trace is not None:
                x.trace.step("retry wait", began, now)

    async def _slot(
        self,
        x: Exchange,
        line: VersionLine,
        model: ModelConfig,
        metrics: ModelMetrics,
        ticket: Ticket,
        keep_alive: KeepAlive,
        again: bool,
    ) -> Upstream:
        began = time.monotonic()
        waited_s = (x.line.queue_ms or 0.0) / 1e3  # in earlier attempts
        patience_s = bound_wait(model.limits.max_wait_s - waited_s, ticket.deadline)
        waiting = metrics.waiting(ticket.class_)
        waiting.inc()
        try:
            if line.version_id in self.fleet.asleep:
                self.fleet.wake(line, patience_s)
            async with keep_alive:
                return await line.take(
                    ticket,
                    others=self.fleet.waiting(model) - len(line),
                    max_queue=model.limits.max_queue,
                    max_wait_s=patience_s,
                    again=again,
                )
        except (QueueFull, WaitTooLong, NoReplica) as e:
            metrics.rejected(e.code, ticket.class_)
            raise
        except BaseException:
            if ticket.upstream is not None:  # it was bound in the same instant
                line.release(ticket)
            raise
        finally:
            waiting.dec()
            now = time.monotonic()
            x.line.queue_ms = round((x.line.queue_ms or 0.0) + (now - began) * 1e3, 3)
            if x.trace is not None:
                x.trace.class_ = ticket.class_
                x.trace.step("queue", began, now if ticket.upstream is None else ticket.bound_at)

    async def _open(
        self,
        x: Exchange,
        upstream: Upstream,
        route: Route,
        body: bytes,
        withhold_usage: bool,
        ticket: Ticket,
        trial_s: float,
        charge: Charge,
    ) -> Reply:
        assert self._engines is not None
        trace = b""
        if x.trace is not None:
            e = upstream.endpoint
            trace = x.trace.sent(e.id, e.node, ticket.bound_at, time.monotonic())
        reply = await self._engines.open(
            upstream,
            route,
            body,
            x.request_id,
            withhold_usage=withhold_usage,
            trace=trace,
            tokens=ticket.tokens,
            trial_s=trial_s,
            charge=charge if ticket.suspicion is None else None,
            stream=x.line.stream,
            patient=x.line.attempts + 1 >= MAX_ATTEMPTS,
        )
        if x.trace is not None:
            x.trace.answered(time.monotonic(), streamed=reply.scan is not None)
        return reply

    async def _deliver(self, x: Exchange, route: Route, reply: Reply, metrics: ModelMetrics) -> None:
        meter = metrics.stream(x.t0)
        scan = reply.scan
        try:
            if scan is None:
                assert reply.body is not None
                if x.started:  # keep-alives left already
                    raise _refusal(reply)
                await x.answer(reply.status, reply.body, reply.content_type)
                x.line.reason = "ok" if reply.status < 400 else "engine_refused"
                _count_unstreamed(x, reply, metrics)
                return
            await self._stream(x, route, reply, meter)
        finally:
            reply.close()
            meter.flush()
            if scan is not None:
                x.line.events = scan.events
                _count_streamed(x, reply, metrics)
            if meter.ttft_s is not None:
                x.line.ttft_ms = round(meter.ttft_s * 1e3, 3)
            if (itl_s := meter.itl_s) is not None:
                x.line.itl_p50_ms, x.line.itl_max_ms = round(itl_s[0] * 1e3, 3), round(itl_s[1] * 1e3, 3)

    async def _stream(self, x: Exchange, route: Route, reply: Reply, meter: StreamMeter) -> None:
        """Bytes as they come. After the first one left, trouble is one error event and the end."""
        scan = reply.scan
        assert scan is not None
        if not x.started:
            await x.start(reply.status, reply.content_type, NO_CACHE)
        await reply.relay(_Client(x, meter))
        if reply.finished:
            x.line.reason = "ok"
            return
        scan.died = True
        how = reply.error or scan.error[:300].decode(errors="replace") or "it ended without its end"
        log.warning("stream broken after %d events: %s", scan.events, how, extra={"request_id": x.request_id})
        error = EngineBroken("the engine died while it generated; what came before is incomplete")
        x.line.reason = error.code
        await x.end(error_event(route.path, x.dialect, error, x.request_id))

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


class _Client:
    """The client as a stream's sink (`relay.Sink`), with the times of its pieces."""

    __slots__ = ("_chunk", "_count", "_x")

    def __init__(self, x: Exchange, meter: StreamMeter) -> None:
        self._x = x
        self._chunk = x.chunks()
        self._count = meter.chunk

    def push(self, data: bytes) -> Awaitable[None] | None:
        slow = self._x.push(data)
        self._count(time.monotonic())
        return slow

    def chunk(self, data: bytes) -> bool:
        if self._chunk is None or not self._chunk(data):
            return False
        self._count(time.monotonic())
        return True

    def end(self, data: bytes) -> Awaitable[None] | None:
        slow = self._x.push_end(data)
        if data:
            self._count(time.monotonic())
        return slow


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


def _attempted(x: Exchange, metrics: ModelMetrics, outcome: str) -> None:
    metrics.attempted(outcome)
    if x.trace is not None:
        x.trace.attempted(outcome, time.monotonic())


def _spent(x: Exchange, again: retry.Retry, charge: Charge) -> int:
    """Attempts that count. Not those that no engine had: where a node is lost, whoever waits for the successor of the only engine
    finds nobody there, second after second, until the tables know; `max_wait_s` bounds that."""
    return x.line.attempts - again.unreached - charge.excused


def _out_of_attempts(x: Exchange, line: VersionLine) -> EngineBroken:
    return EngineBroken(f"{line.version_id}: {x.line.attempts} attempts failed")


def _count_death(x: Exchange, charge: Charge, trial_s: float = 0.0, *, begun: bool = False) -> None:
    """An engine died with this request inside, which was on trial there for so long, or not (0)."""
    deaths = charge.died(x.line.replica or "", trial_s, begun=begun)
    how = "on trial" if trial_s else "inside"
    log.warning("an engine died with %s %s, %d by now", charge.print, how, deaths, extra={"request_id": x.request_id})


def _session(x: Exchange, key: Key, fields: dict[str, Any]) -> int | None:
    """What requests of one conversation have in common, by the client's word; other keys' words are others."""
    given = x.headers.get(SESSION_HEADER) or fields.get("prompt_cache_key")
    if isinstance(given, str):
        given = given.encode("utf-8", "replace")
    return stable_hash(given, stable_hash(key.id.encode())) if isinstance(given, bytes) else None


def _used(x: Exchange) -> int | None:
    """Tokens that an ended request has used: none when it was refused, None when the engine did not say."""
    line = x.line
    if not line.attempts or not x.started or line.status >= 400:
        return 0
    if line.prompt_tokens is None and line.completion_tokens is None:
        return None
    return (line.prompt_tokens or 0) + (line.completion_tokens or 0)


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


class _EngineMessage(msgspec.Struct):
    message: str = ""


class _EngineError(msgspec.Struct):
    error: _EngineMessage


def _refusal(reply: Reply) -> RequestError:
    """An engine's answer that is no stream, for a client that got a stream's 200 already."""
    message = ""
    with contextlib.suppress(msgspec.MsgspecError):
        message = msgspec.json.decode(reply.body or b"", type=_EngineError).error.message
    if reply.status < 500:
        return BadRequest(message or f"the engine refused the request with status {reply.status}")
    return EngineBroken(f"the engine answered with status {reply.status}")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _UnstreamedUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Unstreamed(msgspec.Struct):
    usage: _UnstreamedUsage | None = None
    choices: tuple[_Choice, ...] = ()
    stop_reason: str | None = None  # of a message
    status: str | None = None  # of a response


_decode_answer = msgspec.json.Decoder(_Unstreamed).decode


def _count_unstreamed(x: Exchange, reply: Reply, metrics: ModelMetrics) -> None:
    if reply.status != 200 or reply.body is None:
        return
    with contextlib.suppress(msgspec.MsgspecError):
        answer = _decode_answer(reply.body)
        why = answer.choices[-1].finish_reason if answer.choices else answer.stop_reason or answer.status
        x.line.finish = why
        usage = answer.usage
        if usage is not None:
            prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
            completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
            x.line.prompt_tokens, x.line.completion_tokens = prompt, completion
            details = usage.prompt_tokens_details or usage.input_tokens_details
            metrics.used(prompt, completion, details.cached_tokens if details is not None else None)


def _count_streamed(x: Exchange, reply: Reply, metrics: ModelMetrics) -> None:
    """What its engine counted, of a stream that came to its end; of any other, what its events tell."""
    scan = reply.scan
    assert scan is not None
    if reply.finished and not scan.died:
        x.line.prompt_tokens, x.line.completion_tokens = scan.usage.prompt, scan.usage.completion
        x.line.finish = scan.finish
        metrics.used(scan.usage.prompt, scan.usage.completion, scan.usage.cached)
    else:
        x.line.aborted_tokens = scan.tokens
        metrics.aborted(scan.tokens)
