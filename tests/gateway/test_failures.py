"""Engines that fail: before the first byte another one answers the same request; after it, one honest error event."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import uuid
from typing import Any

import msgspec
import openai
import pytest

from serving.fleet.endpoint import State
from serving.gateway import routing
from serving.gateway.connection import Address, Connection, Pool
from serving.gateway.sent import Sent
from tests.gateway.harness import (
    CHAT,
    MESSAGES,
    SECRET,
    Engine,
    EngineRoom,
    Front,
    chat,
    endless,
    events,
    eventually,
    recorded,
    refusing,
)

pytestmark = pytest.mark.usefixtures("short_pauses")
DONE = b"data: [DONE]\n\n"
DEAD = (
    b'data: {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}\n\n'
)
FAILED = b'data: {"error": {"message": "list index out of range", "type": "InternalServerError", "code": 500}}\n\n'
REFUSED = b'data: {"error": {"message": "bad grammar", "type": "BadRequestError", "param": null, "code": 400}}\n\n'


def said(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":' + json.dumps(text).encode() + b"}}]}\n\n"


async def broken_off(front: Front, code: str = "engine_error", **fields: Any) -> list[Any]:
    """The events that came before the error of a stream that must not look finished."""
    text = uuid.uuid4().hex  # else the fuse would remember it
    answer = await front.ask(body=chat(text, stream=True, **fields), headers={"x-request-id": "broken"})
    assert (answer.status, DONE in answer.body) == (200, False)
    *before, last = events(answer.body)
    assert (last["error"]["code"], last["error"]["request_id"]) == (code, "broken")
    assert not any("error" in event for event in before)
    assert (await front.line("broken"))["reason"] == code
    with pytest.raises(openai.APIError):
        async for _ in await front.openai().chat.completions.create(**chat(text, stream=True, **fields)):
            pass
    return before


# -- before the first byte


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_refuses_connections_is_passed_over(front: Front, room: EngineRoom, stream: bool) -> None:
    front.serve(refusing(), room.shared())
    answer = await front.ask(body=chat(stream=stream))
    assert answer.status == 200
    line = await front.line(answer.headers["x-request-id"])
    assert (line["attempts"], line["replica"]) == (2, front.engines[0].endpoint.id)
    assert front.metric("steelyard_upstream_attempts_total", outcome="connect_error") == 1


async def test_a_gateway_without_file_descriptors_waits_for_one_and_blames_no_engine(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.serve(room.shared())
    connect, left = Pool.connect, [3]

    async def scarce(pool: Pool, address: Address) -> Connection:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await connect(pool, address)

    monkeypatch.setattr(Pool, "connect", scarce)
    answer = await front.ask(body=chat())
    assert answer.status == 200
    assert (await front.line(answer.headers["x-request-id"]))["attempts"] == 1
    assert front.metric("steelyard_upstream_attempts_total", outcome="connect_error") == 0


async def test_a_replica_where_nothing_answers_is_shown_as_failed_before_the_directory_says_so(
    front: Front, room: EngineRoom
) -> None:
    def shown() -> tuple[float, ...]:
        front.gateway.metrics.text()
        labels = {"model": "tiny", "version": "v1"}
        return tuple(front.metric("steelyard_replicas", **labels, state=s) for s in ("READY", "FAILED"))

    front.serve(refusing(), room.shared())
    assert shown() == (2, 0)
    assert (await front.ask(body=chat())).status == 200
    assert shown() == (1, 1)


async def test_it_is_left_alone_for_a_while(front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "BROKEN_PAUSE_S", 60.0)  # however busy this machine is
    front.serve(refusing(), room.shared())
    for _ in range(5):
        assert (await front.ask(body=chat())).status == 200
    assert front.metric("steelyard_upstream_attempts_total", outcome="connect_error") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_internal_error_is_tried_elsewhere(front: Front, room: EngineRoom, stream: bool) -> None:
    front.serve(room.shared(sins="returns_500"), room.shared())
    assert (await front.ask(body=chat(stream=stream))).status == 200
    assert front.metric("steelyard_upstream_attempts_total", outcome="http_5xx") == 1


async def test_an_internal_error_everywhere_is_502_and_tells_nothing_of_it(front: Front, room: EngineRoom) -> None:
    front.serve(room.shared(sins="returns_500"))
    answer = await front.ask(body=chat())
    assert (answer.status, answer.error["code"]) == (502, "engine_error")
    assert "Internal server error" not in answer.error["message"]
    with pytest.raises(openai.InternalServerError):
        await front.openai().chat.completions.create(**chat())


async def test_attempts_are_bounded(front: Front) -> None:
    async with recorded(status=500) as engine:
        front.serve(*(msgspec.structs.replace(engine.endpoint, id=f"bad-{i}") for i in range(5)))
        assert (await front.ask(body=chat())).status == 502
        assert front.metric("steelyard_upstream_attempts_total") == 3
        front.table()


async def test_a_connection_that_nobody_takes_is_no_attempt_and_the_successor_is_waited_for(
    front: Front, room: EngineRoom
) -> None:
    """A lost node is in the tables for some seconds more."""
    front.serve(*(refusing(id=f"gone-{i}") for i in range(5)))
    asked = asyncio.create_task(front.ask(body=chat()))
    await eventually("all were asked", lambda: front.metric("steelyard_upstream_attempts_total") >= 5)
    front.table(room.shared())
    assert (await asked).status == 200


async def test_an_engine_that_dies_over_a_whole_answer_is_replaced_by_another(front: Front, room: EngineRoom) -> None:
    front.serve(room.start(sins="dies_mid_stream", after=2), room.shared())
    assert (await front.ask(body=chat())).json()["usage"]["completion_tokens"] == 6


async def test_a_dead_core_is_replaced_by_another_before_the_first_byte(front: Front, room: EngineRoom) -> None:
    front.serve(room.start(sins="lies_about_health", after=0), room.shared())
    for _ in range(3):
        assert DONE in (await front.ask(body=chat(stream=True))).body


async def test_who_comes_to_a_dead_core_did_not_kill_it(front: Front, room: EngineRoom) -> None:
    """Its server lives on, for a moment or for long, and would tell them what it tells those inside."""
    dead, died = room.start(sins="lies_about_health", after=0), "steelyard_upstream_attempts_total"
    front.serve(dead)
    inside = asyncio.create_task(front.ask(body=chat("it died with this one inside")))
    await eventually("the core died", lambda: front.metric(died, outcome="died") == 1)
    front.table(dead, room.shared())
    assert (await inside).status == 200
    for number in range(200):
        assert (await front.ask(body=chat(f"innocent {number}"))).status == 200
        if front.metric(died, outcome="busy"):
            break
    assert (front.metric(died, outcome="busy"), front.metric(died, outcome="died")) == (1, 1)
    assert not front.gateway.fleet.fuse.told().deaths  # the one inside has been answered since


@pytest.mark.parametrize("first", [b"", DEAD + DONE, b": ping", said("half")[:-1]])
async def test_a_stream_that_fails_at_its_start_is_begun_elsewhere(
    front: Front, room: EngineRoom, first: bytes
) -> None:
    async with recorded(*([first] if first else []), cut=first != DEAD + DONE) as bad:
        front.serve(bad, room.shared())
        assert DONE in (await front.ask(body=chat(stream=True))).body
        assert len(bad.seen) == 1
        front.engines.remove(bad)


async def test_what_was_read_with_the_error_has_not_left_yet_either(front: Front, room: EngineRoom) -> None:
    async with recorded(said("half an answer") + DEAD + DONE) as bad:
        front.serve(bad, room.shared())
        body = (await front.ask(body=chat(stream=True))).body
        assert DONE in body and b"half an answer" not in body


@pytest.mark.slow
@pytest.mark.parametrize("sin", ["dies_on_prompt", "core_dies_on_prompt"])
async def test_a_prompt_that_kills_engines_is_refused_and_spares_the_third(
    front: Front, room: EngineRoom, sin: str
) -> None:
    engines = [room.start(sins=sin) for _ in range(3)]
    front.serve(*engines)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await front.openai().chat.completions.create(**chat("SIM_DIE"))
    assert (caught.value.status_code, caught.value.code) == (422, "request_crashed_engine")
    for again in (
        {},
        {"seed": 7, "user": "me"},
        {"stream": True},
    ):  # it is remembered, whatever differs that says nothing
        assert (await front.ask(body=chat("SIM_DIE", **again))).error["code"] == "request_crashed_engine"
    assert front.metric("steelyard_upstream_attempts_total", outcome="died") == 2
    await eventually("one is left", lambda: sum(e.process is not None and e.process.alive for e in engines) == 1)
    assert (await front.ask(body=chat())).status == 200


@pytest.mark.parametrize("opening", [b"", said("")])
async def test_a_client_cannot_take_an_engine_out_of_service_by_its_mistakes(front: Front, opening: bytes) -> None:
    """vLLM finds some only after it has said 200, or even opened the stream: the answer is still a 400, and the engine is
    still well."""
    async with recorded(opening + REFUSED, DONE) as engine:
        front.serve(engine)
        for _ in range(3):
            with pytest.raises(openai.BadRequestError, match="bad grammar") as told:
                await front.openai().chat.completions.create(**chat(stream=True))
            assert isinstance(told.value.body, dict) and told.value.body["request_id"] == told.value.request_id
        assert len(engine.seen) == 3
        assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 3


@pytest.mark.parametrize("opening", [b"", said("")])
async def test_a_request_that_its_engine_failed_with_is_no_death(
    front: Front, opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream's 500, for any exception of one request, is like a 500 without a stream: the engine goes on."""
    monkeypatch.setattr(routing, "BROKEN_PAUSE_S", 60.0)
    async with recorded(opening + FAILED, DONE) as one, recorded(opening + FAILED, DONE) as two:
        front.serve(one, two)
        for _ in range(2):
            answer = await front.ask(body=chat(stream=True))
            assert (answer.status, answer.error["code"]) == (502, "engine_error")
            assert "index" not in answer.error["message"]
        assert (len(one.seen), len(two.seen)) == (2, 2)
        assert front.metric("steelyard_upstream_attempts_total", outcome="http_5xx") == 4
        assert not front.gateway.fleet.fuse.armed


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_that_repeats_its_clients_words_is_no_death(front: Front, stream: bool) -> None:
    said_by_client = '"message":"EngineCore encountered an issue. See stack trace'
    error = json.dumps({"error": {"message": said_by_client, "type": "InternalServerError", "code": 500}}).encode()
    words = (b"data: " + error + b"\n\n", DONE) if stream else (error,)
    kind = "text/event-stream" if stream else "application/json"
    async with recorded(*words, status=200 if stream else 500, content_type=kind) as engine:
        front.serve(engine)
        assert (await front.ask(body=chat(stream=stream))).error["code"] == "engine_error"
        assert front.metric("steelyard_upstream_attempts_total", outcome="died") == 0
        assert not front.gateway.fleet.fuse.armed


