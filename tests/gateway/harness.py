"""A gateway in the test's own event loop, in front of real simulator processes behind real doors. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import anthropic
import msgspec
import openai
import uvicorn
from prometheus_client import CollectorRegistry

from serving.catalog.spec import Catalog, ModelSpec
from serving.engine.command import AdapterSpec, EngineSpec, build
from serving.engine.door import STATUS_PATH, Door
from serving.engine.process import EngineProcess
from serving.fleet.endpoint import Endpoint, GatewayInfo, Snapshot, State, VersionFacts
from serving.fleet.manifest import gateway_config
from serving.gateway.app import Gateway
from serving.gateway.keys import KeyRing, create_key, revoke_key
from serving.gateway.protocol import ClientProtocol
from serving.settings import Settings
from serving.telemetry.logs import RequestLog
from serving.telemetry.metrics import GatewayMetrics, unrested_gauges
from serving.telemetry.tracing import tracing

SECRET = "secret-between-gateway-and-doors"
HOST = "127.0.0.1"
CONTEXT = 2048  # tokens
BODY_LIMIT = 64 * 1024
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


async def eventually(what: str, holds: Callable[[], Any], within_s: float = 10) -> Any:
    """Polls until `holds()` (awaited if need be) is true; fails naming `what` at the deadline."""
    end = time.monotonic() + within_s
    while True:
        found = holds()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


# -- engines


@dataclass
class Engine:
    """Something behind a door. `process` is None for a recorded one."""

    endpoint: Endpoint
    process: EngineProcess | None = None
    seen: list[str] = field(default_factory=list)  # paths that a recorded one was asked for
    headers: list[dict[str, str]] = field(default_factory=list)  # and with which headers

    @property
    def url(self) -> str:
        return self.endpoint.url

    async def door(self) -> dict[str, int]:
        headers = {"x-steelyard-secret": SECRET}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(self.url + STATUS_PATH) as answer:
            return dict(await answer.json())

    async def inside(self, count: int) -> None:
        """Returns when exactly `count` generations are behind the door."""
        await eventually(f"{count} in flight", lambda: self._holds(count))

    async def _holds(self, count: int) -> bool:
        return (await self.door())["in_flight"] == count

    async def direct(self, path: str, body: Any, request_id: str, **more: str) -> bytes:
        """What the engine itself answers, without the gateway. `more`: further headers."""
        headers = {"x-steelyard-secret": SECRET, "x-request-id": request_id, **more}
        async with aiohttp.ClientSession(headers=headers) as session, session.post(self.url + path, json=body) as r:
            return await r.read()


class EngineRoom:
    """Starts simulators; `shared` ones are started once per test module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shared: dict[str, Engine] = {}
        self._all: list[EngineProcess] = []

    def shared(self, **wanted: Any) -> Engine:
        key = repr(sorted(wanted.items()))
        if key not in self._shared:
            self._shared[key] = self.start(**wanted)
        return self._shared[key]

    def start(
        self, *, model: str = "tiny", version: str = "v1", slots: int = 8, sins: str = "", after: int = 8, **args: Any
    ) -> Engine:
        """An engine process of its own, listening. `args` are the simulator's options, with underscores."""
        name = f"{model}-{version}-{uuid.uuid4().hex[:8]}"
        options: dict[str, object] = {"sim-start-s": 0, "sim-ttft-ms": 1, "sim-itl-ms": 1, "max-model-len": CONTEXT}
        options |= {k.replace("_", "-"): v for k, v in args.items()}
        if sins:
            options |= {"sim-sins": sins, "sim-sin-after": after}
        spec = EngineSpec(
            model=model,
            version=version,
            kind="simulator",
            weights=model,
            served_names=[model, f"{model}@{version}"],
            args={"max-num-seqs": slots, **options},
            adapters=[AdapterSpec("pirate", "adapters/pirate")] if model == "tiny" else [],
        )
        command = build(
            spec, host=HOST, port=0, secret=SECRET, mark=f"test:{name}", parent_pid=os.getpid(), environ=os.environ
        )
        process = EngineProcess(command, self._folder / f"{name}.log")
        self._all.append(process)
        process.start()
        endpoint = Endpoint(
            id=name, model=model, version=version, url=_ready(process), state=State.READY, slots=slots,
            max_model_len=CONTEXT, ready_after_s=0.1,
        )  # fmt: skip
        return Engine(endpoint, process)

    def close(self) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda process: process.stop(grace_s=2), self._all))


def _ready(process: EngineProcess) -> str:
    """The URL in the simulator's ready line."""
    end = time.monotonic() + 30
    while True:
        text = process.log_path.read_text() if process.log_path.exists() else ""
        if found := re.search(r"simulator ready: (\S+) serves", text):
            return found[1]
        assert process.alive or not process.pid, f"the simulator ended: {text}"
        assert time.monotonic() < end, f"the simulator is not ready: {text}"
        time.sleep(0.01)


