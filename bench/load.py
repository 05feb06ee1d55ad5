"""A lean streaming load generator in its own process: `python -m bench.load < specs`, one JSON spec per line.

Each line runs one phase and answers with one JSON line; the per-request arrays go to the npz named by `out`
(`bench.recording`). The process stays between lines, so that a bench does not pay imports on cores it is measuring.

Closed loop (`concurrency` workers, for `duration_s` seconds or `requests` requests) when `mode` is "closed"; with
"open", every call starts at its `at_s` whatever the others do. Connections are kept alive and reused, latest first, like
a client pool's; `concurrency` of them are opened before the clock starts. A request whose connection the server had
closed while idle is sent once more on a new one, as any client does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import uvloop

from bench import workloads
from bench.recording import Recording
from bench.stream import Answer, Connection
from bench.workloads import Call

_OPENING_AT_ONCE = 64  # under a listener's backlog


@dataclass(frozen=True)
class Spec:
    """One phase. Seconds everywhere; `workload` as written by `workloads.dump`; calls are reused when a closed loop
    outlasts them; `body` is merged into every request."""

    base_url: str
    model: str
    workload: dict[str, Any]
    out: str
    mode: Literal["closed", "open"] = "closed"
    concurrency: int = 1
    duration_s: float = 5.0
    requests: int | None = None
    timeout_s: float = 120.0
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)

    def json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Summary:
    """The answer to one spec. `cpu_s` is what this process itself burned during the phase."""

    requests: int
    events: int
    wall_s: float
    cpu_s: float
    reconnects: int
    errors: dict[str, int]
    out: str


class Pool:
    """Keep-alive connections to one server, latest used first."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._idle: list[Connection] = []
        self.reconnects = 0

    async def open(self, n: int) -> None:
        for done in range(0, n, _OPENING_AT_ONCE):
            fresh = [self._connect() for _ in range(min(_OPENING_AT_ONCE, n - done))]
            self._idle.extend(await asyncio.gather(*fresh))

    async def exchange(self, request: bytes, call: Call, due: float | None = None) -> Answer:
        """Send one request and wait for its end; never raises for what the server did (`Answer.error` tells).
        Without `due` the answer is due the moment it is sent."""
        for last_try in (False, True):
            answer = Answer(call.max_tokens, due if due is not None else time.monotonic())
            try:
                connection = await self._take()
            except OSError as error:
                answer.start = answer.end = time.monotonic()
                answer.error = f"connect: {error.strerror or error}"
                await asyncio.sleep(0.05)  # a closed loop on a dead server must not spin
                return answer
            await self._one(connection, request, answer)
            if connection.reusable:
                self._idle.append(connection)
            if last_try or not (connection.untouched and answer.error == "connection cut"):
                break
            self.reconnects += 1
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _one(self, connection: Connection, request: bytes, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        bound = loop.call_later(self._timeout_s, connection.abort, "client timeout")
        connection.send(request, answer, lambda _: done.set_result(None))
        await done
        bound.cancel()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return await self._connect()

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


def encode(spec: Spec, call: Call, host: str) -> bytes:
    """One HTTP/1.1 request, ready to write."""
    body = {
        "model": spec.model,
        "messages": [{"role": "user", "content": call.prompt}],
        "max_tokens": call.max_tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        **spec.body,
    }
    payload = json.dumps(body, separators=(",", ":")).encode()
    headers = {
        "Host": host,
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Content-Length": str(len(payload)),
        **spec.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {spec.path} HTTP/1.1\r\n{head}\r\n".encode() + payload


async def closed_loop(pool: Pool, calls: Iterator[tuple[Call, bytes]], workers: int, until: float) -> list[Answer]:
    """`workers` clients, each asking again as soon as it is answered, until the clock says `until` or `calls` end."""
    answers: list[Answer] = []

    async def work() -> None:
        while time.monotonic() < until and (item := next(calls, None)):
            answers.append(await pool.exchange(item[1], item[0]))

    await asyncio.gather(*(work() for _ in range(workers)))
    return answers


async def open_loop(pool: Pool, calls: Iterator[tuple[Call, bytes]], began: float) -> list[Answer]:
    """Every call at its own time. An answer is due at the scheduled time even when this process was late."""
    tasks: list[asyncio.Task[Answer]] = []
    for call, request in calls:
        due = began + call.at_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(pool.exchange(request, call, due)))
    return list(await asyncio.gather(*tasks))


async def run_phase(spec: Spec) -> Summary:
    """Run one spec to its end and write its recording."""
    url = urlsplit(spec.base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    pool = Pool(host, port, spec.timeout_s)
    calls = workloads.load(spec.workload).calls()
    encoded = [(call, encode(spec, call, f"{host}:{port}")) for call in calls]
    with contextlib.suppress(OSError):  # a server that is down shows as an error of every request
        await pool.open(spec.concurrency)
    cpu, began = time.process_time(), time.monotonic()
    if spec.mode == "open":
        answers = await open_loop(pool, iter(encoded), began)
    else:
        endless = itertools.islice(itertools.cycle(encoded), spec.requests)
        answers = await closed_loop(pool, endless, spec.concurrency, began + spec.duration_s)
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
    pool.close()
    recording = Recording.of(answers, began)
    recording.save(Path(spec.out))
    errors = Counter(a.error for a in answers if a.error)
    return Summary(len(answers), recording.events_total, wall_s, cpu_s, pool.reconnects, dict(errors), spec.out)


def main() -> None:
    """Serve specs from standard input until it ends."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.stdout.write(json.dumps({"ready": os.getpid()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if line.strip():
            gc.collect()
            gc.disable()  # a collection in mid-phase would look like a slow server
            summary = uvloop.run(run_phase(Spec(**json.loads(line))))
            gc.enable()
            sys.stdout.write(json.dumps(asdict(summary)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
