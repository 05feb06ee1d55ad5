"""What the gateway relies on of an engine, asserted alike for the simulator and for the real vLLM."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from serving.engine import stats

from .engines import CONTEXT, HOST, NAMES, Engine, eventually, simulator, vllm

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
QUESTION = [{"role": "user", "content": "hello world"}]

# Name on the page -> type.
METRICS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_waiting_by_reason": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "process_resident_memory_bytes": "gauge",
}


@pytest.fixture(scope="module", params=["simulator", pytest.param("vllm", marks=pytest.mark.engine)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "vllm":
        with vllm(tmp_path_factory.mktemp("vllm") / "engine.log") as running:
            yield running
    else:
        flags = ("--served-model-name", *NAMES, "--max-model-len", str(CONTEXT), "--enable-request-id-headers")
        flags += ("--enable-prompt-tokens-details",)
        with simulator(*flags, "--sim-itl-ms", "5") as running:  # `long` takes ten seconds
            yield running


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request whose answer is as long as it may be: the tiny model would stop when its answer is said."""
    return {"model": "tiny", "messages": QUESTION, "max_tokens": 5, "temperature": 0, "ignore_eos": True} | fields


def long(engine: Engine) -> dict[str, Any]:
    """Fields of a request that still runs when it is looked at, though the machine may stall whoever looks for seconds:
    all the context, and on the real engine many choices at once. It counts as `sequences(engine)` running ones."""
    return {"max_tokens": 1900} | ({"n": 32, "temperature": 1.0} if engine.kind == "vllm" else {})


def sequences(engine: Engine) -> int:
    return int(long(engine).get("n", 1))


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello world", "max_tokens": 5, "temperature": 0, "ignore_eos": True} | fields


def test_health_and_ping_are_an_empty_200(engine: Engine) -> None:
    for path in ("/health", "/ping"):
        answer = engine.get(path)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


def test_version_and_load(engine: Engine) -> None:
    assert isinstance(engine.get("/version").json()["version"], str)
    assert engine.get("/load").json() == {"server_load": 0}


def test_models_lists_every_served_name(engine: Engine) -> None:
    listing = engine.get("/v1/models").json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == list(NAMES)
    for card in listing["data"]:
        assert (card["object"], card["owned_by"], card["parent"]) == ("model", "vllm", None)
        assert card["max_model_len"] == CONTEXT
        assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}


def test_chat_answer(engine: Engine) -> None:
    answer = engine.post(CHAT, chat())
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage"),
        *("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert list(choice) == [
        *("index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids", "routed_experts"),
    ]
    assert list(choice["message"]) == [
        *("role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"),
    ]
    assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")


def test_completion_answer(engine: Engine) -> None:
    body = engine.post(COMPLETION, completion()).json()
    assert list(body) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage"),
        *("kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert list(choice) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids"),
        *("prompt_logprobs", "prompt_token_ids", "routed_experts"),
    ]
    assert choice["finish_reason"] == "length"


def test_completions_without_max_tokens_get_sixteen(engine: Engine) -> None:
    usage = engine.post(COMPLETION, {"model": "tiny", "prompt": "hello world", "ignore_eos": True}).json()["usage"]
    assert usage["completion_tokens"] == 16


@pytest.mark.parametrize("asked", ["tiny", "tiny@v1", None])
def test_answers_carry_the_first_served_name_whatever_was_asked(engine: Engine, asked: str | None) -> None:
    assert engine.post(CHAT, chat(model=asked)).json()["model"] == "tiny"
    events = engine.post(CHAT, chat(model=asked, stream=True)).events()
    assert {event["model"] for event in events[:-1]} == {"tiny"}


