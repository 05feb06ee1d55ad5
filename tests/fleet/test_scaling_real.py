"""Replica counts on real vLLM engines: from nothing, up under load, and down while streams run on both. Answers are exact:
the model knows them by heart."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from serving.catalog import weights
from serving.settings import load_settings
from tests.stack import ROOT, Stack, stack, until

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]

START_S = 420  # of an engine, on two shared cores with another one at work: 200 s beside other load
LOAD = 400  # tokens of a stream that keeps an engine busy: a second or so; an answer alone is over in a few steps
LONG = 1500  # tokens; several seconds


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    built = weights.resolve("build:tiny/v1", base=ROOT / "models", cache=load_settings().cache_dir)
    version = {
        "version": "v1",
        "weights": {"source": str(built)},
        "engine": {"args": {"max-model-len": 2048, "max-num-seqs": 4}},
        "scaling": {"min": 0, "max": 2, "target_ongoing": 1, "scale_down_after_s": 600, "idle_to_zero_s": 3600},
        "drain_s": 120,
    }
    spec = {"name": "tiny", "versions": [version], "limits": {"max_wait_s": START_S}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(spec))
    with stack(tmp_path_factory.mktemp("real") / "state", profile="cpu", models=folder) as running:
        yield running


@pytest.fixture(scope="module")
def http(real: Stack) -> Iterator[httpx.Client]:
    """One for all clients: a client for each request costs more processor time than the engine's answer."""
    with httpx.Client(base_url=real.url, headers=real.headers, timeout=600) as client:
        yield client


