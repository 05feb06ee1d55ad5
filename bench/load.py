"""A lean streaming load generator in its own process: `python -m bench.load < specs`, one JSON spec per line.

Each line runs one phase and answers with two JSON lines, at its begin and at its end; the per-request arrays go to the
npz named by `out` (`bench.recording`). The process stays between lines, so that a bench does not pay imports on cores it
is measuring.

Closed loop (`concurrency` workers, for `duration_s` seconds or `requests` requests) when `mode` is "closed"; with
"open", every call starts at its `at_s` whatever the others do. Connections are kept alive and reused, latest first, like
a client pool's; `concurrency` of them are opened before the clock starts. A request whose connection the server had
closed while idle is sent once more on a new one, as any client does.

With `parties`, each request is of one of them, drawn by weight: with its headers (another key), and over connections of the
gateways it names. Those share one port, and the kernel spreads connections over them; which one took a connection is read
from /proc, so gateways and this process must be of one user on one host.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
_SORTING_AT_ONCE = 512  # where most of them are another gateway's; under the backlogs of several
_ACCEPT_S = 5.0  # for a gateway to take a connection from its backlog


@dataclass(frozen=True)
class Party:
    """Some of the requests of a phase, `weight` against the other parties'. `gateways`: pids; none means any."""

    weight: float = 1.0
    headers: dict[str, str] = field(default_factory=dict)
    gateways: tuple[int, ...] = ()


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
    parties: tuple[Party, ...] = ()

    @classmethod
    def of(cls, line: str) -> Spec:
        data = json.loads(line)
        parties = tuple(Party(**{**p, "gateways": tuple(p["gateways"])}) for p in data.pop("parties"))
        return cls(parties=parties, **data)

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


@dataclass(frozen=True)
class Order:
    """One request, ready to send."""

    call: Call
    request: bytes
    pool: Pool
    party: int = 0

    async def send(self, due: float | None = None) -> Answer:
        return await self.pool.exchange(self.request, self.call, due, self.party)


class Pool:
    """Keep-alive connections to one server, or to those `gateways` among the processes that share its port, latest used
    first."""

    def __init__(self, host: str, port: int, timeout_s: float, gateways: tuple[int, ...] = ()) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._gateways = gateways
        self._idle: list[Connection] = []
        self.reconnects = 0

    async def open(self, n: int) -> None:
        while len(self._idle) < n:
            missing = n - len(self._idle)
            at_once = _SORTING_AT_ONCE if self._gateways else min(_OPENING_AT_ONCE, missing)
            fresh = await asyncio.gather(*(self._connect() for _ in range(at_once)))
            self._idle.extend(await self._theirs(fresh))

    async def exchange(self, request: bytes, call: Call, due: float | None = None, party: int = 0) -> Answer:
        """Send one request and wait for its end; never raises for what the server did (`Answer.error` tells).
        Without `due` the answer is due the moment it is sent."""
        for last_try in (False, True):
            answer = Answer(call.max_tokens, due if due is not None else time.monotonic(), party)
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
        while not (found := await self._theirs([await self._connect()])):
            pass
        return found[0]

    async def _theirs(self, fresh: list[Connection]) -> list[Connection]:
        """Those of the connections that the wanted gateways took; the others are closed."""
        if not self._gateways:
            return fresh
        unknown, deadline = {c.local_port: c for c in fresh}, time.monotonic() + _ACCEPT_S
        found: list[Connection] = []
        while unknown:
            await asyncio.sleep(0.01)
            took = taken(self._port)
            wanted = sockets_of(self._gateways)
            for port in unknown.keys() & took.keys():
                connection = unknown.pop(port)
                if took[port] in wanted:
                    found.append(connection)
                else:
                    connection.close()
            if unknown and time.monotonic() > deadline:
                raise TimeoutError(f"nobody took {len(unknown)} connections to port {self._port}")
        return found

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return connection


def taken(port: int) -> dict[int, str]:
    """Of the connections to `port` (IPv4) that somebody took from the backlog: the client's port -> the socket's inode on
    the side that took it. The lines are those of proc_pid_net(5)."""
    found: dict[int, str] = {}
    mine = f":{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(mine) and fields[9] != "0":
            found[int(fields[2].rpartition(":")[2], 16)] = fields[9]
    return found


def sockets_of(pids: tuple[int, ...]) -> set[str]:
    """Inodes of the sockets that these processes hold."""
    found = set()
    for pid in pids:
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(fd.path)
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def encode(spec: Spec, call: Call, host: str, extra: dict[str, str]) -> bytes:
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
        **extra,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {spec.path} HTTP/1.1\r\n{head}\r\n".encode() + payload


async def closed_loop(orders: Iterator[Order], workers: int, until: float) -> list[Answer]:
    """`workers` clients, each asking again as soon as it is answered, until the clock says `until` or the orders end."""
    answers: list[Answer] = []

    async def work() -> None:
        while time.monotonic() < until and (order := next(orders, None)):
            answers.append(await order.send())

    await asyncio.gather(*(work() for _ in range(workers)))
    return answers


async def open_loop(orders: Iterator[Order], began: float) -> list[Answer]:
    """Every call at its own time. An answer is due at the scheduled time even when this process was late."""
    tasks: list[asyncio.Task[Answer]] = []
    for order in orders:
        due = began + order.call.at_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(order.send(due)))
    return list(await asyncio.gather(*tasks))


async def run_phase(spec: Spec, on_begin: Callable[[float], None] = lambda _: None) -> Summary:
    """Run one spec to its end and write its recording. `on_begin` is told the clock's zero, once all is encoded and
    connected."""
    url = urlsplit(spec.base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    parties = spec.parties or (Party(),)
    pools = {p.gateways: Pool(host, port, spec.timeout_s, p.gateways) for p in parties}
    calls = workloads.load(spec.workload).calls()
    whose = random.Random(0).choices(range(len(parties)), [p.weight for p in parties], k=len(calls))
    orders = [
        Order(call, encode(spec, call, f"{host}:{port}", parties[i].headers), pools[parties[i].gateways], i)
        for call, i in zip(calls, whose, strict=True)
    ]
    for pool in pools.values():
        with contextlib.suppress(OSError):  # a server that is down shows as an error of every request
            await pool.open(spec.concurrency)
    cpu, began = time.process_time(), time.monotonic()
    on_begin(began)
    if spec.mode == "open":
        answers = await open_loop(iter(orders), began)
    else:
        endless = itertools.islice(itertools.cycle(orders), spec.requests)
        answers = await closed_loop(endless, spec.concurrency, began + spec.duration_s)
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
    for pool in pools.values():
        pool.close()
    recording = Recording.of(answers, began)
    recording.save(Path(spec.out))
    errors = Counter(a.error for a in answers if a.error)
    reconnects = sum(pool.reconnects for pool in pools.values())
    return Summary(len(answers), recording.events_total, wall_s, cpu_s, reconnects, dict(errors), spec.out)


def _tell(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve specs from standard input until it ends."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _tell({"ready": os.getpid()})
    for line in sys.stdin:
        if line.strip():
            gc.collect()
            gc.disable()  # a collection in mid-phase would look like a slow server
            summary = uvloop.run(run_phase(Spec.of(line), lambda began: _tell({"began": began})))
            gc.enable()
            _tell(asdict(summary))


if __name__ == "__main__":
    main()
