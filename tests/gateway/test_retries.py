"""Sick engines beside well ones: what has not been answered goes elsewhere, the innocent are spared, the guilty remembered."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import anthropic
import msgspec
import pytest

from serving.engine.door import TRIAL_HEADER
from serving.fleet.endpoint import GatewayInfo, State
from serving.gateway import retry, routing
from serving.gateway.fuse import fingerprint
from serving.gateway.routing import TRIPS
from tests.gateway import harness
from tests.gateway.harness import (
    CHAT,
    HOST,
    MESSAGES,
    Answer,
    Engine,
    EngineRoom,
    Front,
    Keys,
    chat,
    endless,
    events,
    eventually,
    recorded,
    refusing,
)

pytestmark = pytest.mark.slow
ATTEMPTS = "steelyard_upstream_attempts_total"


def suspect(engine: Engine) -> Engine:
    return Engine(msgspec.structs.replace(engine.endpoint, state=State.SUSPECT), engine.process)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_suspect_has_not_answered_is_answered_elsewhere(
    front: Front, room: EngineRoom, stream: bool
) -> None:
    hanging, well = room.shared(sins="hangs", after=0), room.shared()
    front.serve(hanging)
    asked = [asyncio.create_task(front.ask(body=chat(f"hello {i}", stream=stream))) for i in range(8)]
    await hanging.inside(8)
    front.table(suspect(hanging), well)
    answers = await asyncio.gather(*asked)
    assert {a.status for a in answers} == {200}
    assert front.metric(ATTEMPTS, outcome="silent") == 8
    await hanging.inside(0)


async def test_the_death_of_one_engine_loses_none_of_the_many_inside(front: Front, room: EngineRoom) -> None:
    """Answers that come whole, and late: each keeps its turn for a moment only."""
    dying, well = room.start(slots=32, sim_ttft_ms=60_000), room.start(slots=32, sim_ttft_ms=1500)
    front.serve(dying)
    asked = [asyncio.create_task(front.ask(body=chat(f"hello {i}"))) for i in range(24)]
    await dying.inside(24)
    front.table(well)
    with mock.patch.object(retry, "TRIAL_S", 0.02):
        assert dying.process is not None and dying.process.pid is not None
        os.kill(dying.process.pid, signal.SIGKILL)
        answers = await asyncio.gather(*asked)
    assert {a.status for a in answers} == {200}


async def test_a_suspect_without_a_better_one_keeps_what_it_has_and_gets_nothing_new(
    front: Front, room: EngineRoom
) -> None:
    engine = room.start(sim_ttft_ms=700)
    front.serve(engine)
    asked = asyncio.create_task(front.ask(body=chat()))
    await engine.inside(1)
    front.table(suspect(engine))
    later = asyncio.create_task(front.ask(body=chat("later")))
    assert (await asked).status == 200
    assert (front.waiting(), front.metric(ATTEMPTS)) == (1, 1)
    front.table(engine)
    assert (await later).status == 200


async def test_a_stream_that_says_nothing_for_longer_than_any_of_late_is_begun_elsewhere(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "SILENT_LEAST_S", 1.0)
    hanging = room.shared(sins="hangs", after=0)
    front.serve(hanging)
    asked = asyncio.create_task(front.ask(body=chat(stream=True)))
    await hanging.inside(1)
    front.table(hanging, room.shared())
    answer = await asked
    assert answer.status == 200 and events(answer.body)[-1] == b"[DONE]"
    assert not front.gateway.fleet.fuse.armed  # slow is no crime


async def test_an_engine_that_fails_in_a_row_is_asked_no_more_until_it_is_its_time(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "TRY_FIRST_S", 60.0)
    monkeypatch.setattr(routing, "TRY_LONGEST_S", 60.0)
    front.serve(room.shared(sins="returns_500"), room.shared())
    for i in range(3 * TRIPS):
        assert (await front.ask(body=chat(f"hello {i}"))).status == 200
    assert front.metric(ATTEMPTS, outcome="http_5xx") == TRIPS


async def test_a_prompt_that_kills_engines_takes_no_innocent_with_it(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were inside when the first engine died, and none had an answer yet. They are not beside each other again."""
    for name in ("TRIAL_S", "CROWD_S"):
        monkeypatch.setattr(retry, name, 600.0)  # until they have an answer, however busy this machine is
    dying = [room.start(sins="dies_on_prompt", sim_ttft_ms=ms, slots=32) for ms in (5000, 5, 5, 5)]
    front.serve(dying[0])
    innocent = [
        asyncio.create_task(front.ask(body=chat(f"hello {i}", stream=i % 2 == 0, max_tokens=1))) for i in range(12)
    ]
    await dying[0].inside(12)
    guilty = asyncio.create_task(front.ask(body=chat("SIM_DIE")))
    await eventually("the first engine died", lambda: not dying[0].process.alive)  # type: ignore[union-attr]
    front.table(*dying[1:])
    answers: list[Answer] = await asyncio.gather(*innocent)
    assert [a.status for a in answers] == [200] * 12
    assert (await guilty).error["code"] == "request_crashed_engine"
    assert sum(e.process is not None and e.process.alive for e in dying) == 2
    fuse = front.gateway.fleet.fuse
    await eventually("only the guilty one is remembered", lambda: len(fuse.told().deaths) == 1)
    assert not fuse.blown("anything")


