"""Traces: what a request waited for, under its client's trace, and nothing of what it said."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from serving.gateway.keys import create_key
from serving.telemetry import otlp
from tests import otlp as receiver
from tests.gateway import harness
from tests.gateway.harness import EngineRoom, Front, Keys, chat, endless, eventually, recorded, refusing
from tests.otlp import CLIENT, ERROR, INTERNAL, OK, SERVER, Collector, Span

NAME = "POST /v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ANSWER = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'


@pytest.fixture
def collector() -> Iterator[Collector]:
    with receiver.collector() as found:
        yield found


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with mock.patch.object(otlp, "EVERY_S", 0.01):
        yield


@pytest.fixture
async def traced(keys: Keys, tmp_path: Path, collector: Collector) -> AsyncIterator[Front]:
    """A gateway with an empty table whose every request is traced."""
    async with harness.front(keys, tmp_path, collector.url) as front:
        yield front
        await front.rest()


async def trace_of(front: Front, collector: Collector, request_id: str) -> dict[str, list[Span]]:
    """The whole trace of a request, by name of the span."""
    number = (await front.line(request_id))["trace_id"]
    await eventually(f"the trace {number}", lambda: any(s.name == NAME for s in collector.of(number)))
    found: dict[str, list[Span]] = {}
    for span in collector.of(number):
        found.setdefault(span.name, []).append(span)
    return found


def one(spans: dict[str, list[Span]], name: str) -> Span:
    [span] = spans[name]
    return span


async def test_a_stream_is_told_from_its_arrival_to_its_end(
    traced: Front, room: EngineRoom, collector: Collector
) -> None:
    engine = room.shared()
    traced.serve(engine)
    answer = await traced.ask(body=chat(stream=True), headers={"x-request-id": "whole"})
    assert answer.status == 200
    spans = await trace_of(traced, collector, "whole")
    assert sorted(spans) == sorted([NAME, "auth", "queue", "pick", "attempt", "first byte", "stream"])
    root, attempt = one(spans, NAME), one(spans, "attempt")
    assert (root.parent, root.kind, root.status) == ("", SERVER, OK)
    assert {s.parent for s in map(lambda n: one(spans, n), ("auth", "queue", "pick", "attempt"))} == {root.id}
    assert {one(spans, "first byte").parent, one(spans, "stream").parent} == {attempt.id}
    assert (attempt.kind, one(spans, "queue").kind) == (CLIENT, INTERNAL)
    in_turn = [one(spans, n) for n in ("auth", "queue", "pick", "first byte", "stream")]
    assert all(a.ended <= b.began for a, b in itertools.pairwise(in_turn))
    assert in_turn[0].began == root.began
    assert all(root.began <= s.began <= s.ended <= root.ended for [s] in spans.values())
    line = await traced.line("whole")
    assert root.about == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": line["ttft_ms"] / 1e3,
        "gen_ai.usage.input_tokens": line["prompt_tokens"],
        "gen_ai.usage.output_tokens": 6,
        "steelyard.version": "v1",
        "steelyard.class": "default",
        "steelyard.reason": "ok",
        "steelyard.request_id": "whole",
        "steelyard.key_id": line["key_id"],
    }
    assert attempt.about == {"steelyard.replica": engine.endpoint.id, "server.address": "", "steelyard.outcome": "ok"}
    assert (root.service, root.resource["service.instance.id"]) == ("steelyard-gateway", traced.gateway.id)
    assert abs(root.ended - root.began - line["e2e_ms"] * 1e6) < 1e5


async def test_an_answer_that_is_no_stream_has_no_stream(traced: Front, room: EngineRoom, collector: Collector) -> None:
    traced.serve(room.shared())
    assert (await traced.ask(body=chat(model="pirate"), headers={"x-request-id": "flat"})).status == 200
    spans = await trace_of(traced, collector, "flat")
    assert "stream" not in spans
    about = one(spans, NAME).about
    assert (about["gen_ai.request.model"], about["steelyard.adapter"]) == ("tiny", "pirate")
    assert about["gen_ai.request.stream"] is False


async def test_the_engine_joins_under_the_attempt_in_the_clients_trace(traced: Front, collector: Collector) -> None:
    async with recorded(ANSWER % b"hi", b"data: [DONE]\n\n") as engine:
        traced.serve(engine)
        given = {"traceparent": f"00-{TRACE}-{PARENT}-00", "tracestate": "a=1,b=2", "x-request-id": "joined"}
        assert (await traced.ask(body=chat(stream=True), headers=given)).status == 200
    spans = await trace_of(traced, collector, "joined")
    root, attempt = one(spans, NAME), one(spans, "attempt")
    assert (root.trace, root.parent) == (TRACE, PARENT)
    [headers] = engine.headers
    assert (headers["traceparent"], headers["tracestate"]) == (f"00-{TRACE}-{attempt.id}-01", "a=1,b=2")


@pytest.mark.parametrize(
    ("ratio", "flag", "trusted", "sampled"),
    [
        (0.0, "01", False, False),
        (0.0, "01", True, True),
        (1.0, "00", True, False),
        (1.0, None, True, True),
        (0.0, None, True, False),
    ],
)
async def test_whose_word_counts(
    keys: Keys,
    tmp_path: Path,
    collector: Collector,
    ratio: float,
    flag: str | None,
    trusted: bool,
    sampled: bool,
) -> None:
    """A client decides only with a key that has the scope `trace`. What is not sampled makes no span anywhere: the engine
    hears of no trace, and its own sampler starts none."""
    scopes = ["infer:*", "trace"] if trusted else ["infer:*"]
    _, token = create_key(keys.path, name="app", scopes=scopes, now=0)
    async with (
        harness.front(keys, tmp_path, collector.url, ratio) as front,
        recorded(ANSWER % b"hi", b"data: [DONE]\n\n") as engine,
    ):
        front.serve(engine)
        given = {} if flag is None else {"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}
        assert (
            await front.ask(body=chat(stream=True), key=token, headers={**given, "x-request-id": "r"})
        ).status == 200
        assert ("traceparent" in engine.headers[0]) is sampled
        trace = (await front.line("r"))["trace_id"]
        assert (trace is not None) is sampled
        assert trace in ((TRACE, None) if flag else (trace,))
        if sampled:
            await trace_of(front, collector, "r")
    assert bool(collector.spans) is sampled


async def test_off_a_clients_trace_goes_no_further(front: Front) -> None:
    async with recorded(ANSWER % b"hi", b"data: [DONE]\n\n") as engine:
        front.serve(engine)
        given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1", "x-request-id": "off"}
        assert (await front.ask(body=chat(stream=True), headers=given)).status == 200
    assert not engine.headers[0].keys() & {"traceparent", "tracestate"}
    assert (await front.line("off"))["trace_id"] is None


@pytest.mark.usefixtures("short_pauses")
async def test_each_attempt_is_seen(traced: Front, room: EngineRoom, collector: Collector) -> None:
    well = room.shared()
    traced.serve(refusing(slots=64, node="10.0.0.9"), well)
    ids = [f"again-{i}" for i in range(4)]
    for request_id in ids:
        assert (await traced.ask(body=chat(), headers={"x-request-id": request_id})).status == 200
    tried = [r for r in ids if (await traced.line(r))["attempts"] == 2]
    spans = await trace_of(traced, collector, tried[0])
    first, second = sorted(spans["attempt"], key=lambda s: s.began)
    assert (first.status, first.about["steelyard.outcome"]) == (ERROR, "connect_error")
    assert (first.about["steelyard.replica"], first.about["server.address"]) == ("gone", "10.0.0.9")
    assert (second.status, second.about["steelyard.outcome"]) == (OK, "ok")
    assert (second.about["steelyard.replica"], second.about["http.request.resend_count"]) == (well.endpoint.id, 1)
    assert len(spans["queue"]) == len(spans["pick"]) == 2
    assert one(spans, "retry wait").ended <= second.began
    assert one(spans, "first byte").parent == second.id
    assert one(spans, NAME).status == OK


async def test_a_full_door_is_an_attempt_and_no_error(traced: Front, room: EngineRoom, collector: Collector) -> None:
    engine = room.start(slots=1, sim_ttft_ms=100)
    traced.serve(engine)
    traced.table(_roomier(engine))  # an old word of the directory: the gateway sends two
    asked = [traced.ask(body=chat(), headers={"x-request-id": f"b{i}"}) for i in range(2)]
    assert {a.status for a in await asyncio.gather(*asked)} == {200}
    outcomes = [
        [s.about["steelyard.outcome"] for s in (await trace_of(traced, collector, f"b{i}"))["attempt"]] for i in (0, 1)
    ]
    told = max(outcomes, key=len)
    assert told[-1] == "ok"
    assert set(told[:-1]) == {"busy"}
    assert not [s for s in collector.spans if s.status == ERROR]


def _roomier(engine: harness.Engine) -> harness.Engine:
    return harness.Engine(msgspec.structs.replace(engine.endpoint, slots=2), engine.process)


async def test_a_refused_request_has_no_attempt(traced: Front, room: EngineRoom, collector: Collector) -> None:
    traced.serve(room.shared())
    secret = "name-of-no-model-" + "x" * 5000
    assert (await traced.ask(body=chat(model=secret), headers={"x-request-id": "nobody"})).status == 404
    spans = await trace_of(traced, collector, "nobody")
    assert sorted(spans) == [NAME, "auth"]
    root = one(spans, NAME)
    assert (root.status, root.about["error.type"], root.about["http.response.status_code"]) == (
        OK,
        "model_not_found",
        404,
    )
    assert "gen_ai.request.model" not in root.about
    assert (await traced.ask(body=chat(), key="sk-wrong", headers={"x-request-id": "keyless"})).status == 401
    assert (await traced.line("keyless"))["trace_id"] is None, "who has no key makes us export nothing"


async def test_a_death_in_mid_stream_is_an_error(traced: Front, room: EngineRoom, collector: Collector) -> None:
    traced.serve(room.shared(sins="dies_mid_stream", after=3))
    assert (await traced.ask(body=chat(stream=True), headers={"x-request-id": "died"})).status == 200
    spans = await trace_of(traced, collector, "died")
    root, attempt = one(spans, NAME), one(spans, "attempt")
    assert (root.status, root.about["error.type"], root.about["steelyard.reason"]) == (ERROR, *["engine_error"] * 2)
    assert (attempt.status, attempt.about["steelyard.outcome"]) == (ERROR, "died")
    assert root.about["steelyard.aborted_tokens"] == (await traced.line("died"))["aborted_tokens"] > 0
    assert one(spans, "stream").ended <= root.ended


async def test_a_client_that_leaves_is_no_error(traced: Front, room: EngineRoom, collector: Collector) -> None:
    traced.serve(room.shared(sim_itl_ms=20))
    async with traced.hung_up(endless(), request_id="left") as reader:
        await reader.readuntil(b"data: ")
    spans = await trace_of(traced, collector, "left")
    root, attempt = one(spans, NAME), one(spans, "attempt")
    assert (root.status, root.about["steelyard.reason"]) == (OK, "client_gone")
    assert (attempt.status, attempt.about["steelyard.outcome"]) == (OK, "client_gone")


async def test_nothing_that_was_said_and_no_key_leaves(
    traced: Front, room: EngineRoom, collector: Collector, keys: Keys
) -> None:
    traced.serve(room.shared())
    said = "the-secret-of-the-prompt"
    bodies = [
        chat(said, stream=True, user=said, prompt_cache_key=said),
        chat(said, model=said),
        chat(said, temperature=said),
        chat(said * 20_000),
        b'{"model": "tiny", "messages": "' + said.encode(),
    ]
    for i, body in enumerate(bodies):
        headers = {"x-request-id": f"said-{i}", "x-session-id": said, "cookie": said, "user-agent": said}
        answer = await traced.ask(body=body, headers=headers)
        assert answer.status == (200 if i == 0 else answer.status)
        await trace_of(traced, collector, f"said-{i}")
    text = b"".join(collector.bodies) + json.dumps(collector.headers).encode()
    assert said.encode() not in text
    assert keys.all.encode() not in text and keys.all[-43:].encode() not in text
    assert b"lorem" not in text


async def test_a_collector_gets_its_headers(keys: Keys, tmp_path: Path, collector: Collector, room: EngineRoom) -> None:
    file = tmp_path / "headers"
    file.write_text("Authorization: Bearer abc, def\nx-scope: team\n")
    file.chmod(0o600)
    with mock.patch.dict("os.environ", STEELYARD_OTLP_HEADERS_FILE=str(file)):
        async with harness.front(keys, tmp_path / "front", collector.url) as front:
            front.serve(room.shared())
            await front.ask(body=chat(), headers={"x-request-id": "h"})
            await trace_of(front, collector, "h")
    assert (collector.headers[0]["authorization"], collector.headers[0]["x-scope"]) == ("Bearer abc, def", "team")


async def test_a_collector_that_hangs_costs_spans_only(
    keys: Keys, tmp_path: Path, collector: Collector, room: EngineRoom
) -> None:
    """What waits for it is bounded, whole traces are dropped beyond, and the end waits for it only so long."""
    collector.wait = threading.Event()
    with mock.patch.multiple(otlp, QUEUE_SPANS=30, FLUSH_S=0.05):
        async with harness.front(keys, tmp_path, collector.url) as front:
            front.serve(room.shared())
            for i in range(12):
                assert (await front.ask(body=chat(), headers={"x-request-id": f"hang-{i}"})).status == 200
            spans = 6  # of each
            assert front.metric("steelyard_trace_spans_total", outcome="dropped") == (12 - 30 // spans) * spans
            assert collector.asked <= 1
        collector.wait.set()
        await eventually("the collector took what waited", lambda: len(collector.spans) == 30)


async def test_a_collector_that_is_gone_is_told_of_once_a_minute(
    keys: Keys, tmp_path: Path, room: EngineRoom, caplog: pytest.LogCaptureFixture
) -> None:
    gone = refusing().url
    with mock.patch.object(otlp, "EXPORT_TIMEOUT_S", 0.05), caplog.at_level(logging.WARNING):
        async with harness.front(keys, tmp_path, gone) as front:
            front.serve(room.shared())
            for n in range(1, 4):
                assert (await front.ask(body=chat())).status == 200
                await eventually(
                    "it failed", lambda n=n: front.metric("steelyard_trace_spans_total", outcome="failed") == 6 * n
                )
    assert [r.name for r in caplog.records if "traces for" in r.getMessage()] == ["serving.telemetry.otlp"]
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")]


async def test_a_collector_that_refuses_is_counted(
    keys: Keys, tmp_path: Path, collector: Collector, room: EngineRoom
) -> None:
    collector.status = 401
    async with harness.front(keys, tmp_path, collector.url) as front:
        front.serve(room.shared())
        assert (await front.ask(body=chat())).status == 200
        await eventually("it failed", lambda: front.metric("steelyard_trace_spans_total", outcome="failed") == 6)


async def test_what_waits_at_the_end_is_sent(
    keys: Keys, tmp_path: Path, collector: Collector, room: EngineRoom
) -> None:
    with mock.patch.object(otlp, "EVERY_S", 60.0):
        async with harness.front(keys, tmp_path, collector.url) as front:
            front.serve(room.shared())
            assert (await front.ask(body=chat())).status == 200
            await front.rest()
            assert not collector.spans
    assert len(collector.spans) == 6


async def test_no_post_has_more_spans_than_may_be_encoded_at_once(
    keys: Keys, tmp_path: Path, collector: Collector, room: EngineRoom
) -> None:
    with mock.patch.object(otlp, "BATCH_SPANS", 4):
        async with harness.front(keys, tmp_path, collector.url) as front:
            front.serve(room.shared())
            assert (await front.ask(body=chat())).status == 200
            await front.rest()
    assert (len(collector.bodies), len(collector.spans)) == (2, 6)