def test_chat_stream_framing(engine: Engine) -> None:
    answer = engine.post(CHAT, chat(stream=True, max_tokens=200))  # 5 are one event where the server was kept waiting
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["transfer-encoding"] == "chunked"
    first, *deltas, last, done = answer.events()
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert list(first) == ["id", "object", "created", "model", "choices", "prompt_token_ids", "prompt_text"]
    assert deltas
    for event in deltas:
        assert list(event) == ["id", "object", "created", "model", "choices"]
        (choice,) = event["choices"]
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
        assert (list(choice["delta"]), choice["finish_reason"]) == (["content"], None)
    # The last token and the finish reason share an event.
    assert list(last) == ["id", "object", "created", "model", "choices", "system_fingerprint"]
    (choice,) = last["choices"]
    assert list(choice) == ["index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"]
    assert (list(choice["delta"]), choice["finish_reason"]) == (["content"], "length")
    assert done == b"[DONE]"
    assert {(e["id"], e["object"], e["created"]) for e in (*deltas, last)} == {
        (first["id"], "chat.completion.chunk", first["created"])
    }


def test_completion_stream_framing(engine: Engine) -> None:
    *deltas, last, done = engine.post(COMPLETION, completion(stream=True, max_tokens=200)).events()
    for event in deltas:
        assert (list(event), event["object"]) == (["id", "object", "created", "model", "choices"], "text_completion")
        (choice,) = event["choices"]
        assert list(choice) == [
            *("index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"),
        ]
        assert choice["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "length"
    assert "system_fingerprint" in last
    assert done == b"[DONE]"


def test_the_bytes_a_relay_searches_for(engine: Engine) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    raw = engine.post(CHAT, body).body
    assert raw.startswith(b'data: {"id":"chatcmpl-')
    assert raw.endswith(b"}\n\ndata: [DONE]\n\n")
    assert raw.split(b"\n\n")[-3].startswith(b'data: {"id":"chatcmpl-')
    assert b'"model":"tiny","choices":[],"usage":{"prompt_tokens":' in raw.split(b"\n\n")[-3]
    assert b'data: {"error"' not in raw


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETION, completion())])
def test_usage_comes_right_before_done_when_asked_for(engine: Engine, path: str, body: dict[str, Any]) -> None:
    whole = engine.post(path, body).json()["usage"]
    *before, usage, done = engine.post(
        path, body | {"stream": True, "stream_options": {"include_usage": True}}
    ).events()
    assert done == b"[DONE]"
    assert usage["choices"] == []
    counts = {name: whole[name] for name in ("prompt_tokens", "total_tokens", "completion_tokens")}
    details = {"cached_tokens": 0} | (
        {"created_cache_tokens": 0} if path == CHAT else {}
    )  # too short for a whole block
    assert usage["usage"] == counts | {"prompt_tokens_details": details}
    assert whole["prompt_tokens_details"] == dict.fromkeys(("created_cache_tokens", "multimodal_tokens")) | details
    assert "system_fingerprint" in usage
    assert not any("usage" in event or "system_fingerprint" in event for event in before)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETION, completion())])
def test_continuous_usage_counts_up(engine: Engine, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _ = engine.post(path, body | {"stream": True, "stream_options": options}).events()
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 5
    assert all(
        e["usage"]["total_tokens"] == e["usage"]["prompt_tokens"] + c for e, c in zip(events, counts, strict=True)
    )


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat(max_tokens=40)), (COMPLETION, completion(max_tokens=40))])
def test_streamed_text_is_the_whole_text(engine: Engine, path: str, body: dict[str, Any]) -> None:
    def text(choice: dict[str, Any]) -> str:
        said = choice if path == COMPLETION else choice.get("delta") or choice["message"]
        return str(said["text" if path == COMPLETION else "content"])

    whole = text(engine.post(path, body).json()["choices"][0])
    streamed = "".join(text(e["choices"][0]) for e in engine.post(path, body | {"stream": True}).events()[:-1])
    assert whole == streamed != ""


