"""The simulator's own promises: each sin, determinism, slots, KV room, shutdown."""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.simulator import tokens

from .engines import ROOT, Engine, eventually, simulator, start_simulator

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
DEAD = (
    b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", '
    b'"type": "InternalServerError", "param": null, "code": 500}}\n\ndata: [DONE]\n\n'
)
SLOW = ("--sim-itl-ms", "60000")  # one token, then a minute's wait: a request that stays


def ask(text: str = "hello world", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6} | fields


def said(engine: Engine, **fields: Any) -> str:
    answer: str = engine.post(CHAT, ask(**fields)).json()["choices"][0]["message"]["content"]
    return answer


# -- sins


def test_slow_start_takes_ten_times_as_long() -> None:
    begun = time.monotonic()
    with simulator("--sim-start-s", "0.1", "--sim-sins", "slow_start") as engine:
        assert time.monotonic() - begun >= 1.0
        assert engine.get("/health").status == 200


def test_never_ready_listens_and_refuses() -> None:
    with simulator("--sim-sins", "never_ready") as engine:
        assert engine.get("/health").status == 503
        answer = engine.post(CHAT, ask())
        assert (answer.status, answer.json()["error"]["code"]) == (503, 503)


def test_dies_mid_stream_cuts_after_n_tokens_without_a_word() -> None:
    with simulator("--sim-sins", "dies_mid_stream", "--sim-sin-after", "3") as engine:
        with engine.stream(CHAT, ask(stream=True)) as stream, pytest.raises(http.client.IncompleteRead) as cut:
            stream.rest()
        events = cut.value.partial.split(b"\n\n")
        assert [b'"role"' in event for event in events] == [True, False, False, False, False]
        assert events[-1] == b""
        assert engine.process.wait(10) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_dies_on_prompt_only_on_that_prompt(stream: bool) -> None:
    with simulator("--sim-sins", "dies_on_prompt") as engine:
        assert engine.post(CHAT, ask(stream=stream)).status == 200
        with pytest.raises(ConnectionError):
            engine.post(CHAT, ask("please SIM_DIE now", stream=stream))
        assert engine.process.wait(10) == 1


def test_hangs_stops_every_token_and_nothing_else() -> None:
    with simulator("--sim-sins", "hangs", "--sim-sin-after", "2") as engine:
        with engine.stream(CHAT, ask(stream=True), timeout_s=0.5) as stream:
            got = [stream.event() for _ in range(3)]
            assert b"content" in got[2]
            with pytest.raises(TimeoutError):
                stream.event()
            steps = engine.metric("vllm:iteration_tokens_total_count")
            with engine.stream(CHAT, ask(stream=True), timeout_s=0.5) as late:
                assert late.response.status == 200
                with pytest.raises(TimeoutError):
                    late.event()
            assert engine.metric("vllm:iteration_tokens_total_count") == steps
            assert engine.get("/health").status == 200
        eventually("the slots are free", lambda: engine.load() == (0, 0))


@pytest.mark.parametrize("stream", [True, False])
def test_returns_500_shaped_like_vllm(stream: bool) -> None:
    with simulator("--sim-sins", "returns_500") as engine:
        answer = engine.post(CHAT, ask(stream=stream))
        assert answer.status == 500
        assert answer.json() == {
            "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
        }
        assert engine.get("/health").status == 200


def test_lies_about_health_ends_streams_as_a_dead_core_does() -> None:
    with simulator("--sim-sins", "lies_about_health", "--sim-sin-after", "3") as engine, ExitStack() as stack:
        bystander = stack.enter_context(engine.stream(CHAT, ask(stream=True, max_tokens=2)))
        assert bystander.rest().endswith(b"[DONE]\n\n")
        fatal = engine.post(CHAT, ask(stream=True))
        assert fatal.body.endswith(DEAD)
        assert fatal.body.count(b"\n\n") == 1 + 3 + 2
        assert engine.get("/health").status == 200
        after = engine.post(CHAT, ask(stream=True))
        assert (after.status, after.json()["error"]["type"]) == (500, "InternalServerError")