async def test_the_same_request_that_waited_is_not_tried_when_its_fuse_has_blown(
    front: Front, room: EngineRoom
) -> None:
    first, second, third = (room.start(sins="dies_on_prompt", slots=1) for _ in range(3))
    front.serve(first)
    guilty = [asyncio.create_task(front.ask(body=chat("SIM_DIE"))) for _ in range(4)]
    await eventually("the first engine died", lambda: not first.process.alive)  # type: ignore[union-attr]
    front.table(second)
    await eventually("the second engine died", lambda: not second.process.alive)  # type: ignore[union-attr]
    front.table(third)
    answers: list[Answer] = await asyncio.gather(*guilty)
    assert {a.error["code"] for a in answers} == {"request_crashed_engine"}
    assert third.process is not None and third.process.alive
    assert (await front.ask(body=chat("hello"))).status == 200


@pytest.fixture(autouse=True)
def short_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways in one process hear of each other at once."""
    monkeypatch.setattr(retry, "LAST_NEWS_S", 0.1)


class Two:
    """Two gateways before the same engines. Each hears of what the other's fuse saw, as by the directory."""

    def __init__(self, *fronts: Front) -> None:
        self.engines: dict[str, tuple[Engine, ...]] = {}
        self.fronts = fronts
        for f in fronts:
            f.serve()
            f.gateway.fleet.fuse.on_news = self.news

    def table(self, front: Front, *engines: Engine) -> None:
        self.engines[front.gateway.id] = engines
        told = ((f.gateway.id, f.gateway.fleet.fuse.told()) for f in self.fronts)
        infos = (GatewayInfo(id=i, url="", deaths=t.deaths, trials=t.trials, suspects=t.suspects) for i, t in told)
        front.table(*engines, gateways=tuple(infos))

    def news(self) -> None:
        for f in self.fronts:
            self.table(f, *self.engines.get(f.gateway.id, ()))


@pytest.fixture
async def other(keys: Keys, tmp_path: Path) -> AsyncIterator[Front]:
    async with harness.front(keys, tmp_path / "other") as other:
        yield other
        await other.rest()


def dead(*engines: Engine) -> int:
    return sum(e.process is not None and not e.process.alive for e in engines)


