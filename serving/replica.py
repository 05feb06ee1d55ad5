"""EngineReplica: the Serve deployment around one engine. It starts, watches, announces, drains and stops it; it never
carries a token.

    STARTING --first token--> READY <--> SUSPECT --shutdown hook--> DRAINING --door counts zero--> STOPPED
        \\_______________ engine died, start failed, or does not work any more ______________/-> FAILED

`engine/health` says which of READY, SUSPECT and FAILED it is. A FAILED one has left every gateway's table, and its engine is
ended here and now; Serve replaces the replica when `check_health` has told it so three times.

Serve waits for its own count of ongoing requests, which is always zero here, and then awaits `__del__` for up to
`graceful_shutdown_timeout_s`: so the drain lives there. `__del__` does not run on kill -9 or node loss; then the parent-death
signal ends the engine and the directory's lease ends its entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import ray
from ray import serve

from serving import tasks
from serving.catalog import weights
from serving.engine import command, stats
from serving.engine.command import EngineSpec, Traces
from serving.engine.door import CLOSE_PATH, SECRET_HEADER, STATUS_PATH
from serving.engine.health import Judgement, Limits
from serving.engine.process import EngineProcess
from serving.engine.watch import Watch, generates
from serving.errors import EngineError, OperatorError, WeightsError
from serving.fleet import directory
from serving.fleet.endpoint import Endpoint, State, advance
from serving.settings import inherited_environment, load_settings
from serving.telemetry import logs

log = logging.getLogger(__name__)

START_ATTEMPTS = 2  # a port lost to a race or a moment without memory is transient; a bad model is not
NEVER_GIVE_UP = 1_000_000_000  # starts; Serve takes the smaller of it and so many per replica (`cli/cluster`)
RETRY_ASKED_EVERY_S = 2.0  # while it waits: has somebody changed something?
START_CHECK_EVERY_S = 0.05  # of an engine that starts: somebody may be held until it is ready
LOOK_EVERY_S = 0.5  # at the engine; sooner where the verdict turns before
LOOK_AGAIN_S = 0.05  # the soonest
LAST_DRAIN_S = 2.0  # for what a failed engine may still finish
LAST_GRACE_S = 1.0  # between SIGTERM and SIGKILL of a failed engine
_UP = (State.READY, State.SUSPECT, State.DRAINING)


class Build(msgspec.Struct, frozen=True):
    """Weights that a node without them builds: `build:RECIPE/ARTEFACT`, and the folder of recipes."""

    source: str
    base: str


class Knobs(msgspec.Struct, frozen=True):
    """What may change while an engine runs, without rolling it. Seconds."""

    start_timeout_s: float = 600.0
    drain_s: float = 30.0
    stuck_timeout_s: float = 30.0
    builds: tuple[Build, ...] = ()


class EngineReplica:
    """One engine behind a Serve replica."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = msgspec.convert(spec, EngineSpec)
        self._settings = load_settings()
        self._process_log = logs.setup("replica", self._settings.log_dir)
        self._secret = self._settings.secret()
        self._knobs = Knobs()
        self._host = ray.util.get_node_ip_address()
        self._id = f"{self.spec.id}#{_replica_tag()}"
        self._loop = asyncio.get_running_loop()
        self._engine: EngineProcess | None = None
        self._http: aiohttp.ClientSession | None = None
        self._watch: Watch | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._directory = directory.Client()
        self._untold = False  # the last report did not reach the directory; said once
        self._endpoint = Endpoint(
            id=self._id,
            model=self.spec.model,
            version=self.spec.version,
            url="",
            state=State.STARTING,
            slots=self.spec.slots,
            adapters=tuple(a.name for a in self.spec.adapters),
            node=self._host,
            gpus=_assigned_gpus(),
            started_at=time.time(),
            spec=hashlib.sha256(msgspec.json.encode(self.spec)).hexdigest()[:16],
        )

    async def reconfigure(self, knobs: dict[str, Any]) -> None:
        """Called by Serve after construction and when only knobs change. The first call starts the engine, and the
        replica counts as ready when it returns."""
        self._knobs = msgspec.convert(knobs, Knobs)
        if self._engine is None:
            await self._start()

    async def check_health(self) -> None:
        """Raises when this replica can serve no more; Serve then replaces it."""
        if self._endpoint.state is State.FAILED:
            raise EngineError(f"{self._id}: {self._endpoint.reason}")

    async def endpoint(self) -> Endpoint:
        return self._endpoint

    async def __del__(self) -> None:
        """Serve's shutdown hook: announce DRAINING, wait for the door to count zero, stop the engine."""
        if self._endpoint.state in (State.STARTING, State.READY, State.SUSPECT):
            self._set(state=State.DRAINING)
            await self._announce()
            await self._close_door()
            await self._drained(self._knobs.drain_s)
        for task in self._tasks:
            task.cancel()
        if self._watch is not None:
            self._watch.close()
        await self._stop_engine()
        self._set(state=State.STOPPED)
        await self._announce()
        if self._http is not None:
            await self._http.close()
        await asyncio.to_thread(self._process_log.close)

    # -- start ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._http = aiohttp.ClientSession(
            headers={SECRET_HEADER.decode(): self._secret}, timeout=aiohttp.ClientTimeout(total=30)
        )
        self._tasks.append(tasks.for_ever(f"{self._id}: announcing it", self._report_for_ever))
        await self._pause_after_failures()
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                await self._have_weights()
                await self._start_once(attempt)
                return
            except Exception as e:  # a full disk, an engine that answers nonsense: each counts as a start that failed
                await self._stop_engine()
                told = isinstance(e, EngineError)
                why = str(e) if told else f"{self.spec.id}: node {self._host}: {type(e).__name__}: {str(e)[:200]}"
                if attempt == START_ATTEMPTS or not _transient(why):
                    self._set(state=State.FAILED, reason=why, fault="start")
                    await self._announce()
                    if told:
                        raise
                    raise EngineError(why) from None
                log.warning("%s: start attempt %d failed, trying again: %s", self._id, attempt, why)

    async def _pause_after_failures(self) -> None:
        """Serve starts the next replica the moment one failed, for ever. From the third failure on the pause is here,
        where gateways see when it ends, and where it ends at once when an operator applies a catalog."""
        while True:
            try:
                delay = float(await self._directory.call("start_delay", self.spec.id, self._endpoint.spec, self._host))
            except Exception:  # any Ray error: nobody knows of failures
                delay = 0.0
            if delay <= 0:
                if self._endpoint.waits_until:  # it may end early, and gateways count from there
                    self._set(state=State.STARTING, waits_until=time.time())
                return
            if not self._endpoint.waits_until:
                log.warning("%s: it failed before; the next start is in %.0f s", self._id, delay)
            self._set(state=State.STARTING, waits_until=time.time() + delay)
            await asyncio.sleep(min(delay, RETRY_ASKED_EVERY_S))

    async def _have_weights(self) -> None:
        """Weights and adapters are whole on this node; what can be built is built. `up` looked at the node it ran on, if
        at any. Without hashing: `up` did that where it could, and here it would take minutes."""
        if self.spec.kind != "vllm":
            return
        try:
            for build in self._knobs.builds:
                await asyncio.to_thread(
                    weights.resolve,
                    build.source,
                    base=Path(build.base),
                    cache=self._settings.cache_dir,
                    on_progress=lambda line: log.info("%s: %s", self._id, line),
                )
            await asyncio.to_thread(weights.verify, Path(self.spec.weights), "model")
            for adapter in self.spec.adapters:
                await asyncio.to_thread(weights.verify, Path(adapter.path), "adapter")
        except WeightsError as e:
            raise EngineError(f"{self.spec.id}: node {self._host}: {e}") from None

    async def _start_once(self, attempt: int) -> None:
        port = _free_port(self._host)
        mark = f"{self._settings.state_dir}:{self._id}"
        cmd = command.build(
            self.spec,
            host=self._host,
            port=port,
            secret=self._secret,
            mark=mark,
            parent_pid=os.getpid(),
            environ=inherited_environment(),
            sockets=self._settings.runtime_dir,
            traces=self._traces(),
        )
        folder = self._settings.log_dir / "engines" / self.spec.id
        engine = EngineProcess(cmd, folder / f"{_replica_tag()}.{attempt}.log", self._engine_exited)
        self._engine = engine
        began = time.monotonic()
        await asyncio.to_thread(engine.start)
        spawned = time.monotonic()
        url = f"http://{self._host}:{port}"
        healthy, max_len = await self._until_it_generates(engine, url, began + self._knobs.start_timeout_s)
        ready = time.monotonic()
        room = await self._kv_tokens(url)
        self._set(
            state=State.READY,
            url=url,
            max_model_len=max_len,
            kv_tokens=room,
            ready_after_s=round(ready - began, 3),
            phases={
                "spawn": round(spawned - began, 3),
                "health": round(healthy - spawned, 3),
                "first_token": round(ready - healthy, 3),
            },
        )
        await self._announce()
        assert self._http is not None
        watch = self._watch = Watch(self._http, url, self.spec.served_names[0], lambda: engine.alive)
        self._tasks.append(tasks.for_ever(f"{self._id}: watching its engine", lambda: self._watch_while_up(watch)))
        log.info("%s: ready at %s after %.1f s", self._id, url, time.monotonic() - began)

    def _traces(self) -> Traces | None:
        """Where the engine's spans go; None where no collector is set."""
        settings = self._settings
        if settings.otlp_endpoint is None:
            return None
        try:
            headers = settings.otlp_headers()
        except OperatorError as e:
            log.error("%s: its engine is not traced: %s", self._id, e)
            return None
        about = {
            "service.instance.id": self._id,
            "host.name": self._host,
            "steelyard.model": self.spec.model,
            "steelyard.version": self.spec.version,
        }
        return Traces(settings.otlp_endpoint, headers, settings.trace_service, about)

    async def _until_it_generates(self, engine: EngineProcess, url: str, deadline: float) -> tuple[float, int | None]:
        """Waits for /health, then for one generated token; when it was healthy (monotonic seconds) and the engine's
        context length in tokens."""
        healthy_at = 0.0
        while True:
            if not engine.alive:
                await asyncio.to_thread(engine.exited.wait, 10)
                raise EngineError(
                    f"{self.spec.id}: its engine ended at start: {engine.telling_lines()}", f"see {engine.log_path}"
                )
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.spec.id}: its engine was not ready within {self._knobs.start_timeout_s:g} s: "
                    f"{engine.telling_lines(1)}",
                    f"see {engine.log_path}, or raise start_timeout_s",
                )
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                assert self._http is not None
                async with self._http.get(url + "/health") as r:
                    healthy = r.status == 200
                if healthy:
                    healthy_at = healthy_at or time.monotonic()
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        generated = await generates(self._http, url, self.spec.served_names[0])
                    if generated == "ok":
                        return healthy_at, await self._context_length(url)
            await asyncio.sleep(START_CHECK_EVERY_S)

    async def _context_length(self, url: str) -> int | None:
        assert self._http is not None
        async with self._http.get(url + "/v1/models") as r:
            cards = (await r.json())["data"]
        value = cards[0].get("max_model_len") if cards else None
        return int(value) if value is not None else None

    async def _kv_tokens(self, url: str) -> int | None:
        """Tokens of its KV cache; its door is told, and enforces them from now on. None, and only slots count, for an
        engine that does not say."""
        assert self._http is not None
        try:
            async with self._http.get(url + "/metrics") as r:
                room = stats.kv_tokens(await r.text())
            if room is not None:
                async with self._http.post(f"{url}{STATUS_PATH}?tokens={room}"):
                    return room
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            log.warning("%s: the size of its KV cache is not known: %s", self._id, type(e).__name__)
        return None

    # -- run -----------------------------------------------------------------------------------------------------

    def _engine_exited(self, how: str) -> None:
        """From the watcher thread: the engine ended unasked."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the whole replica is ending
            self._loop.call_soon_threadsafe(self._on_engine_exit, how)

    def _on_engine_exit(self, how: str) -> None:
        if self._endpoint.state in _UP:
            assert self._engine is not None
            self._set(state=State.FAILED, reason=f"{how}: {self._engine.telling_lines(1)}", fault="process")

    async def _report_for_ever(self) -> None:
        """Announces the whole endpoint every half second, and at once when its state changes."""
        while True:
            await self._announce()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), directory.REPORT_EVERY_S)
            self._changed.clear()

    async def _watch_while_up(self, watch: Watch) -> None:
        """Looks at the engine twice a second, and when its time is up, and acts on the verdict."""
        while self._endpoint.state in _UP:
            judged = await watch.look(Limits(replace_s=self._knobs.stuck_timeout_s))
            self._endpoint = msgspec.structs.replace(
                self._endpoint,
                in_flight=watch.in_flight,
                tokens=watch.tokens,
                waiting=watch.waiting,
                kv_usage=watch.kv_usage,
                stuck_after_s=watch.stuck_after_s,
            )
            await self._follow(judged)
            await asyncio.sleep(min(LOOK_EVERY_S, max(LOOK_AGAIN_S, judged.turns_s)))
        watch.close()

    async def _follow(self, judged: Judgement) -> None:
        state, why = self._endpoint.state, f"{judged.cause}: {judged.why}"
        if judged.verdict == "ok" and state is State.SUSPECT:
            self._set(state=State.READY, reason="", fault="")
        elif judged.verdict == "suspect" and state is State.READY:
            self._set(state=State.SUSPECT, reason=why, fault=judged.cause)
        elif judged.cause == "process":  # its supervisor says so first, but for one that ended before it was up
            self._on_engine_exit(judged.why)
        elif judged.verdict == "failed" and state in _UP:
            self._set(state=State.FAILED, reason=why, fault=judged.cause)
            if judged.cause in ("health", "refuses"):
                await self._close_door()
                await self._drained(LAST_DRAIN_S)
            assert self._engine is not None
            await asyncio.to_thread(self._engine.stop, LAST_GRACE_S)

    async def _announce(self) -> None:
        try:
            await self._directory.call("announce", directory.pack(self._endpoint), timeout_s=directory.REPORT_CALL_S)
            self._untold = False
        except Exception as e:  # any Ray error: the next round tells the restarted directory everything
            if not self._untold:
                log.warning("%s: the directory does not take reports: %s", self._id, type(e).__name__)
            self._untold = True

    def _set(self, *, state: State, **fields: Any) -> None:
        """Moves to `state` (guarded) and sets other fields with it."""
        if state is not self._endpoint.state:
            advance(self._endpoint.state, state)
            level = logging.WARNING if state in (State.SUSPECT, State.FAILED) else logging.INFO
            log.log(level, "%s: %s -> %s %s", self._id, self._endpoint.state, state, fields.get("reason", ""))
        self._endpoint = msgspec.structs.replace(self._endpoint, state=state, **fields)
        self._changed.set()

    # -- stop ----------------------------------------------------------------------------------------------------

    async def _close_door(self) -> None:
        """What a gateway sent before it heard of the drain must not be let in between the last count and the end."""
        if self._http is not None and self._endpoint.url:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._http.post(self._endpoint.url + CLOSE_PATH):
                    pass

    async def _drained(self, within_s: float) -> None:
        """Until the door counts zero, the engine is gone, or `within_s` have passed."""
        assert self._http is not None
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self._engine is not None and self._engine.alive:
            try:
                async with asyncio.timeout(within_s), self._http.get(self._endpoint.url + STATUS_PATH) as r:
                    if not (await r.json())["in_flight"]:
                        return
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                return
            await asyncio.sleep(0.1)

    async def _stop_engine(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder: `args` is an EngineSpec and nothing else, so that only what identifies the engine
    rolls replicas. Everything else comes by `deployments:` overrides from the manifest."""
    # Serve must not give up on a version: it would try again only after another config. See `_pause_after_failures`.
    deployment = serve.deployment(name="engine", max_constructor_retry_count=NEVER_GIVE_UP)(EngineReplica)
    return deployment.bind(args)


def _replica_tag() -> str:
    with contextlib.suppress(Exception):  # outside Serve (tests) there is no replica context
        return str(serve.get_replica_context().replica_tag)[-8:]
    return str(os.getpid())


def _assigned_gpus() -> tuple[str, ...]:
    with contextlib.suppress(Exception):  # likewise, where asking would start a Ray
        if ray.is_initialized():
            return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
    return ()


def _free_port(host: str) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def _transient(why: str) -> bool:
    return any(t in why.lower() for t in ("address already in use", "resource temporarily unavailable"))
