"""A version without a ready replica: its requests wake it and wait, or are told at once when to come back; a stream that
waits long hears that it is not forgotten."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from serving.fleet.endpoint import START_TRIES, Endpoint, State, VersionFacts
from serving.gateway import hold
from serving.gateway.keys import create_key
from tests.gateway.harness import CHAT, MESSAGES, EngineRoom, Front, chat, endless, events, eventually, recorded

PINGS = {CHAT: b": keep-alive\n\n", MESSAGES: b'event: ping\ndata: {"type": "ping"}\n\n'}
ANSWERS = {
    CHAT: [b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n', b"data: [DONE]\n\n"],
    MESSAGES: [
        b'event: message_start\ndata: {"type":"message_start"}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ],
}
TINY = "tiny@v1"


def starting(**more: Any) -> Endpoint:
    like = {"id": "starts", "model": "tiny", "version": "v1", "url": "", "state": State.STARTING, "slots": 8}
    return Endpoint(**like | {"started_at": time.time()} | more)


def starts_in(seconds: float) -> dict[str, VersionFacts]:
    return {TINY: VersionFacts(ready_after_s=seconds)}


async def wait(front: Front, count: int = 1) -> None:
    await eventually(f"{count} wait", lambda: front.waiting() == count)


async def test_a_request_at_zero_wakes_waits_and_is_answered(front: Front, room: EngineRoom) -> None:
    woken: list[dict[str, int]] = []
    front.serve()
    front.gateway.fleet.on_hold = lambda: asyncio.get_running_loop().call_soon(
        lambda: woken.append(front.gateway.fleet.held())
    )
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    assert woken == [{TINY: 1}]  # whoever announces is told at once, and finds the request in the queue
    front.table(room.shared())
    assert (await asked).status == 200
    assert front.gateway.fleet.held() == {}


async def test_a_start_longer_than_the_wait_is_503_at_once_and_the_wake_goes_on(front: Front) -> None:
    front.serve(limits={"max_wait_s": 30})
    front.table(facts=starts_in(100))
    answer = await front.ask(body=chat())
    assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
    assert 100 <= int(answer.headers["retry-after"]) <= 110
    assert front.gateway.fleet.held() == {TINY: 1}  # nobody waits, and the replica is wanted all the same


async def test_what_is_left_of_a_start_counts_not_all_of_it(front: Front, room: EngineRoom) -> None:
    front.serve(limits={"max_wait_s": 30})
    front.table(starting(started_at=time.time() - 90), facts=starts_in(100))
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    front.table(room.shared(), facts=starts_in(100))
    assert (await asked).status == 200


async def test_the_deadline_of_the_request_counts_as_its_patience(front: Front) -> None:
    front.serve(limits={"max_wait_s": 600, "request_timeout_s": 5})
    front.table(facts=starts_in(20))
    assert (await front.ask(body=chat())).status == 503


async def test_an_engine_that_does_not_start_ends_the_waits_without_telling_why(front: Front) -> None:
    front.serve()
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    why = "/srv/weights/secret-name is not there"
    facts = VersionFacts(failures=START_TRIES, failed_at=time.time(), failed_on=("bad",), reason=why)
    front.table(starting(node="bad"), facts={TINY: facts})
    for answer in (await asked, await front.ask(body=chat())):
        assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
        assert "does not start" in answer.error["message"] and "secret-name" not in answer.error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 30


async def test_failures_of_another_engine_refuse_nobody(front: Front, room: EngineRoom) -> None:
    front.serve()
    facts = {TINY: VersionFacts(failures=START_TRIES, failed_at=time.time(), spec="broken")}
    front.table(starting(spec="mended"), facts=facts)
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    front.table(room.shared())
    assert (await asked).status == 200


async def test_failures_on_another_node_refuse_nobody(front: Front, room: EngineRoom) -> None:
    front.serve()
    facts = VersionFacts(failures=START_TRIES, failed_at=time.time(), failed_on=("bad",))
    front.table(starting(node="good"), facts={TINY: facts})
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    front.table(room.shared())
    assert (await asked).status == 200


async def test_who_waits_for_a_suspect_is_not_refused_since_another_replica_does_not_start(
    front: Front, room: EngineRoom
) -> None:
    engine = room.shared().endpoint
    suspect = msgspec.structs.replace(engine, state=State.SUSPECT)
    front.serve(suspect)
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    facts = VersionFacts(failures=START_TRIES, failed_at=time.time(), failed_on=("bad",))
    front.table(suspect, facts={TINY: facts})
    front.table(engine, facts={TINY: facts})
    assert (await asked).status == 200


async def test_a_failed_start_is_followed_by_another_and_waited_for(front: Front, room: EngineRoom) -> None:
    front.serve(starting(state=State.FAILED))
    front.table(starting(state=State.FAILED), facts={TINY: VersionFacts(failures=START_TRIES - 1)})
    asked = asyncio.create_task(front.ask(body=chat()))
    await wait(front)
    assert front.gateway.fleet.held() == {TINY: 1}
    front.table(room.shared())
    assert (await asked).status == 200


async def test_a_pause_after_failures_is_in_the_time_to_come_back(front: Front) -> None:
    front.serve()
    facts = VersionFacts(failures=START_TRIES + 3, ready_after_s=5, failed_at=time.time())
    front.table(starting(waits_until=time.time() + 80), facts={TINY: facts})
    answer = await front.ask(body=chat())
    assert 80 <= int(answer.headers["retry-after"]) <= 90


async def test_a_wake_is_forgotten_when_a_replica_is_ready(front: Front, room: EngineRoom) -> None:
    front.serve(limits={"max_wait_s": 1})
    front.table(facts=starts_in(100))
    assert (await front.ask(body=chat())).status == 503
    front.table(room.shared())
    assert front.gateway.fleet.held() == {}


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_long_held_stream_hears_keep_alives_in_its_dialect_and_then_its_answer(
    front: Front, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(hold, "EVERY_S", 0.02)
    front.serve(limits={"keep_alive_after_s": 0.02})
    sent = {"authorization": f"Bearer {front.keys.all}", "x-request-id": f"held-{path[-3:]}"}
    async with (
        recorded(*ANSWERS[path]) as engine,
        front.session.post(front.url + path, json=chat(stream=True), headers=sent) as answer,
    ):
        assert answer.status == 200
        assert await answer.content.readexactly(2 * len(PINGS[path])) == PINGS[path] * 2
        front.table(engine)
        rest = await answer.read()
    while rest.startswith(PINGS[path]):  # those that left before the table came
        rest = rest.removeprefix(PINGS[path])
    assert rest == b"".join(ANSWERS[path])
    assert (await front.line(f"held-{path[-3:]}"))["reason"] == "ok"


async def test_after_keep_alives_a_failure_is_an_event_in_the_stream(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.serve(limits={"keep_alive_after_s": 0.01, "max_wait_s": 0.2})
    answer = await front.ask(body=endless())
    assert answer.status == 200
    assert answer.body.startswith(PINGS[CHAT])
    told = events(answer.body.removeprefix(PINGS[CHAT]))
    assert told[0]["error"]["code"] == "model_unavailable"


async def test_after_keep_alives_a_refusal_of_the_engine_is_an_event_in_the_stream(front: Front) -> None:
    front.serve(limits={"keep_alive_after_s": 0.01})
    refusal = msgspec.json.encode({"error": {"message": "too many tokens", "code": 400}})
    async with recorded(refusal, status=400, content_type="application/json") as engine:
        asked = asyncio.create_task(front.ask(body=endless()))
        await eventually("its 200 left", lambda: front.waiting() == 1)
        await asyncio.sleep(0.05)  # past keep_alive_after_s
        front.table(engine)
        answer = await asked
    assert answer.status == 200
    (told, *_) = events(answer.body.removeprefix(PINGS[CHAT]))
    assert (told["error"]["code"], told["error"]["message"]) == ("invalid_request", "too many tokens")
    assert (await front.line(answer.headers["x-request-id"]))["reason"] == "engine_refused"
    assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 1


@pytest.mark.parametrize("body", [chat(), chat(stream=False)])
async def test_who_does_not_stream_hears_nothing_before_its_answer(
    front: Front, room: EngineRoom, body: dict[str, Any]
) -> None:
    front.serve(limits={"keep_alive_after_s": 0, "max_wait_s": 0.1})
    assert (await front.ask(body=body)).status == 503


async def test_keep_alives_can_be_switched_off(front: Front) -> None:
    front.serve(limits={"keep_alive_after_s": None, "max_wait_s": 0.1})
    assert (await front.ask(body=endless())).status == 503


async def test_a_key_may_do_without_keep_alives(front: Front) -> None:
    _, quiet = create_key(front.keys.path, name="quiet", scopes=["infer:*"], now=time.time(), keep_alive=False)
    assert front.gateway.keys.reload_if_changed() is None
    front.serve(limits={"keep_alive_after_s": 0, "max_wait_s": 0.1})
    assert [(await front.ask(body=endless(), key=key)).status for key in (quiet, front.keys.all)] == [503, 200]


async def test_a_client_that_leaves_while_it_hears_keep_alives_is_forgotten(front: Front) -> None:
    front.serve(limits={"keep_alive_after_s": 0})
    async with front.hung_up(endless()) as reader:
        await reader.readuntil(b": keep-alive")
    await eventually("nobody waits", lambda: front.waiting() == 0)
    assert front.gateway.fleet.held() == {}


async def test_what_the_directory_counts_is_in_the_merged_metrics(front: Front) -> None:
    async def directory() -> str:
        return 'steelyard_scale_decisions_total{model="tiny",version="v1",direction="up",reason="load"} 3\n'

    async def away() -> str:
        raise TimeoutError

    front.serve()
    sample = (
        'steelyard_scale_decisions_total{component="directory",instance="directory",'
        'model="tiny",version="v1",direction="up",reason="load"} 3'
    )
    front.gateway.sources["directory"] = directory
    merged = await front.ask("/metrics", method="GET", key=front.keys.metrics)
    alone = await front.ask("/metrics?source=directory", method="GET", key=front.keys.metrics)
    assert sample in merged.body.decode()
    assert "steelyard_requests_held" not in alone.body.decode() and alone.status == 200
    front.gateway.sources["directory"] = away
    assert (await front.ask("/metrics?source=directory", method="GET", key=front.keys.metrics)).status == 502
