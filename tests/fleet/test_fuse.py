"""What a gateway told of engines that died outlives it, and the directory that keeps it. A whole stack of simulated engines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest
import yaml

from tests.fleet.test_health import engines
from tests.fleet.test_scaling import titled
from tests.stack import Stack, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    args = {"max-num-seqs": 8, "sim-start-s": 0.1, "sim-sins": "dies_on_prompt"}
    version = {"version": "a", "engine": {"kind": "simulator", "args": args}, "scaling": {"min": 3, "max": 3}}
    (folder / "m.yaml").write_text(yaml.safe_dump({"name": "m", "versions": [version]}))
    with stack(tmp_path_factory.mktemp("fuse") / "state", profile="sim", models=folder) as running:
        yield running


def replaced(sim: Stack, title: bytes) -> None:
    """The one process of that name was killed, and another one is there."""
    (pid,) = titled(sim, title)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(now := titled(sim, title)) == 1 and now != [pid], "another one is there", 60)


def answers(sim: Stack) -> bool:
    try:
        return sim.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_poison_is_refused_by_gateways_that_never_saw_it_after_a_directory_that_did_not_either(sim: Stack) -> None:
    assert sim.chat("m", "SIM_DIE").json()["error"]["code"] == "request_crashed_engine"
    kept = sim.state_dir / "directory.json"
    until(lambda: kept.exists() and json.loads(kept.read_bytes()).get("deaths"), "it is on disk", 30)
    until(lambda: len(engines(sim, "m")) == 3, "all engines are back", 60)
    replaced(sim, b"ray::ServeReplica:gateway")
    until(lambda: answers(sim), "the new gateway answers", 60)
    before = engines(sim, "m")
    assert sim.chat("m", "SIM_DIE").json()["error"]["code"] == "request_crashed_engine"
    replaced(sim, b"ray::Directory")
    replaced(sim, b"ray::ServeReplica:gateway")
    until(lambda: answers(sim), "the next one answers", 60)
    assert sim.chat("m", "SIM_DIE").json()["error"]["code"] == "request_crashed_engine"
    assert engines(sim, "m") == before, "no engine ended of it"
    assert sim.chat("m", "hello").status_code == 200
