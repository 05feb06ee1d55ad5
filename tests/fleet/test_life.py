"""A stack's life on simulated engines: start, change, drain, stop, and every way of dying."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.stack import Stack, free_port, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def model_file(folder: Path, name: str, versions: dict[str, dict[str, object]], **more: object) -> None:
    """A simulated model; `versions` maps a version to its engine arguments."""
    spec = {
        "name": name,
        "versions": [{"version": v, "engine": {"kind": "simulator", "args": args}} for v, args in versions.items()],
        "release": {"stable": next(iter(versions))},
        **more,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model_file(folder, "one", {"a": {"max-num-seqs": 8}})
    model_file(folder, "two", {"a": {"max-num-seqs": 8}})
    return folder


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("sim") / "state", profile="sim", models=catalog) as running:
        yield running


def engine_pids(sim: Stack) -> dict[str, int]:
    """Version id -> pid of its engine, as its door states it."""
    replicas = json.loads(sim.cli("status", "--json").stdout)["replicas"]
    secret = {"x-steelyard-secret": sim.secret}
    return {
        f"{r['model']}@{r['version']}": httpx.get(r["url"] + "/-/door", headers=secret).json()["pid"]
        for r in replicas
        if r["state"] == "READY"
    }


def test_models_serve_side_by_side(sim: Stack) -> None:
    assert sim.chat("one", "hello").status_code == 200
    assert sim.chat("two", "hello").status_code == 200
    assert sim.get("/readyz").status_code == 200


def test_a_gateway_preempts_no_engine(sim: Stack) -> None:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in sim.processes()}
    gateways = [pid for pid, title in titles.items() if b"ServeReplica:gateway" in title]
    assert gateways
    for pid in gateways:
        threads = [int(t) for t in os.listdir(f"/proc/{pid}/task")]
        assert os.SCHED_BATCH in {os.sched_getscheduler(t) for t in threads}


def test_up_again_touches_only_what_changed(sim: Stack, catalog: Path) -> None:
    before = engine_pids(sim)
    gateway = json.loads(sim.cli("status", "--json").stdout)["gateways"][0]["id"]
    model_file(catalog, "two", {"a": {"max-num-seqs": 4}})  # other engine arguments: this one rolls
    model_file(catalog, "three", {"a": {}})
    model_file(catalog, "one", {"a": {"max-num-seqs": 8}}, limits={"max_queue": 7})  # a limit rolls nothing
    sim.cli("up")
    after = engine_pids(sim)
    assert after["one@a"] == before["one@a"]
    assert after["two@a"] != before["two@a"]
    assert json.loads(sim.cli("status", "--json").stdout)["gateways"][0]["id"] == gateway
    assert sim.chat("three", "hello").status_code == 200

    (catalog / "three.yaml").unlink()
    sim.cli("up")
    assert sim.chat("three", "hello").status_code == 404
    assert engine_pids(sim)["one@a"] == before["one@a"]


def test_a_bad_file_changes_nothing(sim: Stack, catalog: Path) -> None:
    before = engine_pids(sim)
    bad = catalog / "bad.yaml"
    bad.write_text("name: bad\nversions:\n  - version: a\n    weigths: {source: /nowhere}\n")
    done = sim.cli("up", check=False)
    bad.unlink()
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "bad.yaml:4" in done.stderr
    assert engine_pids(sim) == before


def test_a_revoked_key_is_refused_without_a_restart(sim: Stack) -> None:
    made = json.loads(sim.cli("keys", "create", "--name", "t", "--scope", "infer:one", "--json").stdout)
    headers = {"authorization": f"Bearer {made['token']}"}
    ask = {"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    status = lambda: httpx.post(f"{sim.url}/v1/chat/completions", headers=headers, json=ask).status_code  # noqa: E731
    until(lambda: status() == 200, "the new key works", 10)
    sim.cli("keys", "revoke", made["id"])
    until(lambda: status() == 401, "the revoked key is refused", 10)


def test_a_killed_engine_is_replaced_and_requests_wait_for_it(sim: Stack) -> None:
    before = engine_pids(sim)["one@a"]
    os.kill(before, signal.SIGKILL)
    assert sim.chat("one", "hello", max_tokens=2).status_code == 200
    assert engine_pids(sim)["one@a"] != before


def test_a_stream_outlives_the_update_of_its_version(sim: Stack, catalog: Path) -> None:
    """The old replica drains: the stream that runs there is complete, though its engine is replaced meanwhile. And the new
    one is ready before the old one leaves: there is no moment without."""
    model_file(catalog, "two", {"a": {"max-num-seqs": 4, "sim-itl-ms": 40}})
    sim.cli("up")
    before = engine_pids(sim)["two@a"]
    body = {"model": "two", "messages": [{"role": "user", "content": "x"}], "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{sim.url}/v1/chat/completions", headers=sim.headers, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        model_file(catalog, "two", {"a": {"max-num-seqs": 5, "sim-itl-ms": 40}})
        update = threading.Thread(target=sim.cli, args=("up",))
        update.start()
        missed = []
        while update.is_alive():
            if (asked := sim.get("/readyz")).status_code != 200:
                missed.append(asked.text)
            update.join(0.05)
        assert not missed
        rest = list(lines)
    assert (first.startswith("data: ") and rest[-2:] == ["data: [DONE]", ""]) or "data: [DONE]" in rest
    assert engine_pids(sim)["two@a"] != before


@pytest.mark.parametrize("how", ["ctrl-c", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(tmp_path: Path, catalog: Path, how: str) -> None:
    running = Stack(tmp_path / "state", profile="sim", models=catalog)
    try:
        running.start()
        assert running.main is not None
        assert len(running.processes()) > 5
        if how == "ctrl-c":  # the terminal signals the whole foreground group
            os.killpg(running.main.pid, signal.SIGINT)
        else:
            running.main.send_signal(signal.Signals[how])
        until(lambda: not running.processes() and running.main.poll() is not None, "everything is gone", 15)
    finally:
        running.stop()


def test_after_a_kill_the_next_up_works(tmp_path: Path, catalog: Path) -> None:
    state = tmp_path / "state"
    first = Stack(state, profile="sim", models=catalog).start()
    assert first.main is not None
    first.main.kill()
    first.main.wait()
    with stack(state, profile="sim", models=catalog, port=first.port) as second:
        assert second.chat("one", "hello").status_code == 200


def test_detached_up_returns_when_ready_and_down_ends_it(tmp_path: Path, catalog: Path) -> None:
    running = Stack(tmp_path / "state", profile="sim", models=catalog)
    try:
        running.cli("up", "--detach")
        assert running.get("/readyz").status_code == 200
    finally:
        running.cli("down")
    assert not running.processes()


def fails_at_start(running: Stack) -> str:
    """Spawns it, waits for its end; its one error line."""
    running.spawn()
    assert running.main is not None
    main = running.main
    try:
        until(lambda: main.poll() is not None, "it ends by itself", 120)
        assert main.returncode not in (0, None)
        assert not running.processes()
        errors = [line for line in running.output().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in running.output(), running.output()
        return errors[0]
    finally:
        running.stop()


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, catalog: Path) -> None:
    import socket

    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        assert f"port {port}" in fails_at_start(Stack(tmp_path / "state", profile="sim", models=catalog, port=port))


def test_an_engine_that_cannot_start_ends_up_with_its_reason(tmp_path: Path) -> None:
    model_file(tmp_path / "models", "broken", {"a": {"max-num-seqs": "many"}})
    told = fails_at_start(Stack(tmp_path / "state", profile="sim", models=tmp_path / "models", port=free_port()))
    assert "broken@a" in told and "max-num-seqs" in told


def test_half_written_weights_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "models" / "w"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "tokenizer.json").write_text("{}")
    header = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    (weights / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 7)
    text = "name: half\nversions:\n  - version: a\n    weights: {source: w}\n"
    (tmp_path / "models" / "half.yaml").write_text(text)
    told = fails_at_start(Stack(tmp_path / "state", profile="cpu", models=tmp_path / "models"))
    assert "model.safetensors" in told
