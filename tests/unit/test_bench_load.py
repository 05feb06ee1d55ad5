"""The load process against a small real server; the workloads it asks for."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import workloads
from bench.client import Client
from bench.load import Party, Spec, Summary, run_phase
from bench.recording import Recording
from bench.workloads import Production, Steady, Uniform, Workload, together

pytestmark = pytest.mark.slow
Writer = asyncio.StreamWriter
CONTENT = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"delta":{"content":"z"},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """Answers each request with `events` events, `gap_s` apart; remembers bodies and connections."""

    def __init__(self, events: int = 4, gap_s: float = 0.0, close_after: int | None = None) -> None:
        self.events, self.gap_s, self.close_after = events, gap_s, close_after
        self.bodies: list[dict[str, Any]] = []
        self.keys: Counter[str] = Counter()
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.connections += 1
        for served in itertools.count(1):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            self.keys[head.partition(b"Authorization: ")[2].partition(b"\r\n")[0].decode()] += 1
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            writer.write(HEAD)
            for _ in range(self.events - 2):
                writer.write(chunk(CONTENT))
                await asyncio.sleep(self.gap_s)
            writer.write(chunk(LAST) + b"0\r\n\r\n")
            if served == self.close_after:
                break
        writer.close()


@asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener:
        yield "http://{}:{}".format(*listener.sockets[0].getsockname())


async def phase(server: Server, tmp_path: Path, workload: Workload, **more: Any) -> tuple[Summary, Recording]:
    async with listening(server) as url:
        out = str(tmp_path / "r.npz")
        summary = await run_phase(Spec(url, "tiny", workloads.dump(workload), out, **more))
    return summary, Recording.load(Path(out))


async def test_a_closed_loop_keeps_its_clients_busy_on_reused_connections(tmp_path: Path) -> None:
    server = Server()
    summary, recording = await phase(server, tmp_path, Uniform(1), concurrency=3, requests=30)
    assert (summary.requests, summary.errors, summary.events) == (30, {}, 120)
    assert server.connections == 3
    assert recording.peak_open <= 3
    assert len({b["messages"][0]["content"] for b in server.bodies}) == 30


async def test_a_request_is_what_a_streaming_chat_client_sends(tmp_path: Path) -> None:
    server = Server()
    await phase(server, tmp_path, Uniform(1), requests=1, body={"priority": 3})
    body = server.bodies[0]
    assert (body["model"], body["stream"], body["max_tokens"], body["priority"]) == ("tiny", True, 64, 3)
    assert body["ignore_eos"] is True


async def test_requests_are_of_parties_by_weight_with_the_headers_of_each(tmp_path: Path) -> None:
    server = Server()
    parties = (Party(9, {"Authorization": "Bearer a"}), Party(1, {"Authorization": "Bearer b"}))
    _, recording = await phase(server, tmp_path, Uniform(1), concurrency=2, requests=100, parties=parties)
    seen = [recording.party.tolist().count(0), recording.party.tolist().count(1)]
    assert [server.keys["Bearer a"], server.keys["Bearer b"]] == seen
    assert 0 < seen[1] < 25


async def test_a_party_uses_connections_that_its_gateways_took_and_no_others(tmp_path: Path) -> None:
    """The kernel gives each connection to one of two listeners of one port; the other one is another process's."""
    ready = multiprocessing.get_context("fork").Event()
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, reuse_port=True)
    port = listener.sockets[0].getsockname()[1]
    other = multiprocessing.get_context("fork").Process(target=_accept_for_ever, args=(port, ready), daemon=True)
    other.start()
    try:
        assert await asyncio.to_thread(ready.wait, 10)
        parties = (Party(gateways=(os.getpid(),)),)
        spec = Spec(
            f"http://127.0.0.1:{port}",
            "tiny",
            workloads.dump(Uniform(1)),
            str(tmp_path / "r.npz"),
            concurrency=8,
            requests=30,
            parties=parties,
        )
        summary = await run_phase(Spec.of(spec.json()))
    finally:
        other.kill()
        other.join()
        listener.close()
    assert (summary.requests, summary.errors) == (30, {})


