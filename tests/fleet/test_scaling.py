"""Replica counts on real Ray Serve with simulated engines: up with the load, down without a broken stream, to zero and back,
and what an operator may change while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.stack import Stack, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

ENGINE = {"max-num-seqs": 8, "sim-itl-ms": 20}
MODELS: dict[str, dict[str, Any]] = {
    "steps": {"engine": ENGINE, "scaling": {"min": 1, "max": 3, "target_ongoing": 4, "scale_down_after_s": 1}},
    "zero": {
        "engine": ENGINE,
        "scaling": {"min": 0, "max": 2, "target_ongoing": 4, "scale_down_after_s": 1, "idle_to_zero_s": 2},
    },
    "clock": {
        "engine": ENGINE,
        # From any minute on; until New Year's first one.
        "scaling": {"min": 0, "max": 1, "schedule": [{"start": "* * * * *", "end": "0 0 1 1 *", "min": 1}]},
    },
    "broken": {
        "engine": {**ENGINE, "sim-sins": "never_ready"},
        "scaling": {"min": 0, "max": 1, "idle_to_zero_s": 600},
        "start_timeout_s": 0.5,
    },
}


def model_file(folder: Path, name: str, engine: dict[str, Any], scaling: dict[str, Any], **version: Any) -> None:
    spec = {
        "name": name,
        "versions": [{"version": "a", "engine": {"kind": "simulator", "args": engine}, "scaling": scaling, **version}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, keys in MODELS.items():
        model_file(folder, name, **keys)
    return folder


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("sim") / "state", profile="sim", models=catalog) as running:
        yield running


@pytest.fixture(scope="module")
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def refused(sim: Stack, clients: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request to a model whose engine never starts, sent before everything else: failing takes its time."""
    return clients.submit(sim.chat, "broken", "hello")


def samples(sim: Stack, name: str, **labels: str) -> dict[str, float]:
    """Samples of the merged metrics, by their labels as text."""
    found = {}
    for line in sim.get("/metrics").text.splitlines():
        match = re.fullmatch(rf"{name}{{(.*)}} (\S+)", line)
        if match and all(f'{k}="{v}"' in match[1] for k, v in labels.items()):
            found[match[1]] = float(match[2])
    return found


def ready(sim: Stack, model: str) -> int:
    return int(sum(samples(sim, "steelyard_replicas", model=model, state="READY").values()))


def stream(sim: Stack, model: str, tokens: int) -> tuple[int, bool, int]:
    """Status, whether the stream was complete and clean, and how many events came."""
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{sim.url}/v1/chat/completions", headers=sim.headers, json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    clean = lines[-1:] == ["data: [DONE]"] and not any('"error"' in line for line in lines)
    return answer.status_code, clean, len(lines)


def explained(sim: Stack, model: str) -> dict[str, Any]:
    (version,) = json.loads(sim.cli("scale", "explain", model, "--json").stdout)
    return dict(version)


def engines(sim: Stack) -> dict[str, int]:
    """Replica id -> pid of its engine, of those that are ready. One that goes to zero may end between the two questions."""
    secret, found = {"x-steelyard-secret": sim.secret}, {}
    for replica in json.loads(sim.cli("status", "--json").stdout)["replicas"]:
        if replica["state"] == "READY":
            with contextlib.suppress(httpx.ConnectError):
                found[replica["id"]] = httpx.get(replica["url"] + "/-/door", headers=secret).json()["pid"]
    return found


def titled(sim: Stack, title: bytes) -> list[int]:
    """Pids of Ray's processes by what they call themselves."""
    found = []
    for pid in sim.processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def idle_processes(sim: Stack) -> list[int]:
    return titled(sim, b"ray::IDLE")


def test_a_step_of_load_gets_replicas_and_no_stream_breaks_on_the_way_down(
    sim: Stack, clients: ThreadPoolExecutor
) -> None:
    # Ten seconds each, in three rounds if only one replica were there: the load outlasts the start of the others.
    step = [clients.submit(stream, sim, "steps", 500) for _ in range(24)]
    until(lambda: ready(sim, "steps") == 3, "three replicas serve", 30)
    assert {f.result()[:2] for f in step} == {(200, True)}
    # One on each replica, long enough for two of them to be taken away underneath.
    long = [clients.submit(stream, sim, "steps", 600) for _ in range(3)]
    until(lambda: ready(sim, "steps") == 1, "two of them are told to stop", 30)
    assert not any(f.done() for f in long)
    assert {f.result()[:2] for f in long} == {(200, True)}


