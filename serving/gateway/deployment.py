"""The gateway as a Serve deployment without a route: Serve places, restarts and reconfigures it; clients reach its own
listener. All gateways of a node share one port by SO_REUSEPORT; the kernel spreads connections over them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import time
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve

from serving import tasks
from serving.errors import OperatorError
from serving.fleet import directory, spare
from serving.fleet.endpoint import Deaths, GatewayInfo, Snapshot
from serving.gateway import keys
from serving.gateway.app import Gateway
from serving.gateway.keys import KeyRing
from serving.gateway.listener import Server, listener
from serving.settings import load_settings
from serving.telemetry import logs
from serving.telemetry.logs import RequestLog
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.tracing import tracing

log = logging.getLogger(__name__)

HELD_CHECK_EVERY_S = 0.25  # replicas report their loads twice a second
FIRST_KEYS_S = 30.0  # longest wait of a new worker's gateway for the head's keys, before it opens its port


def _wake_politely() -> None:
    """This thread's wake-ups preempt nobody (sched(7), SCHED_BATCH). An engine's server writes the events of one step one by
    one: preempted at each, it and the gateway would pass a core to and fro; left alone, it finishes the step, and the
    gateway takes all of it with one wake-up. Where a core is free nothing changes."""
    with contextlib.suppress(AttributeError, OSError):  # no Linux, or a sandbox that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class GatewayReplica:
    """One gateway: listener, table and catalog. `reconfigure` gets the catalog whenever it changes."""

    def __init__(self) -> None:
        settings = load_settings()
        self._id = f"gateway#{str(serve.get_replica_context().replica_tag)[-8:]}"
        self._process_log = logs.setup("gateway", settings.log_dir)
        self._node = ray.util.get_node_ip_address()
        self._settings = settings
        self._directory = directory.Client()
        self._keys_of_head = ""  # digest of what was taken last
        if settings.node_role == "worker" and not settings.keys_file.exists():
            keys.adopt(settings.keys_file, b'{"keys": []}')  # nobody enters until the head told who may
        metrics = GatewayMetrics(CollectorRegistry())
        self.gateway = Gateway(
            gateway_id=self._id,
            keys=KeyRing(settings.keys_file),
            secret=settings.secret(),
            metrics=metrics,
            log=RequestLog(settings.log_dir),
            node=self._node,
            tracing=tracing(settings, self._id, self._node, metrics),
        )
        self.gateway.sources["directory"] = self._directory_metrics
        self._server: Server | None = None
        self._tasks: list[asyncio.Task[Any]] = []

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve after construction (then the listener opens) and at every change of the catalog."""
        self.gateway.fleet.set_catalog(config)
        if self._server is None:
            await self._listen()

    async def check_health(self) -> None:
        """Raises when the listener ended unasked."""
        if self._server is not None and self._tasks[0].done() and not self.gateway.draining:
            raise RuntimeError(f"{self._id}: its listener ended")

    async def __del__(self) -> None:
        """Serve's shutdown hook: stop accepting, let requests finish, then close."""
        if self._server is None:
            return
        self.gateway.draining = True
        deadline = time.monotonic() + self.gateway.fleet.catalog.drain_s
        await self._server.leave()
        while self._server.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for task in self._tasks[1:]:
            task.cancel()
        # Best effort. What its last requests ended, or survived, outlives it; and the lease ends the entry otherwise.
        for last in (self._announce, functools.partial(self._directory.call, "withdraw_gateway", self._id)):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(last(), 1.0)
        await self.gateway.stop()
        await asyncio.to_thread(self._process_log.close)

    async def _listen(self) -> None:
        # After that, the copy on disk is good, or refuses all until the first poll that succeeds.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first_snapshot(), FIRST_KEYS_S)
        await self.gateway.start()
        # What was imported lives for ever: out of the collector's sight, and full collections, which stop every stream,
        # become rare. Requests leave few cycles behind.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        _wake_politely()
        public = listener(self._settings.host, self._settings.port, shared=True)
        private = listener(self._node, 0, shared=False)
        own = private.getsockname()[:2]
        self.gateway.private_port = own[1]
        self._server = Server(self.gateway, private=own)
        lock = self._settings.state_dir / "spare.lock"
        self._tasks = [
            asyncio.create_task(self._server.serve(sockets=[public, private])),
            tasks.for_ever("following the table", lambda: directory.follow(self._take, self._directory)),
            tasks.for_ever("announcing this gateway", self._announce_for_ever),
            tasks.for_ever("keeping a spare process", lambda: spare.keep_for_ever(self._spare_wanted, lock)),
        ]
        while not self._server.started:
            if self._tasks[0].done():
                await self._tasks[0]
            await asyncio.sleep(0.01)
        log.info("%s listens on %s:%d", self._id, self._settings.host, self._settings.port)

    async def _first_snapshot(self) -> None:
        """On a worker, what a new gateway must know before it answers: the keys. Elsewhere they lie on this node."""
        while self._settings.node_role == "worker":
            with contextlib.suppress(Exception):  # any Ray error: it is restarting, or the control store is slow
                await self._take(directory.unpack(await self._directory.call("snapshot"), Snapshot))
            if self._keys_of_head:
                return
            await asyncio.sleep(0.2)

    async def _take(self, snapshot: Snapshot) -> None:
        """The directory's news: the table, and on a worker the head's keys, kept on disk for when the head is away."""
        self.gateway.fleet.set_snapshot(snapshot)
        if self._settings.node_role == "worker" and snapshot.keys and snapshot.keys != self._keys_of_head:
            content = await self._directory.call("keys")
            try:
                self.gateway.keys.take(content)  # first: a revocation holds on a full disk too
                await asyncio.to_thread(keys.adopt, self._settings.keys_file, content)
            except OperatorError as e:
                log.error("the last good keys stay: %s", e)
            except OSError as e:  # tried again with the next news
                log.error(
                    "cannot write %s, the head's keys are in memory only: %s", self._settings.keys_file, e.strerror
                )
                return
            self._keys_of_head = snapshot.keys

    def _spare_wanted(self) -> bool:
        """Some version may be at zero, and no engine starts here now, which needs the cores itself."""
        fleet = self.gateway.fleet
        return fleet.may_sleep() and not fleet.starting_on(self._node, time.time())

    async def _directory_metrics(self) -> str:
        return str(await self._directory.call("metrics"))

    async def _announce(self) -> None:
        fleet = self.gateway.fleet
        deaths = fleet.fuse.told()
        info = GatewayInfo(
            id=self._id,
            url=f"http://{self._node}:{self.gateway.private_port}",
            node=self._node,
            held=fleet.held(),
            arrived=dict(fleet.arrived),
            finished=dict(fleet.finished),
            demand=fleet.demand(),
            deaths=deaths.deaths,
            trials=deaths.trials,
            suspects=deaths.suspects,
            died=fleet.fuse.ages(),
        )
        await self._directory.call("announce_gateway", directory.pack(info), timeout_s=directory.REPORT_CALL_S)

    async def _announce_for_ever(self) -> None:
        """At once when a version must be woken, soon when what is held changed, twice a second in any case."""
        untold, told, told_at = False, (dict[str, int](), Deaths()), float("-inf")
        news = asyncio.Event()
        self.gateway.fleet.on_hold = self.gateway.fleet.fuse.on_news = news.set
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), HELD_CHECK_EVERY_S)
            news.clear()
            held, deaths = self.gateway.fleet.held(), self.gateway.fleet.fuse.told()
            if (held, deaths) == told and time.monotonic() - told_at < directory.REPORT_EVERY_S:
                continue
            told, told_at = (held, deaths), time.monotonic()
            try:
                await self._announce()
                untold = False
            except Exception as e:  # any Ray error: told again in a moment
                if not untold:
                    log.warning("the directory does not take the gateway's entry: %s", type(e).__name__)
                untold = True
                told_at = float("-inf")


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder; everything about a gateway comes by `deployments:` overrides."""
    return serve.deployment(name="gateway")(GatewayReplica).bind()