def test_a_core_that_dies_takes_everybody_along() -> None:
    sins = ("--sim-sins", "lies_about_health", "--sim-sin-after", "3")
    with simulator("--max-num-seqs", "2", "--sim-itl-ms", "20", *sins) as engine, ExitStack() as stack:
        running = stack.enter_context(engine.stream(CHAT, ask(stream=True)))
        whole = http.client.HTTPConnection("127.0.0.1", engine.port)
        whole.request(
            "POST", CHAT, b'{"messages":[{"role":"user","content":"x"}]}', {"Content-Type": "application/json"}
        )
        waiting = stack.enter_context(engine.stream(CHAT, ask(stream=True)))
        assert running.rest().endswith(DEAD)
        assert waiting.rest() == DEAD
        assert whole.getresponse().status == 500
        eventually("nobody is left", lambda: engine.load() == (0, 0))


def test_sins_can_be_changed_while_it_runs() -> None:
    with simulator() as engine:
        assert engine.post("/-/sins", {"names": ["returns_500"]}).status == 200
        assert engine.post(CHAT, ask()).status == 500
        refused = engine.post("/-/sins", {"names": ["sloth"]})
        assert (refused.status, "sloth" in refused.body.decode()) == (400, True)
        assert engine.post("/-/sins", {"names": []}).status == 200
        assert engine.post(CHAT, ask()).status == 200


def test_lingers_stays_silent_after_sigterm_until_its_clients_leave() -> None:
    with simulator("--sim-sins", "lingers") as engine:
        with engine.stream(CHAT, ask(stream=True, max_tokens=4000), timeout_s=1) as stream:
            eventually("it runs", lambda: engine.load() == (1, 0))
            engine.process.terminate()
            with pytest.raises(TimeoutError):
                stream.rest()
            assert engine.process.poll() is None
        assert engine.process.wait(10) == 0


def test_sins_may_come_by_the_environment() -> None:
    with simulator(env={"SIM_SINS": "lies_about_health", "SIM_SIN_AFTER": "0"}) as engine:
        assert engine.post(CHAT, ask(stream=True)).body == DEAD


def test_an_unknown_sin_stops_the_start() -> None:
    process = start_simulator("--sim-sins", "pride")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"unknown sin pride; known: slow_start, never_ready" in errors


# -- answers


def test_an_answer_depends_on_who_is_asked_what_and_on_nothing_else() -> None:
    v1 = ("--served-model-name", "tiny", "tiny@v1", "--lora-modules", "pirate=/srv/adapters/pirate")
    v2 = ("--served-model-name", "tiny", "tiny@v2")
    with simulator(*v1) as one, simulator(*v1) as same, simulator(*v2) as other:
        answer = said(one)
        assert answer == said(one) == said(same) == said(one, model="tiny@v1") == said(one, stream=False, user="me")
        assert said(one, max_tokens=4) == " ".join(answer.split()[:4])
        assert answer != said(other)
        assert answer != said(one, model="pirate")
        assert answer != said(one, text="hello moon")


def test_an_answer_has_as_many_tokens_as_it_says() -> None:
    with simulator() as engine:
        body = engine.post(CHAT, ask(max_tokens=500)).json()
        count = engine.post("/tokenize", {"prompt": body["choices"][0]["message"]["content"]}).json()["count"]
        assert count == body["usage"]["completion_tokens"] == 500


def test_choices_differ_and_come_beside_each_other() -> None:
    with simulator() as engine:
        body = engine.post(CHAT, ask(n=2)).json()
        first, second = (choice["message"]["content"] for choice in body["choices"])
        assert first != second and first == said(engine)
        assert body["usage"]["completion_tokens"] == 12
        streamed = {0: "", 1: ""}
        for event in engine.post(CHAT, ask(n=2, stream=True)).events()[:-1]:
            for choice in event["choices"]:
                streamed[choice["index"]] += choice["delta"]["content"]
        assert streamed == {0: first, 1: second}
        assert engine.post(CHAT, ask(n=0)).status == 400


def test_an_answer_without_max_tokens_stops_by_itself() -> None:
    with simulator() as engine:
        body = engine.post(CHAT, ask(max_tokens=None)).json()
        assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (64, "stop")


