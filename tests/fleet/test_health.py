"""Replicas that are not well, on a whole stack of simulated engines: who notices, what clients see, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serving.engine.process import ENGINE_MARK
from tests.stack import Stack, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

ENGINE = {"max-num-seqs": 8, "sim-start-s": 0.1}
LIES = {"sim-sins": "lies_about_health", "sim-sin-after": 4}


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    for name, args, replicas in (("well", ENGINE, 2), ("lies", ENGINE | LIES, 1)):
        engine = {"kind": "simulator", "args": args}
        version = {"version": "a", "engine": engine, "scaling": {"min": replicas, "max": replicas}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "versions": [version]}))
    with stack(tmp_path_factory.mktemp("health") / "state", profile="sim", models=folder) as running:
        yield running


def engines(sim: Stack, model: str) -> dict[str, int]:
    """Replica id -> pid of its engine, by the marks of processes."""
    mark = f"{ENGINE_MARK}={sim.state_dir}:{model}@".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for part in (entry / "environ").read_bytes().split(b"\0"):
                    if part.startswith(mark):
                        found[part.decode().split(":", 1)[1]] = int(entry.name)
    return found


def sample(sim: Stack, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    total = 0.0
    for line in sim.get("/metrics").text.splitlines():
        match = re.fullmatch(rf"{name}{{(.*)}} (\S+)", line)
        if match and all(f'{k}="{v}"' in match[1] for k, v in labels.items()):
            total += float(match[2])
    return total


def in_table(sim: Stack, model: str, state: str) -> float:
    return sample(sim, "steelyard_replicas", model=model, state=state)


def test_a_stopped_engine_gets_no_new_work_and_is_back_when_it_goes_on(sim: Stack) -> None:
    before = engines(sim, "well")
    replica, pid = next(iter(before.items()))
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: in_table(sim, "well", "SUSPECT") == 1, "it is suspect", 20)
        sent = sample(sim, "steelyard_upstream_attempts_total", model="well")
        for _ in range(10):
            assert sim.chat("well", "hello", max_tokens=2).status_code == 200
        # A merged view is given again for a second, and waits for the stopped engine's part.
        until(
            lambda: sample(sim, "steelyard_upstream_attempts_total", model="well") == sent + 10, "one attempt each", 20
        )
        assert f"{replica} is SUSPECT: silent" in sim.cli("status").stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: in_table(sim, "well", "READY") == 2, "it is well again", 20)
    assert engines(sim, "well") == before


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_an_engine_that_lies_about_its_health_is_replaced_and_others_notice_nothing(sim: Stack, times: int) -> None:
    """/health says 200, and every generation fails: nobody but the probe notices."""
    failed = {"model": "lies", "state": "FAILED", "cause": "refuses"}
    for i in range(times):
        until(lambda: in_table(sim, "lies", "READY") == 1, "it serves", 60)
        before = sample(sim, "steelyard_replica_faults_total", **failed)
        assert "engine_error" in sim.chat("lies", f"hello {i}", max_tokens=20, stream=True).text
        until(lambda n=before: sample(sim, "steelyard_replica_faults_total", **failed) > n, "it failed", 30)
        assert sim.chat("well", "hello").status_code == 200
    until(lambda: in_table(sim, "lies", "READY") == 1, "its successor serves", 60)
    assert sim.chat("lies", "hello", max_tokens=1).status_code == 200
    if times > 2:
        log = "".join(path.read_text() for path in (sim.state_dir / "logs").glob("directory-*.jsonl"))
        assert "lies@a is quarantined on" in log