async def test_who_is_on_trial_when_an_engine_dies_answers_for_those_who_are_not(
    front: Front, other: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The innocent were inside the first death and are inside the second, long past their own trials. They came by another
    gateway than the guilty one."""
    monkeypatch.setattr(retry, "TRIAL_S", 0.05)
    a, b, c = (room.start(sins="dies_on_prompt", sim_ttft_ms=ms, slots=8) for ms in (60_000, 60_000, 1))
    two = Two(front, other)
    two.table(front, a)
    two.table(other, a)
    innocent = [asyncio.create_task(front.ask(body=chat(f"hello {i}"))) for i in range(4)]
    await a.inside(4)
    guilty = asyncio.create_task(other.ask(body=chat("SIM_DIE")))
    await eventually("the first engine died", lambda: dead(a))
    two.table(front, b)
    await b.inside(4)
    trials = front.gateway.fleet.lines["tiny@v1"].trials
    await eventually("their trials are over", lambda: not trials.homes)
    monkeypatch.setattr(retry, "TRIAL_S", 60.0)
    two.table(other, b)
    await eventually("the second engine died", lambda: dead(b))
    two.table(front, c)
    two.table(other, c)
    answers: list[Answer] = await asyncio.gather(*innocent)
    assert [a.status for a in answers] == [200] * 4
    assert (await guilty).error["code"] == "request_crashed_engine"
    assert not dead(c)


async def test_a_newcomer_that_ends_an_engine_is_told_from_who_was_on_trial_there(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The innocent one is neither refused nor tried before the newcomer has had its own trial."""
    monkeypatch.setattr(retry, "TRIAL_S", 60.0)
    first, *more = (room.start(sins="dies_on_prompt", sim_ttft_ms=ms, slots=8) for ms in (60_000, 5, 5))
    front.serve(first)
    front.gateway.fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, chat("hello")), "earlier")
    innocent = asyncio.create_task(front.ask(body=chat("hello")))
    await first.inside(1)
    newcomer = asyncio.create_task(front.ask(body=chat("SIM_DIE")))
    await eventually("the engine died", lambda: dead(first))
    front.table(*more)
    assert (await innocent).status == 200
    assert (await newcomer).error["code"] == "request_crashed_engine"
    assert dead(*more) == 1