async def test_one_replica_that_cuts_a_stream_is_asked_again_at_once(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut after the 200 may be the request's own fault; only who does not answer at all is left alone."""
    monkeypatch.setattr(routing, "BROKEN_PAUSE_S", 60.0)
    async with recorded(cut=True) as engine:
        front.serve(engine, limits={"max_wait_s": 30})
        assert (await front.ask(body=chat(stream=True))).status == 502
        assert len(engine.seen) == 3
        front.engines.remove(engine)


async def test_a_request_waits_for_the_successor_of_its_only_engine(front: Front, room: EngineRoom) -> None:
    dying = room.start(sins="dies_on_prompt")
    front.serve(dying)
    asked = asyncio.create_task(front.ask(body=chat("SIM_DIE")))
    await eventually("its engine died", lambda: front.waiting() == 1)
    front.table(room.shared())
    assert (await asked).status == 200


async def test_a_door_that_does_not_know_us_is_no_answer_for_a_client(front: Front, room: EngineRoom) -> None:
    async with recorded(b'{"error": {"code": "no_secret"}}', status=401, content_type="application/json") as stranger:
        front.serve(stranger)
        assert (await front.ask(body=chat())).status == 502
        front.serve(stranger, room.shared())
        assert (await front.ask(body=chat())).status == 200


async def test_the_secret_goes_to_doors_only(front: Front) -> None:
    async with recorded(status=307, content_type="text/plain") as engine:
        front.serve(engine)
        answer = await front.ask(body=chat())
        assert (answer.status, len(engine.seen)) == (502, 1)
        assert SECRET not in str(answer.headers)


async def test_a_version_may_be_removed_while_its_requests_are_tried_again(front: Front, room: EngineRoom) -> None:
    async with recorded(0.1, b"oops", status=500) as failing:
        front.serve(failing, room.shared())
        asked = asyncio.create_task(front.ask(body=chat()))
        await failing.inside(1)
        front.serve(versions=[{"version": "v2", "engine": {"kind": "simulator"}}], release={"stable": "v2"})
        assert (await asked).status == 200


# -- after the first byte


@pytest.mark.slow
async def test_an_engine_that_dies_in_mid_stream_is_one_error_event(front: Front, room: EngineRoom) -> None:
    front.serve(*(room.start(sins="dies_mid_stream", after=3) for _ in range(2)))
    before = await broken_off(front)
    assert [e["choices"][0]["delta"].keys() for e in before] == [{"role", "content"}, *[{"content"}] * 3]
    assert front.metric("steelyard_upstream_attempts_total", outcome="died") == 2


@pytest.mark.slow
async def test_a_polite_end_of_a_dead_engine_is_not_passed_as_an_end(front: Front, room: EngineRoom) -> None:
    front.serve(*(room.start(sins="lies_about_health", after=3) for _ in range(2)))
    assert len(await broken_off(front)) == 4


async def test_a_clients_mistake_that_is_found_in_mid_stream_is_told_as_one(front: Front) -> None:
    async with recorded(said("so far"), 0.01, REFUSED, DONE) as engine:
        front.serve(engine)
        answer = await front.ask(body=chat(stream=True), headers={"x-request-id": "refused"})
        so_far, last = events(answer.body)
        assert so_far["choices"][0]["delta"] == {"content": "so far"}
        assert (last["error"]["code"], last["error"]["message"]) == ("invalid_request", "bad grammar")
        assert last["error"]["request_id"] == "refused"
        assert (await front.line("refused"))["reason"] == "engine_refused"
        assert front.metric("steelyard_upstream_attempts_total", outcome="ok") == 1
        assert front.metric("steelyard_slo_requests_total") == 0
        assert not front.gateway.fleet.fuse.armed


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_clients_mistake_is_no_engines_death_where_vllm_cannot_read_its_own_words(
    front: Front, at_once: bool
) -> None:
    """A message is made of a chat stream, whose error frames its maker takes for chunks that lack everything."""
    missing = "Field required [type=missing, input_value={'error': {'message': 'In...am': None, 'code': 400}}, input_type=dict]"
    told = {"type": "error", "error": {"type": "internal_error", "message": f"2 validation errors\nmodel\n  {missing}"}}
    start = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":1}}}\n\n'
    frame = b"event: error\ndata: " + json.dumps(told).encode() + b"\n\n"
    async with recorded(*([start + frame] if at_once else [start, 0.05, frame])) as engine:
        front.serve(engine)
        body = {"model": "tiny", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "a"}]}
        answer = await front.ask(MESSAGES, body)
        assert answer.status == (400 if at_once else 200)
        error = answer.error if at_once else json.loads(answer.body.rpartition(b"data: ")[2])["error"]
        assert error["type"] == "invalid_request_error" and "validation" not in error["message"]
        assert engine.seen == [MESSAGES] and not front.gateway.fleet.fuse.armed


