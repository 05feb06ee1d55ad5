"""Replicas that are not well, on a whole stack of simulated engines: who notices, what clients see, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fleet.test_life import model_file
from tests.stack import Stack, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

TWO = {"min": 2, "max": 2}


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    args: dict[str, object] = {"max-num-seqs": 8, "sim-start-s": 0.1}
    spec = {"version": "a", "engine": {"kind": "simulator", "args": args}, "scaling": TWO}
    folder.mkdir(exist_ok=True)
    (folder / "well.yaml").write_text(json.dumps({"name": "well", "versions": [spec], "release": {"stable": "a"}}))
    model_file(folder, "lies", {"a": args | {"sim-sins": "lies_about_health", "sim-sin-after": 4}})
    with stack(tmp_path_factory.mktemp("health") / "state", profile="sim", models=folder) as running:
        yield running


def status(sim: Stack) -> dict[str, Any]:
    return dict(json.loads(sim.cli("status", "--json").stdout))


def replicas(sim: Stack, model: str) -> list[dict[str, Any]]:
    return [r for r in status(sim)["replicas"] if r["model"] == model]


def pid_of(sim: Stack, replica: dict[str, Any]) -> int:
    return int(httpx.get(replica["url"] + "/-/door", headers={"x-steelyard-secret": sim.secret}).json()["pid"])


def in_table(sim: Stack, model: str, state: str) -> float:
    """Replicas of that state in the gateway's table."""
    text = sim.get("/metrics").text
    wanted = f'model="{model}",state="{state}",version="a"'
    lines = [line for line in text.splitlines() if line.startswith("steelyard_replicas{") and wanted in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_stopped_engine_gets_no_new_work_and_is_back_when_it_goes_on(sim: Stack) -> None:
    one = next(r for r in replicas(sim, "well") if r["state"] == "READY")
    pid = pid_of(sim, one)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        until(lambda: in_table(sim, "well", "SUSPECT") == 1, "it is suspect", 15)
        took_s = time.monotonic() - began
        for _ in range(10):
            assert sim.chat("well", "hello", max_tokens=2).status_code == 200
        told = sim.cli("status").stdout
        assert f"{one['id']} is SUSPECT: silent" in told
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: in_table(sim, "well", "READY") == 2, "it is well again", 15)
    assert pid_of(sim, one) == pid
    assert took_s < 10, f"suspect after {took_s:.1f} s"  # 5 s, and a busy machine


def test_an_engine_that_lies_about_its_health_is_replaced_and_then_stays_away_for_a_while(sim: Stack) -> None:
    """/health says 200, and every generation fails: nobody but the probe notices."""
    for round_ in range(3):
        before = until(
            lambda: next((r for r in replicas(sim, "lies") if r["state"] == "READY"), None), "one is ready", 60
        )
        answer = sim.chat("lies", f"hello {round_}", max_tokens=20, stream=True)
        assert "engine_error" in answer.text
        until(
            lambda b=before: all(r["id"] != b["id"] or r["state"] == "FAILED" for r in replicas(sim, "lies")),
            "it failed",
            30,
        )
    facts = status(sim)["versions"]["lies@a"]
    assert [c["fault"] for c in facts["crashes"]] == ["refuses"] * 3
    assert "lies@a is quarantined on" in sim.cli("status").stdout
    assert sim.chat("well", "hello").status_code == 200
    assert (
        'steelyard_replica_faults_total{cause="refuses",model="lies",state="FAILED",version="a"'
        in sim.get("/metrics").text
    )