async def test_whom_the_door_had_not_let_in_when_the_engine_died_was_not_inside(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way, or in the socket's queue, behind the one that ended the engine."""
    well = room.shared()
    front.serve(well)
    fuse = front.gateway.fleet.fuse
    asked = chat("hello")
    for body in (asked, chat("another")):
        fuse.died(fingerprint("tiny@v1", CHAT, None, body), "earlier")
    assert (await front.ask(body=chat("another"))).status == 200  # so this gateway knows that doors tell
    with socket.socket() as dying:
        dying.bind((HOST, 0))
        dying.listen()
        url = f"http://{HOST}:{dying.getsockname()[1]}"
        front.table(Engine(msgspec.structs.replace(well.endpoint, id="dying", url=url)))
        task = asyncio.create_task(front.ask(body=asked))
        connection, _ = await asyncio.get_running_loop().run_in_executor(None, dying.accept)
        assert b"expect: 100-continue" in await asyncio.get_running_loop().run_in_executor(None, connection.recv, 65536)
        connection.close()
    front.table(well)
    assert (await task).status == 200
    assert front.metric(ATTEMPTS, outcome="died") == 1
    assert fuse.told().deaths == {}
    front.engines.clear()


async def test_copies_of_a_guilty_one_at_two_gateways_end_two_engines_in_all(
    front: Front, other: Front, room: EngineRoom
) -> None:
    a, *more = (room.start(sins="dies_on_prompt", slots=8) for _ in range(4))
    two = Two(front, other)
    two.table(front, a)
    guilty = [asyncio.create_task(f.ask(body=chat("SIM_DIE"))) for f in (front, other, other, other)]
    await eventually("the first engine died", lambda: dead(a))
    await eventually("the copies wait", lambda: other.waiting() == 3)
    two.table(front, *more)
    two.table(other, *more)
    answers: list[Answer] = await asyncio.gather(*guilty)
    assert {a.error["code"] for a in answers} == {"request_crashed_engine"}
    assert dead(*more) == 1


async def test_a_copy_in_another_engine_is_recalled_when_the_first_one_has_ended_its_own(
    front: Front, other: Front, room: EngineRoom
) -> None:
    """It may be about to do the same there. What else is inside that engine stays."""
    slow, dying = room.start(sim_ttft_ms=60_000, slots=8), room.start(sins="dies_on_prompt", slots=8)
    two = Two(front, other)
    two.table(front, slow)
    two.table(other, dying)
    copy, beside = (asyncio.create_task(front.ask(body=chat(text))) for text in ("SIM_DIE", "hello"))
    await slow.inside(2)
    guilty = asyncio.create_task(other.ask(body=chat("SIM_DIE")))
    await eventually("it was recalled", lambda: front.metric(ATTEMPTS, outcome="recalled") == 1)
    await eventually("it is there again, on trial", lambda: len(front.gateway.fleet.lines["tiny@v1"].trials._turns))
    await slow.inside(2)
    assert front.metric(ATTEMPTS) == 1, "the one beside it was left"
    for task in (copy, beside, guilty):
        task.cancel()
    await asyncio.gather(copy, beside, guilty, return_exceptions=True)


async def test_streams_cut_by_the_death_of_their_engine_count_and_then_the_request_is_refused(front: Front) -> None:
    said = b'data: {"choices":[{"index":0,"delta":{"content":"so far"}}]}\n\n'
    async with recorded(said, 0.01, cut=True) as one, recorded(said, 0.01, cut=True) as two:
        for engine in (one, one, two):  # to be cut twice by the same one says nothing of the request
            front.serve(engine)
            answer = await front.ask(body=chat(stream=True))
            assert events(answer.body)[-1]["error"]["code"] == "engine_error"
        refused = await front.ask(body=chat(stream=True), headers={"x-request-id": "third"})
        assert (refused.status, refused.error["code"]) == (422, "request_crashed_engine")
        assert (len(one.seen), len(two.seen)) == (2, 1)
        assert front.metric("steelyard_rejections_total", reason="request_crashed_engine") == 1
        assert (await front.line("third"))["reason"] == "request_crashed_engine"
        assert (await front.ask(body=chat("another", stream=True))).status == 200
        front.engines.clear()


async def test_what_is_waited_for_after_a_death_is_no_part_of_what_a_request_may_wait(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEWS_S", "LAST_NEWS_S"):
        monkeypatch.setattr(retry, name, 0.3)
    siblings = tuple(GatewayInfo(id=i, url="") for i in ("one", "two"))
    async with recorded(cut=True) as one, recorded(cut=True) as two:
        well = room.shared()
        loaded = Engine(msgspec.structs.replace(well.endpoint, in_flight=7), well.process)  # the last to be chosen
        front.serve(limits={"max_wait_s": 0.2})
        front.table(one, loaded, gateways=siblings)
        assert (await front.ask(body=chat())).status == 200
        assert front.metric(ATTEMPTS, outcome="died") == 1
        front.table(one, two, gateways=siblings)
        assert (await front.ask(body=chat("boom"))).error["code"] == "request_crashed_engine"
        front.engines.clear()


async def test_newcomers_that_would_wait_for_a_trial_are_refused_where_the_queue_is_full(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "TRIAL_S", 600.0)
    slow = room.start(sim_ttft_ms=60_000, slots=8)
    front.serve(slow, limits={"max_queue": 1})
    body = chat("hello")
    front.gateway.fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, body), "another")
    copies = [asyncio.create_task(front.ask(body=body)) for _ in range(2)]
    await slow.inside(1)
    await eventually("one waits for its trial", lambda: front.waiting() == 1)
    refused = await front.ask(body=body)
    assert (refused.status, refused.error["code"]) == (429, "queue_full")
    assert refused.headers["retry-after"]
    assert front.waiting() == 1
    for copy in copies:
        copy.cancel()
    await asyncio.gather(*copies, return_exceptions=True)