Chunk = bytes | float  # bytes to send, or seconds to wait


@contextlib.asynccontextmanager
async def recorded(
    *chunks: Chunk,
    status: int = 200,
    content_type: str = "text/event-stream; charset=utf-8",
    cut: bool = False,
    model: str = "tiny",
    version: str = "v1",
    slots: int = 8,
) -> AsyncIterator[Engine]:
    """An engine behind a real door that answers every request with these bytes, then ends or cuts the connection:
    for what a simulator does not say."""

    seen: list[str] = []
    asked_with: list[dict[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        asked_with.append({name.decode(): value.decode() for name, value in scope["headers"]})
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for chunk in chunks:
            if isinstance(chunk, bytes):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(chunk):
                        await receive()
                        return  # it hung up
        if not cut:  # uvicorn closes the connection of an app that returns early
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    with mock.patch.dict(os.environ, STEELYARD_DOOR_SECRET=SECRET, STEELYARD_DOOR_SLOTS=str(slots)):
        door = Door(app)
    async with listening(door) as port:
        name = f"recorded-{uuid.uuid4().hex[:8]}"
        url = f"http://{HOST}:{port}"
        endpoint = Endpoint(id=name, model=model, version=version, url=url, state=State.READY, slots=slots)
        yield Engine(endpoint, seen=seen, headers=asked_with)


def refusing(**like: Any) -> Endpoint:
    """An endpoint where nothing listens."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        url = f"http://{HOST}:{s.getsockname()[1]}"
    return Endpoint(
        **{"id": "gone", "model": "tiny", "version": "v1", "url": url, "state": State.READY, "slots": 8, **like}
    )


# -- catalog and keys


def catalog(**changes: Any) -> dict[str, Any]:
    """The gateways' config of two models, `tiny` (v1, v2, adapter `pirate`) and `other`; `changes` are keys of tiny's
    model file."""
    limits = {"max_body_bytes": BODY_LIMIT} | changes.pop("limits", {})
    simulator = {"kind": "simulator"}
    versions = [
        {"version": v, "engine": simulator, "adapters": [{"name": "pirate", "source": "adapters/pirate"}]}
        for v in ("v1", "v2")
    ]
    tiny = {"name": "tiny", "versions": versions, "release": {"stable": "v1"}, "limits": limits, **changes}
    other = {
        "name": "other",
        "versions": [{"version": "v1", "engine": simulator}],
        "limits": {"max_body_bytes": BODY_LIMIT},
    }
    return gateway_config(Catalog((ModelSpec.model_validate(tiny), ModelSpec.model_validate(other))))


@dataclass(frozen=True)
class Keys:
    """A keys file and the tokens of its keys."""

    path: Path
    all: str
    tiny: str
    other: str
    metrics: str
    expired: str
    revoked: str

    @classmethod
    def make(cls, path: Path) -> Keys:
        now = time.time()

        def key(*scopes: str, at: float = now, expires_at: float | None = None) -> str:
            return create_key(path, name="test", scopes=scopes, now=at, expires_at=expires_at)[1]

        revoked, token = create_key(path, name="test", scopes=["infer:*"], now=now)
        revoke_key(path, revoked.id, now)
        return cls(
            path,
            all=key("infer:*"),
            tiny=key("infer:tiny"),
            other=key("infer:other"),
            metrics=key("metrics"),
            expired=key("infer:*", at=now - 100, expires_at=now - 50),
            revoked=token,
        )


# -- the gateway


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The `error` object; fails when the body is not an error of either dialect."""
        return dict(self.json()["error"])


@dataclass
class Front:
    """One running gateway, and the clients to ask it with."""

    gateway: Gateway
    port: int
    keys: Keys
    log: RequestLog
    session: aiohttp.ClientSession
    engines: list[Engine] = field(default_factory=list)
    _clients: list[openai.AsyncOpenAI | anthropic.AsyncAnthropic] = field(default_factory=list)
    _number: int = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def serve(self, *engines: Engine | Endpoint, **changes: Any) -> None:
        """Tells the gateway what the directory and the catalog would: these endpoints, tiny's file changed so."""
        self.gateway.fleet.set_catalog(catalog(**changes))
        self.table(*engines)

    def table(
        self,
        *engines: Engine | Endpoint,
        complete: bool = True,
        facts: dict[str, VersionFacts] | None = None,
        gateways: tuple[GatewayInfo, ...] = (),
    ) -> None:
        self.engines += [e for e in engines if isinstance(e, Engine)]
        endpoints = tuple(e.endpoint if isinstance(e, Engine) else e for e in engines)
        self._number += 1
        self.gateway.fleet.set_snapshot(
            Snapshot(
                epoch="test",
                number=self._number,
                complete=complete,
                endpoints=endpoints,
                gateways=gateways,
                versions=facts or {},
            )
        )

    def openai(self, key: str | None = None) -> openai.AsyncOpenAI:
        plain = openai.DefaultAsyncHttpxClient(verify=False)  # reading the system's certificates takes 0.1 s
        client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key or self.keys.all, max_retries=0, timeout=30, http_client=plain
        )
        self._clients.append(client)
        return client

    def anthropic(self, key: str | None = None) -> anthropic.AsyncAnthropic:
        plain = anthropic.DefaultAsyncHttpxClient(verify=False)
        client = anthropic.AsyncAnthropic(
            base_url=self.url, api_key=key or self.keys.all, max_retries=0, timeout=30, http_client=plain
        )
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def ask(
        self,
        path: str = CHAT,
        body: Any = None,
        *,
        method: str = "POST",
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request over plain HTTP; `body` is JSON, or sent as it is when it is bytes. `key` "" sends none."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self.keys.all if key is None else key}"} if key != "" else {}
        async with self.session.request(method, self.url + path, data=data, headers=sent | (headers or {})) as r:
            return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.read())

    @contextlib.asynccontextmanager
    async def hung_up(
        self, body: Any, *, request_id: str = "", limit: int = 2**20
    ) -> AsyncIterator[asyncio.StreamReader]:
        """A request whose client goes away at the end of the block, whatever came until then. It takes `limit` bytes
        that nobody reads from the reader."""
        reader, writer = await asyncio.open_connection(HOST, self.port, limit=limit)
        data = json.dumps(body).encode()
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.keys.all}\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(data)}\r\n\r\n".encode()
            + data
        )
        try:
            yield reader
        finally:
            writer.transport.abort()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that full name whose labels match."""
        return sum(
            s.value
            for family in self.gateway.metrics.registry.collect()
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        )

    def waiting(self) -> float:
        return self.metric("steelyard_requests_waiting")

    async def line(self, request_id: str) -> dict[str, Any]:
        """The request's line in the log."""

        def found() -> dict[str, Any] | None:
            lines = (json.loads(text) for text in self.log.path.read_text().splitlines())
            return next((line for line in lines if line["request_id"] == request_id), None)

        return dict(await eventually(f"a log line of {request_id}", found))

    async def rest(self) -> None:
        """Nothing is left of any request, in the gateway or behind a door."""
        await eventually("no request is inside", lambda: self.gateway.requests == 0)
        assert unrested_gauges(self.gateway.metrics.text()) == {}
        assert all(u.sent == 0 for line in self.gateway.fleet.lines.values() for u in line.upstreams.values())
        for engine in self.engines:
            if engine.process is None or engine.process.alive:
                with contextlib.suppress(aiohttp.ClientError):  # dying, or its test has closed it
                    await engine.inside(0)


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """Serves an ASGI app on a free port with uvicorn, as `serving/gateway/deployment.py` does, but without its main
    loop, which only looks whether to stop ten times a second."""
    config = uvicorn.Config(
        app, loop="none", http=ClientProtocol, ws="none", lifespan="off", interface="asgi3", log_config=None,
        access_log=False, server_header=False, proxy_headers=False,
    )  # fmt: skip
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        await server.startup(sockets=[sock])
        yield sock.getsockname()[1]
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.shutdown()
        for task in list(server.server_state.tasks):
            task.cancel()


