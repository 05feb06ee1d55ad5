"""What the gateway answers itself: is it alive, is everything up, and the metrics of the whole stack through one port."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.fleet.endpoint import GatewayInfo, Snapshot, State
from serving.gateway import scrape as scraping
from tests.gateway import harness
from tests.gateway.harness import HOST, SECRET, EngineRoom, Front, Keys, chat, eventually, listening, refusing


async def scrape(front: Front, query: str = "", key: str | None = None) -> str:
    answer = await front.ask(f"/metrics{query}", method="GET", key=key or front.keys.metrics)
    assert (answer.status, answer.headers["content-type"][:10]) == (200, "text/plain"), answer
    return answer.body.decode()


@pytest.mark.parametrize("path", ["/healthz", "/-/healthz"])
async def test_a_gateway_that_lives_says_so_to_anyone(front: Front, path: str) -> None:
    answer = await front.ask(path, method="GET", key="")
    assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_ready_means_every_model_that_must_be_up_is(front: Front, room: EngineRoom) -> None:
    async def ready() -> tuple[int, dict[str, object]]:
        answer = await front.ask("/readyz", method="GET", key="")
        return answer.status, answer.json()

    assert await ready() == (503, {"status": "not ready", "missing": 1})
    tiny, v2 = room.shared(), room.shared(version="v2")
    front.serve(tiny, v2, refusing(model="other", state=State.STARTING))
    assert await ready() == (503, {"status": "not ready", "missing": 1})
    front.serve(tiny, v2, refusing(model="other"))
    assert await ready() == (200, {"status": "ready"})
    front.gateway.draining = True
    assert await ready() == (503, {"status": "draining", "missing": 0})


async def test_metrics_need_their_own_scope(gateway: Front, keys: Keys) -> None:
    for path in ("/metrics", "/metrics/targets"):
        answer = await gateway.ask(path, method="GET", key=keys.all)
        assert (answer.status, answer.error["code"]) == (403, "scope_missing")
        assert (await gateway.ask(path, method="GET", key=keys.metrics)).status == 200


async def test_one_page_holds_every_process_told_apart_by_labels(gateway: Front) -> None:
    await gateway.ask(body=chat())
    page = await scrape(gateway)
    replica = gateway.engines[0].endpoint.id
    assert f'steelyard_requests_total{{component="gateway",instance="{gateway.gateway.id}"' in page
    joined = f'{{component="engine",instance="{replica}",replica="{replica}",model="tiny",version="v1"'
    assert f"vllm:num_requests_running{joined}" in page
    assert page.count("# TYPE vllm:num_requests_running ") == 1
    assert (
        f'steelyard_replicas{{component="gateway",instance="{gateway.gateway.id}"' in page and 'state="READY"' in page
    )


async def test_discovery_names_every_source_and_each_can_be_asked_for(gateway: Front) -> None:
    targets = (await gateway.ask("/metrics/targets", method="GET", key=gateway.keys.metrics)).json()
    assert {t["targets"][0] for t in targets} == {f"{HOST}:{gateway.port}"}
    sources = {t["labels"]["__param_source"] for t in targets}
    assert sources == {gateway.gateway.id, gateway.engines[0].endpoint.id}
    pages = [await scrape(gateway, f"?source={s.replace('#', '%23')}") for s in sorted(sources)]
    assert sum("vllm:" in page for page in pages) == sum("steelyard_requests_held" in page for page in pages) == 1


async def test_a_source_nobody_knows_is_404(gateway: Front, keys: Keys) -> None:
    answer = await gateway.ask("/metrics?source=http://10.0.0.1/", method="GET", key=keys.metrics)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_a_source_that_is_gone_is_an_error_alone_and_left_out_of_the_whole(
    front: Front, room: EngineRoom
) -> None:
    front.serve(room.shared(), refusing())
    answer = await front.ask("/metrics?source=gone", method="GET", key=front.keys.metrics)
    assert answer.status == 502
    assert "vllm:num_requests_running" in await scrape(front)


async def test_a_process_that_stands_still_makes_no_scrape_late_and_is_there_again_when_it_moves(
    gateway: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long one may take when it is asked for alone."""
    monkeypatch.setattr(scraping, "TIMEOUT_S", 3600.0)
    monkeypatch.setattr(scraping, "FRESH_S", -1.0)
    asked, go = 0, asyncio.Event()

    async def slow() -> str:
        nonlocal asked
        asked += 1
        await go.wait()
        return "slow_things 1\n"

    gateway.gateway.sources["slow"] = slow
    monkeypatch.setattr(scraping, "WHOLE_S", 0.3)
    page = await scrape(gateway)
    assert f'instance="{gateway.engines[0].endpoint.id}"' in page and "slow_things" not in page
    assert re.search(r'steelyard_target_up\{[^}]*instance="slow"[^}]*\} 0', page)
    monkeypatch.setattr(scraping, "WHOLE_S", 3600.0)
    assert "slow_things" not in await scrape(gateway) and asked == 1, "nor is it asked again"
    go.set()
    await eventually("it has answered", lambda: gateway.gateway._own._scraper._asked["slow"].done())
    assert re.search(r'steelyard_target_up\{[^}]*instance="slow"[^}]*\} 1', await scrape(gateway))
    assert asked == 2