def test_the_first_request_after_nothing_wakes_a_replica_and_each_one_around_an_idle_end_is_answered(
    sim: Stack, clients: ThreadPoolExecutor
) -> None:
    until(lambda: ready(sim, "zero") == 0, "nothing serves it", 30)
    until(lambda: idle_processes(sim), "a process waits for the next replica", 30)
    assert sim.chat("zero", "hello", max_tokens=2).status_code == 200
    assert ready(sim, "zero") == 1
    # Which process it got is Ray's choice, while `broken` starts one after the other: test_spare_real.py.
    # Around the moment at which the last replica leaves: some meet it, some its drain, some nothing.
    around = []
    for pause_s in (1.9, 2.1, 2.3):
        time.sleep(pause_s)
        around.append(clients.submit(stream, sim, "zero", 5))
    assert {f.result()[:2] for f in around} == {(200, True)}
    until(lambda: ready(sim, "zero") == 0, "it goes to zero again", 30)


def test_a_killed_directory_moves_nothing_and_scaling_goes_on_when_it_is_back(sim: Stack) -> None:
    before, kept = ready(sim, "steps"), sim.state_dir / "directory.json"
    until(lambda: kept.exists() and "zero@a" in kept.read_text(), "it has written down what it knows", 10)
    told = json.loads(kept.read_text())["changes"]["zero@a"]
    (directory,) = titled(sim, b"ray::Directory")
    os.kill(directory, signal.SIGKILL)
    assert sim.chat("steps", "hello", max_tokens=2).status_code == 200
    assert ready(sim, "steps") == before
    assert sim.chat("zero", "hello", max_tokens=2).status_code == 200  # woken through the new one
    assert told == explained(sim, "zero")["changes"][: len(told)]


def test_a_schedule_keeps_replicas_without_a_request(sim: Stack) -> None:
    until(lambda: ready(sim, "clock") == 1, "the scheduled one serves", 30)
    told = explained(sim, "clock")
    assert told["scaling"]["min"] == 0
    assert told["scaling"]["schedule"][0]["holds_now"] is True
    assert (told["changes"][0]["cause"], told["changes"][0]["after"]) == ("from_zero", 1)
    assert "the schedule keeps 1" in told["changes"][0]["reason"]


def test_bounds_set_at_run_time_hold_over_an_up_until_they_are_reset(sim: Stack, catalog: Path) -> None:
    before = engines(sim)
    said = sim.cli("scale", "set", "steps", "--min", "2").stdout
    assert "steps@a: 2 to 3 replicas (before: 1 to 3)" in said
    until(lambda: ready(sim, "steps") == 2, "the second one serves", 30)
    told = explained(sim, "steps")
    assert (told["scaling"]["min"], told["load"]["ready"]) == (2, 2)
    assert told["changes"][-1]["cause"] == "bounds"

    # Other keys of the file reach the stack, the bounds stay, and no engine is touched.
    keys = MODELS["steps"]
    model_file(catalog, "steps", keys["engine"], {**keys["scaling"], "max": 4, "target_ongoing": 5})
    assert "2 to 3 replicas, set by `steelyard scale set`, not 1 to 4" in sim.cli("up").stdout
    after = engines(sim)
    steps = {i: pid for i, pid in after.items() if i.startswith("steps@")}
    assert {i: pid for i, pid in before.items() if i.startswith("steps@")}.items() <= steps.items()
    assert len(steps) == 2
    assert explained(sim, "steps")["scaling"]["target_ongoing"] == 5

    sim.cli("scale", "reset", "steps@a")
    until(lambda: ready(sim, "steps") == 1, "one is enough again", 30)
    assert (sim.state_dir / "scaling.json").exists() is False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["set", "steps", "--min", "9"], "and min 9; max is at least min"),
        (["set", "nobody", "--min", "1"], "nobody is not served here; there is: broken@a, clock@a, steps@a, zero@a"),
        (["explain", "nobody"], "nobody is not served here"),
    ],
)
def test_nonsense_is_one_line(sim: Stack, arguments: list[str], sentence: str) -> None:
    done = sim.cli("scale", *arguments, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line


def test_decisions_and_starts_are_counted(sim: Stack) -> None:
    ups = samples(sim, "steelyard_scale_decisions_total", model="zero", direction="up", reason="from_zero")
    assert sum(ups.values()) >= 1
    assert sum(samples(sim, "steelyard_cold_starts_total", model="zero").values()) >= 1
    phases = samples(sim, "steelyard_cold_start_seconds_count", model="zero")
    assert {re.search(r'phase="(\w+)"', labels)[1] for labels in phases} == {"spawn", "health", "first_token"}  # type: ignore[index]


def test_a_model_that_does_not_start_refuses_instead_of_hanging(sim: Stack, refused: Future[httpx.Response]) -> None:
    answer = refused.result(timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
    assert "does not start" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    told = explained(sim, "broken")
    assert told["failures"] >= 3 and "not ready within 0.5 s" in told["failure"]