def test_an_adapter_is_listed_under_its_parent_and_signs_its_answers() -> None:
    with simulator("--served-model-name", "tiny", "--lora-modules", "pirate=/srv/adapters/pirate") as engine:
        card = engine.get("/v1/models").json()["data"][1]
        assert (card["id"], card["root"], card["parent"]) == ("pirate", "/srv/adapters/pirate", "tiny")
        assert card["max_model_len"] is None
        assert engine.post(CHAT, ask(model="pirate")).json()["model"] == "pirate"


@given(st.text())
def test_any_text_survives_its_tokens(text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.pieces(text)) == len(tokens.encode(text)) == len(tokens.strings(text))
    assert [tokens.piece(i) for i in tokens.encode(text)] == tokens.pieces(text)


def test_common_words_count_one_token_each() -> None:
    assert len(tokens.pieces("able about above across")) == 4


# -- slots and KV room


def test_requests_beyond_the_slots_wait_in_line() -> None:
    with simulator("--max-num-seqs", "2", *SLOW) as engine, ExitStack() as stack:
        hold = [stack.enter_context(engine.stream(CHAT, ask(stream=True))) for _ in range(2)]
        eventually("two run", lambda: engine.load() == (2, 0))
        third = stack.enter_context(engine.stream(CHAT, ask(stream=True)))
        assert third.response.status == 200
        eventually("the third waits", lambda: engine.load() == (2, 1))
        fourth = stack.enter_context(engine.stream(CHAT, ask(stream=True)))
        eventually("the fourth waits", lambda: engine.load() == (2, 2))
        assert engine.metric("vllm:num_requests_waiting_by_reason", reason="capacity") == 2
        hold[0].close()
        assert b'"role"' in third.event()
        assert engine.load() == (2, 1)
        fourth.close()
        eventually("one that leaves the line is forgotten", lambda: engine.load() == (2, 0))


def test_a_request_waits_until_its_prompt_and_answer_fit_the_kv_room() -> None:
    room = ("--max-model-len", "64", "--sim-kv-tokens", "100")
    with simulator(*room, *SLOW) as engine, ExitStack() as stack:

        def hold(answer: int) -> Any:
            body = {"prompt": "one", "max_tokens": answer, "stream": True}
            return stack.enter_context(engine.stream(COMPLETION, body))

        first = hold(59)
        eventually("the first holds 60 of 100", lambda: engine.metric("vllm:kv_cache_usage_perc") == 0.6)
        second, third = hold(40), hold(9)
        # The third would fit: first come, first served.
        eventually("both wait for room", lambda: engine.load() == (1, 2))
        first.close()
        assert second.event()
        assert third.event()
        assert engine.metric("vllm:kv_cache_usage_perc") == 0.51


def test_what_was_computed_before_is_told_and_takes_no_time_again() -> None:
    """A shared beginning, whoever asks; another adapter or salt shares nothing."""
    flags = ("--enable-prompt-tokens-details", "--sim-prefill-us", "2000", "--lora-modules", "pirate=somewhere")
    system, question = "able about " * 160, "what then"  # 320 tokens and some
    with simulator(*flags) as engine:

        def cached(**fields: Any) -> int:
            usage = engine.post(COMPLETION, {"prompt": system + question, "max_tokens": 1, **fields}).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert [cached(), cached(), cached(prompt=system + "and else")] == [0, 320, 320]
        assert [cached(model="pirate"), cached(cache_salt="mine")] == [0, 0]
        ids = engine.post("/tokenize", {"prompt": system + question}).json()["tokens"]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *_, usage, _ = engine.post(COMPLETION, {"prompt": ids, "max_tokens": 1, **options}).events()
        assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 320}
        assert engine.metric("vllm:prefix_cache_hits_total") == engine.metric("vllm:prompt_tokens_cached_total") == 960
        assert engine.metric("vllm:prefix_cache_queries_total") == engine.metric("vllm:prompt_tokens_total")
        # Six requests of some 320 tokens, of which three had to be computed.
        assert 3 * 0.64 <= engine.metric("vllm:time_to_first_token_seconds_sum") < 6 * 0.64
    with simulator("--no-enable-prefix-caching", "--enable-prompt-tokens-details") as engine:
        assert [cached(), cached()] == [0, 0]