def test_usage_agrees_with_itself_the_tokenizer_and_the_counters(engine: Engine) -> None:
    counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [engine.metric(name) for name in counters]
    served = engine.metric("vllm:request_success_total", finished_reason="length")
    usage = engine.post(CHAT, chat(max_tokens=7)).json()["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert engine.post("/tokenize", {"model": "tiny", "messages": QUESTION}).json()["count"] == usage["prompt_tokens"]
    assert [engine.metric(name) for name in counters] == [before[0] + usage["prompt_tokens"], before[1] + 7]
    assert engine.metric("vllm:request_success_total", finished_reason="length") == served + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_beginning_that_was_seen_before_is_told_as_cached(engine: Engine, stream: bool) -> None:
    words = engine.post("/tokenize", {"model": "tiny", "prompt": "able about above across again"}).json()["tokens"]
    start = (words * 200)[:600] if stream else (words[::-1] * 200)[:600]
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    hits = engine.metric("vllm:prefix_cache_hits_total")

    def cached(prompt: list[int]) -> int:
        answer = engine.post(COMPLETION, completion(prompt=prompt, **fields))
        usage = (answer.events()[-2] if stream else answer.json())["usage"]
        assert usage["prompt_tokens"] == len(prompt)
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(start) == 0
    again = cached(start)
    assert 0 < again < 600  # whole blocks, and never all of it
    assert 0 < cached(start[:400] + words[:1] * 45) <= 400
    assert cached(words[:1] * 3 + start) == 0
    assert engine.metric("vllm:prefix_cache_hits_total") >= hits + again


def test_max_completion_tokens_wins_over_max_tokens(engine: Engine) -> None:
    usage = engine.post(CHAT, chat(max_tokens=2, max_completion_tokens=3)).json()["usage"]
    assert usage["completion_tokens"] == 3


def test_max_tokens_is_cut_to_what_the_context_leaves(engine: Engine) -> None:
    ids = engine.post("/tokenize", {"model": "tiny", "prompt": "hello world " * 2 * CONTEXT}).json()["tokens"]
    usage = engine.post(COMPLETION, completion(prompt=ids[: CONTEXT - 3], max_tokens=100)).json()["usage"]
    assert usage["completion_tokens"] == 3


def test_tokens_read_back_as_the_text_they_were(engine: Engine) -> None:
    prompt = "hello world, again and again"
    body = {"model": "tiny", "prompt": prompt, "return_token_strs": True, "add_special_tokens": False}
    found = engine.post("/tokenize", body).json()
    assert list(found) == ["count", "max_model_len", "tokens", "token_strs"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == CONTEXT
    assert engine.post("/detokenize", {"model": "tiny", "tokens": found["tokens"]}).json() == {"prompt": prompt}


def test_a_request_keeps_its_id(engine: Engine) -> None:
    answer = engine.post(CHAT, chat(), {"X-Request-Id": "order-66"})
    assert answer.headers["x-request-id"] == "order-66"
    assert answer.json()["id"] == "chatcmpl-order-66"
    assert len(engine.post(CHAT, chat()).headers["x-request-id"]) == 32
    assert len(engine.get("/nowhere").headers["x-request-id"]) == 32


BAD_REQUESTS: dict[str, tuple[str, Any, str, str | None, str]] = {
    "prompt over the context": (
        COMPLETION,
        completion(prompt="hello world " * CONTEXT),
        "BadRequestError",
        "input_tokens",
        f"This model's maximum context length is {CONTEXT} tokens. However, your prompt contains",
    ),
    "chat over the context": (
        CHAT,
        chat(messages=[{"role": "user", "content": "hello world " * CONTEXT}]),
        "BadRequestError",
        "input_tokens",
        f"This model's maximum context length is {CONTEXT} tokens. However, your prompt contains",
    ),
    "max_tokens over the context": (
        CHAT,
        chat(max_tokens=CONTEXT + 1),
        "BadRequestError",
        "max_tokens",
        f"max_tokens={CONTEXT + 1} cannot be greater than max_model_len={CONTEXT}. Please request fewer",
    ),
    "no tokens asked for": (CHAT, chat(max_tokens=0), "BadRequestError", "max_tokens", "max_tokens must be at least 1"),
    "no messages": (CHAT, chat(messages=[]), "BadRequestError", None, "Cannot apply chat template to an empty"),
    "empty prompt": (COMPLETION, completion(prompt=""), "BadRequestError", "prompt", "Either prompt or prompt_embeds"),
    "options of a stream without one": (
        CHAT,
        chat(stream_options={"include_usage": True}),
        "BadRequestError",
        "stream_options",
        "Stream options can only be defined when `stream=True`.",
    ),
    "malformed JSON": (CHAT, b'{"model": "tiny", ', "Bad Request", "body.18", "1 validation error:\n  {'type': 'json"),
    "no body": (CHAT, b"", "Bad Request", "body", "1 validation error:\n  {'type': 'missing', 'loc': 'body'"),
    "not an object": (CHAT, b"[]", "Bad Request", "body", "1 validation error:\n"),
    "missing field": (
        CHAT,
        {"model": "tiny"},
        "Bad Request",
        "body.messages",
        "1 validation error:\n  {'type': 'missing",
    ),
    "wrong type": (CHAT, chat(max_tokens="x"), "Bad Request", "body.max_tokens", "1 validation error:\n"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_400_and_an_error_object(engine: Engine, name: str) -> None:
    path, body, kind, param, message = BAD_REQUESTS[name]
    answer = engine.post(path, body)
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    if error["param"] == "input_text":
        # Very long prompts are refused by their characters, before they are tokenised.
        param = "input_text"
    assert (error["type"], error["param"], error["code"]) == (kind, param, 400)
    assert error["message"].startswith(message)


def test_a_streamed_request_is_refused_before_the_stream(engine: Engine) -> None:
    answer = engine.post(CHAT, chat(stream=True, max_tokens=CONTEXT + 1))
    assert (answer.status, answer.headers["content-type"]) == (400, "application/json")


def test_json_must_say_so(engine: Engine) -> None:
    answer = engine.post(CHAT, json.dumps(chat()).encode(), {"Content-Type": "text/plain"})
    message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    assert answer.status == 400
    assert answer.json() == {"error": {"message": message, "type": "Bad Request", "param": None, "code": 400}}


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, chat()), (COMPLETION, completion()), ("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})],
)
def test_an_unknown_model_gets_404_naming_what_is_served(engine: Engine, path: str, body: dict[str, Any]) -> None:
    answer = engine.post(path, body | {"model": "nope"})
    assert answer.status == 404
    assert answer.json() == {
        "error": {
            "message": "The model `nope` does not exist. Valid aliases: tiny, tiny@v1.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }


def test_unknown_route_and_wrong_method(engine: Engine) -> None:
    lost = engine.get("/nowhere")
    assert (lost.status, lost.json()) == (404, {"detail": "Not Found"})
    for path, allow in ((CHAT, "POST"), ("/tokenize", "POST")):
        wrong = engine.get(path)
        assert (wrong.status, wrong.json()) == (405, {"detail": "Method Not Allowed"})
        assert wrong.headers["allow"] == allow
    assert engine.get("/v1/models", "DELETE").headers["allow"] == "GET"


def test_metrics_tell_the_size_of_the_kv_cache(engine: Engine) -> None:
    found = stats.kv_tokens(engine.get("/metrics").body.decode())
    assert found is not None
    assert found >= CONTEXT


def test_metrics_have_the_names_and_types_we_read(engine: Engine) -> None:
    engine.post(CHAT, chat())
    page = engine.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=")
    lines = page.body.decode().splitlines()
    types = dict(line.split(" ")[2:4] for line in lines if line.startswith("# TYPE "))
    assert {name: types.get(name) for name in METRICS} == METRICS
    assert any(line.startswith('vllm:num_requests_running{engine="0",model_name="tiny"} ') for line in lines)
    buckets = [
        line.split('le="')[1].split('"')[0]
        for line in lines
        if line.startswith("vllm:time_to_first_token_s") and "le=" in line
    ]
    assert buckets[:3] == ["0.001", "0.005", "0.01"]
    assert buckets[-2:] == ["2560.0", "+Inf"]


def test_vitals_are_had_alone_and_move_with_every_step(engine: Engine) -> None:
    before = stats.vitals(engine.get(stats.VITALS_PATH).body.decode())
    engine.post(CHAT, chat())
    page = engine.get(stats.VITALS_PATH).body.decode()
    assert len([line for line in page.splitlines() if not line.startswith("#")]) <= 12
    after = stats.vitals(page)
    assert before is not None and after is not None
    assert after.mark[0] > before.mark[0] and after.mark[1] > before.mark[1]
    assert (after.running, after.waiting, after.asleep) == (0, 0, False)
    whole = stats.vitals(engine.get("/metrics").body.decode())
    assert whole == after


def test_iterations_count_up_while_tokens_flow(engine: Engine) -> None:
    before = engine.metric("vllm:iteration_tokens_total_count")
    engine.post(CHAT, chat())
    assert engine.metric("vllm:iteration_tokens_total_count") > before


def test_a_hang_up_frees_the_slot_and_is_not_counted_as_served(engine: Engine) -> None:
    def served() -> list[float]:
        return [engine.metric("vllm:request_success_total", finished_reason=r) for r in ("stop", "length")]

    before = served()
    for path, body in ((CHAT, chat(stream=True, **long(engine))), (COMPLETION, completion(**long(engine)))):
        connection = http.client.HTTPConnection(HOST, engine.port)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        eventually("the request runs", lambda: engine.load() == (sequences(engine), 0))
        assert engine.metric("vllm:kv_cache_usage_perc") > 0
        assert connection.sock is not None
        connection.sock.close()
        eventually("nothing runs after the hang-up", lambda: engine.load() == (0, 0))
        assert engine.metric("vllm:kv_cache_usage_perc") == 0
    assert served() == before


def test_two_requests_share_a_connection(engine: Engine) -> None:
    connection = http.client.HTTPConnection(HOST, engine.port)
    for body in (chat(stream=True), chat()):
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        first_socket = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is first_socket is not None
    connection.close()


def test_the_official_client_reads_it(engine: Engine) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5, temperature=0)
    options = {"include_usage": True}
    parts = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=5, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=QUESTION)


def test_sigterm_cuts_open_answers_short(engine: Engine) -> None:
    """Last, for it ends the engine. vLLM races with the death of its own core, and an open answer gets one of three
    ends: finish reason "abort" and DONE as if all were well, the dead-engine error, or not another word (and then the
    process stays). The simulator always takes the first; its sins have the others."""
    body = chat(**long(engine))
    whole = http.client.HTTPConnection(HOST, engine.port, timeout=10)
    whole.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    ends = []
    with engine.stream(CHAT, body | {"stream": True}, timeout_s=10) as stream:
        eventually("both run", lambda: engine.load() == (2 * sequences(engine), 0))
        engine.process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            *_, last, done, nothing = stream.rest().split(b"\n\n")
            assert (done, nothing) == (b"data: [DONE]", b"")
            ends.append(_end(json.loads(last.removeprefix(b"data: "))))
    with suppress(TimeoutError):
        answer = whole.getresponse()
        ends.append(_end(json.loads(answer.read())))
        assert answer.status == {"abort": 200, "error": 500}[ends[-1]]
    assert set(ends) <= {"abort", "error"}
    if engine.kind == "simulator":
        assert ends == ["abort", "abort"]
        assert engine.process.wait(timeout=10) == 0


def _end(answer: dict[str, Any]) -> str:
    return "error" if "error" in answer else str(answer["choices"][0]["finish_reason"])