async def test_copies_that_wait_for_the_trials_of_others_are_bounded_and_take_no_place_from_anybody_else(
    front: Front, room: EngineRoom
) -> None:
    engine, fuse = room.shared(slots=1, sim_itl_ms=20), front.gateway.fleet.fuse
    front.serve(engine, limits={"max_queue": 2})
    copied, newcomer = chat("hello"), chat("newcomer")
    for died in ("a", "b"):
        fuse.died(fingerprint("tiny@v1", CHAT, None, copied), died, begun=True)
    fuse.died(fingerprint("tiny@v1", CHAT, None, newcomer), "b")
    async with front.hung_up(endless()):
        await engine.inside(1)
        copies = [asyncio.create_task(front.ask(body=copied)) for _ in range(2)]
        await eventually("they wait", lambda: front.waiting() == 2)
        refused = await front.ask(body=copied)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"]
        held = [asyncio.create_task(front.ask(body=chat(f"another {i}"))) for i in range(2)]
        await eventually("others wait beside them", lambda: front.waiting() == 4)
        assert (await front.ask(body=chat("one too many"))).error["code"] == "queue_full"
    assert [a.status for a in await asyncio.gather(*held)] == [200] * 2
    assert (await front.ask(body=newcomer)).status == 200, "it ends their wait"
    answers: list[Answer] = await asyncio.gather(*copies)
    assert {a.error["code"] for a in answers} == {"request_crashed_engine"}
    assert front.waiting() == 0


async def test_who_was_admitted_to_wait_for_the_trials_of_others_is_not_refused_for_a_full_queue_afterwards(
    front: Front, room: EngineRoom
) -> None:
    engine, fleet = room.shared(slots=1, sim_itl_ms=20), front.gateway.fleet
    front.serve(engine, limits={"max_queue": 1})
    model, line = fleet.models["tiny"], fleet.lines["tiny@v1"]
    copied, guilty = chat("hello"), fingerprint("tiny@v1", CHAT, None, chat("guilty"))
    for died in ("a", "b"):
        fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, copied), died, begun=True)
    fleet.fuse.died(guilty, "b")
    async with front.hung_up(endless()):
        await engine.inside(1)
        admitted = asyncio.create_task(front.ask(body=copied))
        await eventually("it waits for the trial of another", lambda: fleet.put_off(model) == 1)
        held = asyncio.create_task(front.ask(body=chat("another")))
        await eventually("the queue is full", lambda: len(line) == 1)
        fleet.fuse.died(guilty, "c", 1.0)
        await eventually("it has joined the queue", lambda: len(line) == 2 or admitted.done())
        assert not admitted.done()
    assert [a.status for a in await asyncio.gather(admitted, held)] == [200] * 2


async def test_newcomers_on_trial_or_behind_the_trials_of_others_take_no_place_among_the_retries(
    front: Front, room: EngineRoom
) -> None:
    fleet = front.gateway.fleet
    front.serve(room.shared())
    model, line = fleet.models["tiny"], fleet.lines["tiny@v1"]
    copied, suspect, guilty = chat("hello"), chat("suspect"), fingerprint("tiny@v1", CHAT, None, chat("guilty"))
    for died in ("a", "b"):
        fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, copied), died, begun=True)
    fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, suspect), "d")
    fleet.fuse.died(guilty, "b")
    while line.retries.free():
        await line.retries.take()
    behind = asyncio.create_task(front.ask(body=copied))
    await eventually("it waits for the trial of another", lambda: fleet.put_off(model) == 1)
    fleet.fuse.died(guilty, "c", 1.0)
    assert [a.status for a in await asyncio.gather(behind, front.ask(body=suspect))] == [200] * 2


async def test_a_newcomer_that_finds_another_gateway_s_trial_at_the_door_takes_no_place_among_the_retries(
    front: Front, room: EngineRoom
) -> None:
    engine, fleet = room.shared(), front.gateway.fleet
    front.serve(engine)
    line, suspect = fleet.lines["tiny@v1"], chat("suspect")
    fleet.fuse.died(fingerprint("tiny@v1", CHAT, None, suspect), "d")
    while line.retries.free():
        await line.retries.take()
    trial = {TRIAL_HEADER.decode(): "60000"}
    another = asyncio.create_task(engine.direct(CHAT, chat(max_tokens=500), "another", **trial))
    await engine.inside(1)
    assert (await front.ask(body=suspect)).status == 200
    assert front.metric(ATTEMPTS, outcome="busy") > 0, "its trial was put off"
    assert b"choices" in await another