@contextlib.asynccontextmanager
async def front(keys: Keys, folder: Path, collector: str = "", ratio: float = 1.0) -> AsyncIterator[Front]:
    """A gateway of its own, with an empty table. It sends `ratio` of its traces to the OTLP `collector`."""
    request_log = RequestLog(folder)
    settings = Settings(otlp_endpoint=collector or None, trace_ratio=ratio)
    metrics = GatewayMetrics(CollectorRegistry())
    gateway_id = f"gateway#{uuid.uuid4().hex[:8]}"
    gateway = Gateway(
        gateway_id=gateway_id,
        keys=KeyRing(keys.path),
        secret=SECRET,
        metrics=metrics,
        log=request_log,
        tracing=tracing(settings, gateway_id, HOST, metrics),
    )
    await gateway.start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session, listening(gateway) as port:
        made = Front(gateway, port, keys, request_log, session)
        yield made
        await made.close()
    await gateway.stop()


# -- requests


def chat(text: str = "hello world", *, model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6, **fields}


def endless(**fields: Any) -> dict[str, Any]:
    """A streamed request that takes longer than any test, on an engine with a pace."""
    return chat(stream=True, **{"max_tokens": 2000} | fields)


def json_of(value: Any) -> bytes:
    """JSON as a careless client writes it: NaN and half surrogates included."""
    return json.dumps(value).encode(errors="replace")


def events(stream: bytes) -> list[Any]:
    """The events of an OpenAI stream, parsed; b"[DONE]" stays bytes."""
    assert stream.endswith(b"\n\n"), stream[-100:]
    found = [e.removeprefix(b"data: ") for e in stream[:-2].split(b"\n\n")]
    return [e if e == b"[DONE]" else msgspec.json.decode(e) for e in found]
