"""One request's attempts at engines: from its first wait for a slot to the end of its answer. `Attempts.answer` is all of it."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.errors import EngineBroken, NoReplica, QueueFull, RequestCrashedEngine, WaitTooLong
from serving.fleet.endpoint import State
from serving.gateway.delivery import deliver
from serving.gateway.exchange import Exchange
from serving.gateway.fuse import Charge
from serving.gateway.hold import KeepAlive
from serving.gateway.queue import Ticket, VersionLine, bound_wait
from serving.gateway.relay import Broken, Busy, Engines, Recalled, Reply
from serving.gateway.retry import NEWS_S, Retry, news_s
from serving.gateway.routes import Route
from serving.gateway.routing import Upstream
from serving.gateway.sent import Store
from serving.gateway.state import Fleet, ModelConfig
from serving.telemetry.metrics import ModelMetrics

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # at different replicas; `Attempts._spent` says which count


@dataclass(slots=True)
class Attempts:
    """Made for each request that was admitted, and used once."""

    fleet: Fleet
    engines: Engines
    store: Store
    x: Exchange
    route: Route
    line: VersionLine
    model: ModelConfig
    metrics: ModelMetrics
    ticket: Ticket
    charge: Charge
    keep_alive: KeepAlive
    body: bytes
    withhold_usage: bool
    _retry: Retry | None = None  # from the first failure on, or from the start of one that is under suspicion
    _again: bool = False  # it had its turn in the line
    _admitted: bool = False  # to wait for its trial, or for others', before it joins the line
    _failed: str = ""  # how the attempt before this one did
    _news_s: float = 0.0  # how long to wait for the other gateways' word of that

    async def answer(self) -> None:
        """Binds the request to a replica and relays; failures before the first byte are tried elsewhere."""
        x, line, ticket = self.x, self.line, self.ticket
        self.fleet.arrived[line.version_id] += 1
        try:
            while True:
                if self._must_wait_its_turn():
                    await self._turn()
                upstream = await self._slot()
                if self._may_not_go():
                    continue
                x.line.replica = upstream.endpoint.id
                settle: Callable[[Ticket], None] = line.release
                self.metrics.running.inc()
                try:
                    reply = await self._open(upstream)
                    self._begun(reply)
                    await deliver(x, self.route, reply, self.metrics, self.store)
                    self._ended(reply, upstream)
                    return
                except Busy as e:
                    settle = self._busy(e)
                except Recalled:
                    settle = self._recalled()
                except Broken as e:
                    settle = line.broken if e.gone else line.failed
                    self._broken(e, upstream)
                except asyncio.CancelledError:
                    self._attempted("client_gone" if x.line.client_gone else "timeout")
                    raise
                finally:
                    self.metrics.running.dec()
                    settle(ticket)
        finally:
            if self._retry is not None:
                self._retry.close()

    # -- before an attempt ---------------------------------------------------------------------------------------

    def _must_wait_its_turn(self) -> bool:
        """Raises QueueFull for a newcomer that would wait for a trial, its own or others', where too many wait already."""
        suspicion, pending = self.charge.suspicion, self.charge.pending
        self.ticket.suspicion = suspicion
        if suspicion is not None or pending:
            if not self._again:
                fleet, line, model = self.fleet, self.line, self.model
                others = fleet.put_off(model) - line.trials.put_off if pending else fleet.waiting(model) - line.waiting
                try:
                    self._admitted = line.admit_suspect(
                        self.ticket, others=others, max_queue=model.limits.max_queue, put_off=pending
                    )
                except QueueFull as e:
                    self.metrics.rejected(e.code, self.ticket.class_)
                    raise
            self._retried()
        return self._retry is not None

    async def _turn(self) -> None:
        """Waits for a place among the retries, as long as the request may wait at all; after a death first for the other
        gateways' word, by which it may have been the last time, and for the trials of others who may have been it; that
        counts against its deadline only."""
        x, line, ticket = self.x, self.line, self.ticket
        began = heard = time.monotonic()
        waited_s = (x.line.queue_ms or 0.0) / 1e3
        waiting = self.metrics.waiting(ticket.class_)
        waiting.inc()
        try:
            async with self.keep_alive:
                if self._news_s:
                    await asyncio.sleep(self._news_s)
                    self._news_s = 0.0
                if self.charge.pending:
                    self._retried().close()  # its trial, for those who are to have theirs first
                    with line.trials.others_first():
                        while self.charge.pending:
                            await asyncio.sleep(NEWS_S)
                heard = time.monotonic()
                if self.charge.blown:
                    raise self._crashed()
                if self._spent >= MAX_ATTEMPTS:
                    raise self._out_of_attempts()
                ticket.suspicion = self.charge.suspicion  # as it is after those waits
                home = None if ticket.suspicion is None else functools.partial(line.home, ticket)
                async with asyncio.timeout(bound_wait(self.model.limits.max_wait_s - waited_s, ticket.deadline)):
                    await self._retried().turn(home, first=not x.line.attempts)
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
        if self._failed:
            self.metrics.retried(self._failed)
            self._failed = ""

    async def _slot(self) -> Upstream:
        x, line, ticket = self.x, self.line, self.ticket
        began = time.monotonic()
        waited_s = (x.line.queue_ms or 0.0) / 1e3  # in earlier attempts
        patience_s = bound_wait(self.model.limits.max_wait_s - waited_s, ticket.deadline)
        waiting = self.metrics.waiting(ticket.class_)
        waiting.inc()
        try:
            if line.version_id in self.fleet.asleep:
                self.fleet.wake(line, patience_s)
            async with self.keep_alive:
                return await line.take(
                    ticket,
                    others=self.fleet.waiting(self.model) - len(line),
                    max_queue=self.model.limits.max_queue,
                    max_wait_s=patience_s,
                    again=self._again,
                    admitted=self._admitted,
                )
        except (QueueFull, WaitTooLong, NoReplica) as e:
            self.metrics.rejected(e.code, ticket.class_)
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

    def _may_not_go(self) -> bool:
        """While it waited, engines died with the same request inside: refused, or back to wait for its trial, or for others'."""
        if self.charge.blown:
            self.line.release(self.ticket)
            raise self._crashed()
        if (self.ticket.suspicion is not None or self.charge.suspicion is None) and not self.charge.pending:
            return False
        self.line.unsent(self.ticket)
        self._again = True
        return True

    # -- an attempt and its outcomes: each says how the slot is given back ---------------------------------------

    async def _open(self, upstream: Upstream) -> Reply:
        x, ticket = self.x, self.ticket
        trial_s = 0.0 if self._retry is None else self._retry.sent()
        trace = b""
        if x.trace is not None:
            e = upstream.endpoint
            trace = x.trace.sent(e.id, e.node, ticket.bound_at, time.monotonic())
        reply = await self.engines.open(
            upstream,
            self.route,
            self.body,
            x.request_id,
            withhold_usage=self.withhold_usage,
            trace=trace,
            tokens=ticket.tokens,
            trial_s=trial_s,
            charge=self.charge if ticket.suspicion is None else None,
            let_in=None if self._retry is None else self._retry.let_in,
            stream=x.line.stream,
            patient=x.line.attempts + 1 >= MAX_ATTEMPTS,
        )
        if x.trace is not None:
            x.trace.answered(time.monotonic(), streamed=reply.scan is not None)
        return reply

    def _begun(self, reply: Reply) -> None:
        self.x.line.attempts += 1
        if self._retry is not None:
            self._retry.close()
            if self.ticket.suspicion is not None:
                self.charge.passed()
        self.line.entered(self.ticket)
        if reply.scan is not None:
            self.line.answered_first(self.ticket)

    def _ended(self, reply: Reply, upstream: Upstream) -> None:
        self.fleet.finished[self.line.version_id] += 1
        if reply.crashed:
            if upstream.endpoint.state is not State.DRAINING:  # else it was stopped
                self._engine_died(begun=True)
        elif reply.scan is None or reply.finished:
            self.charge.survived()
        self._attempted(reply.outcome)

    def _busy(self, e: Busy) -> Callable[[Ticket], None]:
        self._attempted("busy")
        self._again = True
        if e.occupied and self._retry is not None:
            self._retry.occupied()
            return self.line.unsent
        return self.line.busy

    def _recalled(self) -> Callable[[Ticket], None]:
        self._attempted("recalled")
        self._again = True
        return self.line.unsent

    def _broken(self, e: Broken, upstream: Upstream) -> None:
        """Raises where that was the last attempt."""
        x, line, ticket = self.x, self.line, self.ticket
        x.line.attempts += 1
        self._attempted(e.outcome)
        log.warning("attempt %d failed: %s", x.line.attempts, e, extra={"request_id": x.request_id})
        self._again, self._failed = True, e.outcome
        again = self._retried()
        stopped = upstream.endpoint.state is State.DRAINING  # when its time to drain was over: nobody's fault
        trial_s, killed = again.trial_s, e.killed and not again.outside and not stopped
        again.close()
        ticket.avoid |= line.on_node_of(upstream) if e.unreachable else {upstream.endpoint.id}
        if killed:
            # Who came to an engine that stood still already is not the one that stopped it.
            self._engine_died(trial_s if e.outcome == "died" else 0.0)
        elif e.killed or e.outcome == "connect_error":
            again.unreached += 1
        elif self._spent >= MAX_ATTEMPTS:
            raise self._out_of_attempts() from None
        if e.killed or ticket.suspicion is not None:  # who finds nobody at its home may come after a copy
            self._news_s = news_s(line.siblings, last=self.charge.blown)
        if e.answered and not line.ready_ids() - ticket.avoid:
            raise EngineBroken(f"{line.version_id}: its engine answered with an internal error") from None

    # -- what the outcomes have in common ------------------------------------------------------------------------

    def _retried(self) -> Retry:
        self._retry = self._retry or Retry(self.line.retries, self.line.trials, self.charge.passed)
        return self._retry

    @property
    def _spent(self) -> int:
        """Attempts that count. Not those that no engine had: where a node is lost, whoever waits for the successor of the only
        engine finds nobody there, second after second, until the tables know; `max_wait_s` bounds that."""
        return self.x.line.attempts - self._retried().unreached - self.charge.excused

    def _attempted(self, outcome: str) -> None:
        self.metrics.attempted(outcome)
        if self.x.trace is not None:
            self.x.trace.attempted(outcome, time.monotonic())

    def _engine_died(self, trial_s: float = 0.0, *, begun: bool = False) -> None:
        """An engine died with this request inside, which was on trial there for so long, or not (0)."""
        deaths = self.charge.died(self.x.line.replica or "", trial_s, begun=begun)
        how, extra = "on trial" if trial_s else "inside", {"request_id": self.x.request_id}
        log.warning("an engine died with %s %s, %d by now", self.charge.print, how, deaths, extra=extra)

    def _crashed(self) -> RequestCrashedEngine:
        return crashed(self.charge, self.metrics, self.ticket)

    def _out_of_attempts(self) -> EngineBroken:
        return EngineBroken(f"{self.line.version_id}: {self.x.line.attempts} attempts failed")


def crashed(charge: Charge, metrics: ModelMetrics, ticket: Ticket) -> RequestCrashedEngine:
    metrics.rejected(RequestCrashedEngine.code, ticket.class_)
    log.error("refused: engines died with %s inside; it stays refused for a while", charge.print)
    return RequestCrashedEngine(
        "engines died while they had this request: it is not tried again, and the same one is refused for some minutes"
    )
