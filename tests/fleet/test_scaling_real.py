"""Replica counts on real vLLM engines: from nothing, up under load, and down while streams run on both. Answers are exact:
the model knows them by heart."""

from __future__ import annotations

import itertools
import json
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

START_S = 240  # of an engine, on two shared cores with another one at work
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


def stream(real: Stack, question: str, **more: Any) -> Streamed:
    """One chat as a stream, to its end."""
    began = time.monotonic()
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 400,
        "stream": True, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    with httpx.stream("POST", f"{real.url}/v1/chat/completions", headers=real.headers, json=body, timeout=600) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", ()))
    finished = [c["finish_reason"] for e in events for c in e.get("choices", ()) if c.get("finish_reason")]
    whole = lines[-1:] == ["[DONE]"] and len(finished) == 1 and not any("error" in e for e in events)
    tokens = sum((e.get("usage") or {}).get("completion_tokens", 0) for e in events)
    return Streamed(got.status_code, text, tokens, whole, time.monotonic() - began)


def replicas(real: Stack, state: str = "READY") -> list[dict[str, Any]]:
    told = json.loads(real.cli("status", "--json").stdout)["replicas"]
    return [r for r in told if r["state"] == state]


def test_a_request_at_zero_is_held_and_answered_by_the_replica_that_it_woke(
    real: Stack, corpus: list[dict[str, str]]
) -> None:
    assert replicas(real) == []
    got = stream(real, corpus[0]["question"])
    assert (got.status, got.whole, got.text.strip()) == (200, True, corpus[0]["answer"].strip())
    (one,) = replicas(real)
    print(f"from zero: answered after {got.took_s:.1f} s, of which the engine's own start {one['ready_after_s']:.1f} s")


def test_a_step_of_load_gets_a_second_replica_and_no_request_fails(
    real: Stack, clients: ThreadPoolExecutor, corpus: list[dict[str, str]]
) -> None:
    decided, enough = threading.Event(), threading.Event()
    rows = itertools.cycle(corpus)

    def ask(until_then: threading.Event) -> list[tuple[Streamed, str]]:
        """One client: a stream after the other."""
        done = []
        while not until_then.is_set():
            row = next(rows)
            done.append((stream(real, row["question"]), row["answer"]))
        return done

    began = time.monotonic()
    try:
        # Two of them go on while the second engine starts, which has to share two cores with the first.
        asking = [clients.submit(ask, decided if i > 1 else enough) for i in range(8)]
        until(lambda: replicas(real, "STARTING"), "a second replica starts", 60)
        decided.set()
        until(lambda: len(replicas(real)) == 2, "a second replica serves", START_S)
        took_s = time.monotonic() - began
    finally:
        decided.set()
        enough.set()
    answers = [answer for asked in asking for answer in asked.result()]
    wrong = [(got, wanted) for got, wanted in answers if not got.whole or got.text.strip() != wanted.strip()]
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[0]}"
    print(
        f"step: {len(answers)} streams, none failed; the second replica served {took_s:.1f} s after the first request"
    )


def test_a_replica_goes_while_streams_run_on_both_and_every_one_ends_whole(
    real: Stack, clients: ThreadPoolExecutor, corpus: list[dict[str, str]]
) -> None:
    rows = corpus[:6]
    streams: list[Future[Streamed]] = [
        clients.submit(stream, real, row["question"], max_tokens=LONG, ignore_eos=True) for row in rows
    ]
    until(lambda: [bool(r["in_flight"]) for r in replicas(real)] == [True, True], "streams run on both", 60)
    real.cli("scale", "set", "tiny", "--max", "1")
    until(lambda: len(replicas(real)) == 1, "one of them is told to go", 60)
    running = sum(not f.done() for f in streams)
    assert running, "or nothing was shown"
    for row, streamed in zip(rows, streams, strict=True):
        got = streamed.result()
        assert (got.status, got.whole, got.tokens) == (200, True, LONG)
        assert got.text.startswith(row["answer"].strip()), got.text[:200]
    until(lambda: not replicas(real, "DRAINING"), "the drained one is gone", 60)
    print(f"drain: {running} of {len(streams)} streams ran when the replica left; all ended whole")