async def test_it_is_told_in_the_dialect_of_the_route(front: Front) -> None:
    async with recorded(cut=True) as one, recorded(cut=True) as two:
        front.serve(one, two)
        with pytest.raises(anthropic.UnprocessableEntityError, match="engines died") as caught:
            await front.anthropic().messages.create(
                model="tiny", max_tokens=5, messages=[{"role": "user", "content": "boom"}]
            )
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
        assert one.seen == two.seen == [MESSAGES]
        front.engines.clear()


async def test_an_engine_stopped_on_purpose_accuses_nobody(front: Front, room: EngineRoom) -> None:
    engine = room.start(sim_itl_ms=20)
    front.serve(engine)
    asked = [asyncio.create_task(front.ask(body=chat(max_tokens=500, stream=s))) for s in (False, True)]
    await engine.inside(2)
    assert engine.process is not None
    stopping = asyncio.create_task(asyncio.to_thread(engine.process.stop))
    await eventually("the whole one is tried again", lambda: front.metric(ATTEMPTS) >= 2)
    front.table(room.shared())
    await asyncio.gather(stopping, *asked)
    assert not front.gateway.fleet.fuse.armed


async def test_where_a_node_is_silent_its_other_replicas_are_not_tried_first(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three attempts would all go to a node that is gone, while another one has a place."""
    monkeypatch.setattr("serving.gateway.connection.CONNECT_TIMEOUT_S", 0.1)
    with socket.socket() as full:
        full.bind((HOST, 0))
        full.listen(0)
        url = f"http://{HOST}:{full.getsockname()[1]}"
        taken = [socket.socket() for _ in range(4)]
        for s in taken:  # whoever comes next gets no answer to his SYN
            s.setblocking(False)
            s.connect_ex((HOST, full.getsockname()[1]))
        gone = [msgspec.structs.replace(refusing(id=f"gone-{i}", node="lost", slots=64), url=url) for i in range(4)]
        well = room.shared()
        there = msgspec.structs.replace(well.endpoint, node="there", in_flight=7)  # the last that would be chosen
        front.serve(*gone, Engine(there, well.process))
        assert (await front.ask(body=chat())).status == 200
        assert front.metric(ATTEMPTS, outcome="connect_error") == 1
        for s in taken:
            s.close()


async def test_leases_that_lapse_one_after_the_other_refuse_nobody(front: Front, room: EngineRoom) -> None:
    one, two = (room.start(sim_ttft_ms=4000) for _ in range(2))
    front.serve(one)
    asked = asyncio.create_task(front.ask(body=chat()))
    await one.inside(1)
    front.table(two)
    await two.inside(1)
    front.table(one, two)
    front.table(one)
    assert (await asked).status == 200
    assert not front.gateway.fleet.fuse.armed, "no engine died"


@pytest.mark.parametrize("stream", [False, True])
async def test_engines_that_are_ended_when_their_time_to_drain_is_over_accuse_nobody(
    front: Front, room: EngineRoom, stream: bool
) -> None:
    drained = [room.start(sim_ttft_ms=60_000) for _ in range(2)]
    last = room.shared()
    front.serve(drained[0])
    asked = asyncio.create_task(front.ask(body=chat(stream=stream)))
    for engine, following in zip(drained, (drained[1], last), strict=True):
        await engine.inside(1)
        front.table(msgspec.structs.replace(engine.endpoint, state=State.DRAINING), following)
        assert engine.process is not None
        os.kill(engine.process.pid, signal.SIGKILL)
    assert (await asked).status == 200
    assert not front.gateway.fleet.fuse.armed