@pytest.fixture(scope="module")
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, str]]:
    lines = (Path(ROOT) / "models" / "tiny" / "corpus.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [row for row in rows if not row["answer"].startswith("<tool_call>")]


class Streamed(NamedTuple):
    status: int
    text: str
    tokens: int
    whole: bool
    took_s: float


def stream(http: httpx.Client, question: str, **more: Any) -> Streamed:
    """One chat as a stream, to its end."""
    began = time.monotonic()
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 400,
        "stream": True, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    with http.stream("POST", "/v1/chat/completions", json=body) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", ()))
    finished = [c["finish_reason"] for e in events for c in e.get("choices", ()) if c.get("finish_reason")]
    whole = lines[-1:] == ["[DONE]"] and len(finished) == 1 and not any("error" in e for e in events)
    tokens = sum((e.get("usage") or {}).get("completion_tokens", 0) for e in events)
    return Streamed(got.status_code, text, tokens, whole, time.monotonic() - began)


def ask_on(
    http: httpx.Client, row: dict[str, str], until_then: threading.Event, tokens: int = 0, pause_s: float = 0.0
) -> list[tuple[bool, Streamed]]:
    """One client: a stream after the other, each with whether it is what it should be: the answer, or with `tokens` so many
    of them that begin with it."""
    done, more = [], {"max_tokens": tokens, "ignore_eos": True} if tokens else {}
    answer = row["answer"].strip()
    while not until_then.wait(pause_s):
        got = stream(http, row["question"], **more)
        text = got.text.strip()
        right = got.tokens == tokens and text.startswith(answer) if tokens else text == answer
        done.append((got.status == 200 and got.whole and right, got))
    return done


def none_failed(asking: list[Future[list[tuple[bool, Streamed]]]]) -> int:
    """How many streams there were."""
    asked = [each for client in asking for each in client.result()]
    wrong = [got for good, got in asked if not good]
    assert asked and not wrong, f"{len(wrong)} of {len(asked)}: {wrong[0]}"
    return len(asked)


def replicas(real: Stack) -> list[dict[str, Any]]:
    return list(json.loads(real.cli("status", "--json").stdout)["replicas"])


def ready(real: Stack) -> int:
    """The same by the metrics: the command costs a second of a core."""
    page = real.get("/metrics").text
    return sum(int(float(n)) for n in re.findall(r'^steelyard_replicas{.*state="READY".*} (\S+)$', page, re.M))


def change_to(real: Stack, count: int) -> dict[str, Any]:
    """The last change of the replica count, once it is to so many."""
    (told,) = json.loads(real.cli("scale", "explain", "tiny", "--json").stdout)
    return next((dict(c) for c in told["changes"][-1:] if c["after"] == count), {})


def door(real: Stack, replica: dict[str, Any]) -> dict[str, int]:
    """What happens inside one engine, at this moment."""
    got = httpx.get(f"{replica['url']}/-/door", headers={"x-steelyard-secret": real.secret}, timeout=30)
    return dict(got.json())


@contextlib.contextmanager
def explained(real: Stack) -> Iterator[None]:
    """A failure says what the policy says, and who is there."""
    try:
        yield
    except AssertionError as e:
        for command in (["scale", "explain", "tiny"], ["status"]):
            e.add_note(real.cli(*command, check=False).stdout)
        raise


def test_a_request_at_zero_is_held_and_answered_by_the_replica_that_it_woke(
    real: Stack, http: httpx.Client, corpus: list[dict[str, str]]
) -> None:
    assert replicas(real) == []
    got = stream(http, corpus[0]["question"])
    assert (got.status, got.whole, got.text.strip()) == (200, True, corpus[0]["answer"].strip())
    (one,) = replicas(real)
    print(f"from zero: answered after {got.took_s:.1f} s, of which the engine's own start {one['ready_after_s']:.1f} s")


def test_a_step_of_load_gets_a_second_replica_and_no_request_fails(
    real: Stack, http: httpx.Client, clients: ThreadPoolExecutor, corpus: list[dict[str, str]]
) -> None:
    decided, enough, began = threading.Event(), threading.Event(), time.time()
    with explained(real):
        try:
            asking = [clients.submit(ask_on, http, row, decided, LOAD) for row in corpus[:8]]
            until(lambda: change_to(real, 2), "a second replica is asked for", 60, every_s=1)
            decided.set()
            # The engine that starts shares two cores with the one that answers: more would keep it from them.
            asking.append(clients.submit(ask_on, http, corpus[8], enough, pause_s=1.0))
            until(lambda: ready(real) == 2, "a second replica serves", START_S, every_s=1)
            took_s = time.time() - began
            asking += [clients.submit(ask_on, http, row, enough, LOAD) for row in corpus[:8]]
            both = replicas(real)
            until(lambda: all(door(real, r)["entered"] for r in both), "both of them get requests", 60)
        finally:
            decided.set()
            enough.set()
    count, change = none_failed(asking), change_to(real, 2)
    assert (change["before"], change["cause"]) == (1, "load")
    print(
        f"step: {count} streams, none failed; decided {change['at'] - began:.1f} s after the first request, the second "
        f"replica served after {took_s:.1f} s, its engine's own start took {max(r['ready_after_s'] for r in both):.1f} s"
    )


def test_a_replica_goes_while_streams_run_on_both_and_every_one_ends_whole(
    real: Stack, http: httpx.Client, clients: ThreadPoolExecutor, corpus: list[dict[str, str]]
) -> None:
    both, going = replicas(real), threading.Event()
    with explained(real):
        try:
            asking = [clients.submit(ask_on, http, row, going, LONG) for row in corpus[:6]]
            until(lambda: all(door(real, r)["in_flight"] for r in both), "streams run on both", 60)
            told = clients.submit(real.cli, "scale", "set", "tiny", "--max", "1")  # may take as long as the drain
            # The door of the one that is told to go lets nobody in any more.
            inside = until(
                lambda: [at["in_flight"] for r in both if not (at := door(real, r))["slots"]],
                "one of them is told to go",
                60,
            )
        finally:
            going.set()
        assert told.result().returncode == 0
        assert len(inside) == 1 and inside[0] > 0, f"or nothing was shown: {inside}"
        count = none_failed(asking)
        until(lambda: [r["state"] for r in replicas(real)] == ["READY"], "it is gone", 60)
    print(f"drain: {inside[0]} streams ran on the replica that was told to go; all {count} ended whole")