async def test_an_engine_that_fails_with_a_request_in_mid_stream_is_not_said_to_have_died(front: Front) -> None:
    async with recorded(said("so far"), 0.01, FAILED, DONE) as engine:
        front.serve(engine)
        assert len(await broken_off(front)) == 1
        told = events((await front.ask(body=chat(stream=True))).body)[-1]["error"]["message"]
        assert told == "the engine failed with this request while it generated; what came before is incomplete"
        assert front.metric("steelyard_upstream_attempts_total", outcome="http_5xx") == 3
        assert not front.gateway.fleet.fuse.armed


async def test_what_a_stopped_engine_drops_is_not_passed_as_an_end(front: Front, room: EngineRoom) -> None:
    engine = room.start(sim_itl_ms=20)
    front.serve(engine)
    async with front.hung_up(endless()) as reader:
        await reader.readuntil(b'"content":"')
        assert engine.process is not None
        stopping = asyncio.to_thread(engine.process.stop)
        rest, _ = await asyncio.gather(reader.readuntil(b"0\r\n\r\n"), stopping)
    assert b'"code":"engine_error"' in rest and b"abort" not in rest and DONE not in rest


@pytest.mark.slow
async def test_a_whole_answer_that_a_stopped_engine_dropped_is_made_elsewhere(front: Front, room: EngineRoom) -> None:
    engine = room.start(sim_itl_ms=20)
    front.serve(engine)
    asked = asyncio.create_task(front.ask(body=chat(max_tokens=500)))
    await engine.inside(1)
    assert engine.process is not None
    stopping = asyncio.create_task(asyncio.to_thread(engine.process.stop))
    await eventually("it is tried again", lambda: front.metric("steelyard_upstream_attempts_total") >= 1)
    front.table(room.shared())
    await stopping
    assert (await asked).json()["usage"]["completion_tokens"] == 500