def test_room_for_less_than_one_full_request_stops_the_start() -> None:
    process = start_simulator("--max-model-len", "1k", "--sim-kv-tokens", "999", "--port", "0")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"cannot hold one request of --max-model-len 1000 tokens" in errors


async def _stream_text(session: aiohttp.ClientSession, engine: Engine, body: dict[str, Any], hang_up: bool) -> bytes:
    async with session.post(f"{engine.url}{CHAT}", json=body) as response:
        return await response.content.read(64) if hang_up else await response.read()


def test_two_hundred_streams_at_once_and_every_gauge_returns_to_zero() -> None:
    with simulator("--max-num-seqs", "150") as engine:

        async def crowd() -> list[bytes]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                bodies = [ask(f"question {i}", stream=True, max_tokens=30) for i in range(200)]
                return await asyncio.gather(
                    *(_stream_text(session, engine, body, hang_up=i % 4 == 0) for i, body in enumerate(bodies))
                )

        streams = asyncio.run(crowd())
        kept = [stream for i, stream in enumerate(streams) if i % 4]
        assert all(stream.endswith(b"\n\ndata: [DONE]\n\n") for stream in kept)
        assert all(stream.count(b"data: ") == 1 + 30 + 1 for stream in kept)
        eventually("nobody runs or waits", lambda: engine.load() == (0, 0))
        assert engine.metric("vllm:kv_cache_usage_perc") == 0
        assert engine.metric("vllm:request_success_total", finished_reason="length") >= len(kept)


def test_load_is_tracked_when_asked_for() -> None:
    with simulator("--enable-server-load-tracking", *SLOW) as engine:
        with engine.stream(CHAT, ask(stream=True)) as stream:
            assert stream.event()
            assert engine.get("/load").json() == {"server_load": 1}
        eventually("the load is gone", lambda: engine.get("/load").json() == {"server_load": 0})


# -- the process


def test_options_it_does_not_know_are_ignored_aloud() -> None:
    flags = ("--enforce-eager", "--max_model_len=512", "--gpu-memory-utilization", "0.9")
    process = start_simulator("--port", "0", *flags, "--sim-start-s", "0")
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"simulator ready: http://127.0.0.1:")
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert errors == b"simulator: ignores --enforce-eager --gpu-memory-utilization\n"


def test_middleware_wraps_every_answer_the_last_one_outermost() -> None:
    stamps = ("--middleware", "stamps.First", "--middleware", "stamps.Second")
    with simulator(*stamps) as engine:
        for path in ("/health", "/metrics", "/nowhere"):
            assert engine.get(path).headers["x-stamp"] == "second"
            connection = http.client.HTTPConnection("127.0.0.1", engine.port)
            connection.request("GET", path)
            assert connection.getresponse().headers.get_all("x-stamp") == ["first", "second"]
            connection.close()


def test_a_taken_port_is_told_in_one_line() -> None:
    with simulator() as engine:
        process = start_simulator("--port", str(engine.port), "--sim-start-s", "60")
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert errors == f"simulator: cannot listen on 127.0.0.1:{engine.port}: Address already in use\n".encode()


def test_sigterm_ends_it_though_requests_run_and_wait() -> None:
    with simulator("--max-num-seqs", "1", *SLOW) as engine, ExitStack() as stack:
        running, waiting = (stack.enter_context(engine.stream(CHAT, ask(stream=True))) for _ in range(2))
        eventually("one runs, one waits", lambda: engine.load() == (1, 1))
        engine.process.terminate()
        for stream in (running, waiting):
            *_, last, done, _ = stream.rest().split(b"\n\n")
            assert b'"finish_reason":"abort"' in last
            assert done == b"data: [DONE]"
        assert engine.process.wait(10) == 0


def test_it_imports_neither_ray_nor_vllm() -> None:
    code = (
        "import sys, serving.engine.simulator.__main__; print({'ray', 'vllm', 'torch', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