async def test_a_process_that_is_asked_again_and_again_in_vain_makes_one_scrape_late(
    gateway: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where scrapes are rarer than its timeout, so that each finds it unasked."""
    monkeypatch.setattr(scraping, "TIMEOUT_S", 3600.0)
    monkeypatch.setattr(scraping, "FRESH_S", -1.0)
    asked, scraper = list[asyncio.Future[str]](), gateway.gateway._own._scraper

    async def slow() -> str:
        asked.append(asyncio.get_running_loop().create_future())
        return await asked[-1]

    gateway.gateway.sources["slow"] = slow
    monkeypatch.setattr(scraping, "WHOLE_S", 0.3)
    await scrape(gateway)
    monkeypatch.setattr(scraping, "WHOLE_S", 3600.0)
    for again in (2, 3):
        asked[-1].set_exception(TimeoutError())
        await eventually("its timeout is over", lambda: scraper._asked["slow"].done())
        page = await asyncio.wait_for(scrape(gateway), 10)
        assert re.search(r'steelyard_target_up\{[^}]*instance="slow"[^}]*\} 0', page) and len(asked) == again
    asked[-1].set_result("slow_things 1\n")
    await eventually("it has answered", lambda: scraper._asked["slow"].done())
    after = asyncio.create_task(scrape(gateway))
    await eventually("it is asked", lambda: len(asked) == 4)
    asked[-1].set_result("slow_things 2\n")
    assert re.search(r'steelyard_target_up\{[^}]*instance="slow"[^}]*\} 1', await after), "waited for again"


@contextlib.asynccontextmanager
async def misbehaving(how: str) -> AsyncIterator[str]:
    """The URL of a process that takes connections and never gives a whole answer."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nbad_things 1\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if how == "dies":
                writer.write(head)
            elif how == "points at itself":
                writer.write(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /\r\ncontent-length: 0\r\n\r\n")
            elif how == "drips":
                writer.write(head)
                while True:
                    writer.write(b"bad_things 2\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            elif how == "is silent":
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, HOST, 0, backlog=512)
    try:
        yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(("how", "count"), [("is silent", 150), ("dies", 2), ("drips", 2), ("points at itself", 2)])
async def test_whatever_a_source_does_the_whole_is_there_in_time_and_says_who_is_missing(
    gateway: Front, monkeypatch: pytest.MonkeyPatch, how: str, count: int
) -> None:
    """However many, and while threads are where the process's common ones hang, as in look-ups of names."""
    monkeypatch.setattr(scraping, "TIMEOUT_S", 3600.0)
    monkeypatch.setattr(scraping, "WHOLE_S", 0.5)
    monkeypatch.setattr(scraping, "FRESH_S", -1.0)
    hang = threading.Event()
    threads = [asyncio.get_running_loop().run_in_executor(None, hang.wait) for _ in range(40)]
    async with misbehaving(how) as url:
        bad = [GatewayInfo(id=f"bad{i}", url=url) for i in range(count)]
        gateway.table(*gateway.engines, gateways=tuple(bad))
        try:
            for _ in range(2):
                page = await asyncio.wait_for(scrape(gateway), 20)
                up = dict(re.findall(r'steelyard_target_up\{[^}]*instance="([^"]*)"[^}]*\} (\d)', page))
                good = {gateway.gateway.id, gateway.engines[0].endpoint.id}
                assert up == dict.fromkeys(good, "1") | {b.id: "0" for b in bad}
                assert "vllm:num_requests_running" in page and "bad_things" not in page
        finally:
            hang.set()
            await asyncio.gather(*threads)


async def test_its_own_figures_are_as_new_as_those_it_waited_for(gateway: Front) -> None:
    async def other() -> str:
        await gateway.ask(body=chat())
        await eventually("it is done", lambda: gateway.metric("steelyard_requests_total", model="tiny"))
        return "other 1\n"

    gateway.gateway.sources["other"] = other
    page = await scrape(gateway)
    assert re.search(r'steelyard_requests_total\{[^}]*model="tiny"[^}]*\} 1', page)


@pytest.fixture
async def sibling(front: Front, keys: Keys, tmp_path: Path) -> AsyncIterator[Front]:
    """A second gateway with its private listener, known to the first by the directory."""
    async with harness.front(keys, tmp_path / "sibling") as other, listening(other.gateway) as private:
        other.gateway.private_port = private
        info = GatewayInfo(id=other.gateway.id, url=f"http://{HOST}:{private}")
        front.gateway.fleet.set_snapshot(Snapshot(epoch="test", number=1, complete=True, gateways=(info,)))
        other.port, other.url_of_public = private, other.url
        yield other


async def test_gateways_scrape_each_other(front: Front, sibling: Front) -> None:
    page = await scrape(front)
    for gateway in (front, sibling):
        assert f'steelyard_process_start_time_seconds{{component="gateway",instance="{gateway.gateway.id}"}}' in page


async def test_the_private_listener_answers_gateways_only_and_only_metrics(sibling: Front, keys: Keys) -> None:
    for headers in ({}, {"x-steelyard-secret": "wrong"}):
        answer = await sibling.ask("/metrics", method="GET", key=keys.metrics, headers=headers)
        assert answer.status == 401
    known = {"x-steelyard-secret": SECRET}
    assert (await sibling.ask("/metrics", method="GET", key="", headers=known)).status == 200
    assert (await sibling.ask("/v1/models", method="GET", headers=known)).status == 404
    assert (await sibling.ask(body=chat(), headers=known)).status == 404