@pytest.mark.parametrize("tail", [b"", said("x")[:-1], said("x")[:20], said("data: [DONE]"), b"data: [DONE]"])
async def test_a_stream_without_its_end_is_not_passed_as_finished(front: Front, tail: bytes) -> None:
    for cut in (True, False):
        async with recorded(said("so far"), 0.01, *([tail] if tail else []), cut=cut) as engine:
            front.serve(engine)
            before = await broken_off(front)
            assert before[0]["choices"][0]["delta"] == {"content": "so far"}
            assert len(before) == 1 + tail.endswith(b"\n\n")
            front.engines.clear()


async def test_what_the_client_has_of_a_broken_stream_is_known(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: with that a stream can be joined elsewhere."""
    told, kept, leave = [said(f"word {n}") for n in range(5)], list[bytes | None](), Sent.__exit__
    monkeypatch.setattr(Sent, "__exit__", lambda sent, *exc: (kept.append(sent.events()), leave(sent, *exc))[1])
    async with recorded(*itertools.chain(*((event, 0.02) for event in told)), cut=True) as engine:
        front.serve(engine)  # each of them comes as a chunk of its own
        answer = await front.ask(body=chat(stream=True))
    assert answer.body.startswith(b"".join(told))
    assert kept == [b"".join(told)]


async def test_a_cut_after_the_end_is_no_failure(front: Front) -> None:
    async with recorded(said("all"), DONE, cut=True) as engine:
        front.serve(engine)
        assert (await front.ask(body=chat(stream=True))).body == said("all") + DONE
        front.engines.clear()


# -- time


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_hangs_before_the_first_byte_is_504(front: Front, room: EngineRoom, stream: bool) -> None:
    engine = room.shared(sins="hangs", after=0)
    front.serve(engine, limits={"request_timeout_s": 0.3})
    answer = await front.ask(body=chat(stream=stream))
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    await engine.inside(0)
    assert front.metric("steelyard_upstream_attempts_total", outcome="timeout") == 1


@pytest.mark.slow
async def test_an_engine_that_hangs_in_mid_stream_is_one_error_event(front: Front, room: EngineRoom) -> None:
    for _ in range(2):
        front.serve(room.start(sins="hangs", after=3), limits={"request_timeout_s": 0.5})
    engines: list[Engine] = front.engines
    front.table(*engines)
    assert len(await broken_off(front, "deadline_exceeded")) == 4


# -- what nobody sees


async def test_no_error_shows_what_went_wrong_inside(
    front: Front, room: EngineRoom, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front.serve(room.shared())

    def explode(*_: object) -> None:
        raise ZeroDivisionError("very private")

    monkeypatch.setattr(front.gateway, "_admit", explode)
    answer = await front.ask(body=chat(), headers={"x-request-id": "inside"})
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert b"private" not in answer.body and b"Traceback" not in answer.body
    assert "very private" in caplog.text
    assert (await front.line("inside"))["level"] == "error"


async def test_replicas_in_other_states_are_never_asked(front: Front, room: EngineRoom) -> None:
    front.serve(*(refusing(id=s, state=s) for s in (State.STARTING, State.DRAINING, State.FAILED)), room.shared())
    assert (await front.ask(CHAT, chat())).status == 200
    assert front.metric("steelyard_upstream_attempts_total") == 1