def _accept_for_ever(port: int, ready: Any) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind(("127.0.0.1", port))
        s.listen(4096)
        ready.set()
        kept = []
        while True:
            kept.append(s.accept())


async def test_a_closed_loop_stops_asking_when_its_time_is_up(tmp_path: Path) -> None:
    summary, _ = await phase(Server(gap_s=0.02), tmp_path, Uniform(1), concurrency=2, duration_s=0.3)
    assert 0.3 <= summary.wall_s < 2.0
    assert summary.requests > 2


async def test_an_open_loop_asks_on_time_whatever_the_server_does(tmp_path: Path) -> None:
    summary, recording = await phase(Server(gap_s=0.2), tmp_path, Steady(1, 20, 0.2, 3), mode="open")
    assert (summary.requests, summary.errors) == (20, {})
    assert recording.peak_open == 20
    assert np.ptp(recording.due) == pytest.approx(0.19, abs=1e-6)


async def test_a_connection_closed_while_idle_is_no_error(tmp_path: Path) -> None:
    server = Server(close_after=1)
    summary, _ = await phase(server, tmp_path, Uniform(1), requests=5)
    assert (summary.requests, summary.errors) == (5, {})
    assert server.connections >= 5


async def test_a_server_that_is_not_there_is_an_error_of_every_request(tmp_path: Path) -> None:
    async with listening(Server()) as url:
        pass
    summary = await run_phase(Spec(url, "tiny", workloads.dump(Uniform(1)), str(tmp_path / "r.npz"), requests=3))
    assert summary.requests == 3
    assert sum(summary.errors.values()) == 3


async def test_a_server_that_falls_silent_ends_in_a_client_timeout(tmp_path: Path) -> None:
    summary, _ = await phase(Server(gap_s=60), tmp_path, Uniform(1), requests=1, timeout_s=0.2)
    assert summary.errors == {"client timeout": 1}


async def test_a_look_that_fails_leaves_the_next_phase_its_own_answer(tmp_path: Path) -> None:
    async with listening(Server()) as url:
        pass  # nobody is there: a request takes 50 ms

    def look() -> None:
        raise OSError("gone")

    def spec(requests: int) -> Spec:
        return Spec(url, "tiny", workloads.dump(Uniform(1)), str(tmp_path / "r.npz"), requests=requests)

    with Client() as client:
        with pytest.raises(OSError, match="gone"):
            await asyncio.to_thread(client.run, spec(4), look, 0.01)
        summary, _ = await asyncio.to_thread(client.run, spec(1))
    assert summary.requests == 1


@pytest.mark.parametrize("make", [Uniform, lambda seed: Production(seed, 20, 10), lambda seed: Steady(seed, 50, 5, 9)])
def test_a_seed_fixes_a_workload(make: Callable[[int], Workload]) -> None:
    assert make(1).calls() == make(1).calls() != make(2).calls()
    assert workloads.load(json.loads(json.dumps(workloads.dump(make(1))))) == make(1)


def test_workloads_together_keep_each_call_at_its_time() -> None:
    first, second = Steady(1, 5, 10, 3), Steady(2, 7, 4, 9)
    both = together(first, second)
    assert sorted(both.calls(), key=repr) == sorted(first.calls() + second.calls(), key=repr)
    assert [c.at_s for c in both.calls()] == sorted(c.at_s for c in both.calls())
    assert workloads.load(json.loads(json.dumps(workloads.dump(both)))).calls() == both.calls()


def test_production_keeps_its_rate_its_context_and_its_shared_prefixes() -> None:
    calls = Production(3, duration_s=400, rate_per_s=10).calls()
    assert len(calls) == pytest.approx(4000, rel=0.1)
    assert all(len(c.prompt) + c.max_tokens + 64 <= 2048 for c in calls)
    openings = [c.prompt[:100] for c in calls if len(c.prompt) > 100]
    shared = sum(openings.count(o) > 20 for o in openings) / len(openings)
    assert 0.2 < shared < 0.5


def test_production_arrivals_are_bursty() -> None:
    times = [c.at_s for c in Production(3, duration_s=400, rate_per_s=10, burstiness=3.0).calls()]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.pvariance(gaps) / statistics.mean(gaps) ** 2 == pytest.approx(3.0, rel=0.25)
