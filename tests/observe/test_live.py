"""A real Prometheus on a running stack under load, started as a person would: `make observe`. Every query of every dashboard,
rule and alert is asked, and every panel has data; the GPUs are scripted ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.observe.test_rules import ALERTS, LOADED, RULES, panels
from tests.stack import ROOT, Stack, free_port, until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,  # test_walk.py asks the same without Ray in every run
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

ENGINE = {"max-num-seqs": 4, "sim-itl-ms": 10, "sim-ttft-ms": 5}
STEADY = {
    "name": "steady",
    "versions": [
        {
            "version": "a",
            "engine": {"kind": "simulator", "args": ENGINE},
            "scaling": {"min": 1, "max": 3, "target_ongoing": 3, "scale_down_after_s": 600},
            "resources": {"gpus": 1},
            "adapters": [{"name": "steady-fr", "source": "adapters/fr"}],
        }
    ],
    "limits": {"max_queue": 8, "max_wait_s": 5},
}
CLIENTS = 24


@dataclass
class Prometheus:
    url: str

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """Result of an instant query; fails when it does not evaluate."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", f"{expr}: {answer}"
        return list(answer["data"]["result"])

    def get(self, what: str) -> Any:
        return httpx.get(f"{self.url}/api/v1/{what}", timeout=30).json()["data"]

    def firing(self) -> dict[str, dict[str, str]]:
        """Alert name -> annotations."""
        found = self.get("alerts")["alerts"]
        return {a["labels"]["alertname"]: a["annotations"] for a in found if a["state"] == "firing"}


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    models = catalog(tmp_path_factory.mktemp("models"))
    with with_gpus(tmp_path_factory.mktemp("sim") / "state", models) as running:
        yield running


@contextlib.contextmanager
def with_gpus(state: Path, models: Path) -> Iterator[Stack]:
    running = Stack(state, profile="sim", models=models)
    running.env["STEELYARD_NVML_SCRIPT"] = "h200x8"
    try:
        yield running.start()
    finally:
        running.stop()


def catalog(folder: Path) -> Path:
    (folder / "adapters" / "fr").mkdir(parents=True)
    (folder / "steady.yaml").write_text(yaml.safe_dump(STEADY))
    return folder


@pytest.fixture(scope="module")
def prometheus(sim: Stack) -> Iterator[Prometheus]:
    with observed(sim) as running:
        yield running


@contextlib.contextmanager
def observed(sim: Stack) -> Iterator[Prometheus]:
    """What `make observe` starts; ended as by Ctrl-C."""
    port = free_port()
    command = [sys.executable, "-m", "tools.observe", "--port", str(port), "--interval", "1s"]
    with open(sim.state_dir.parent / "observe.log", "wb") as out:
        main = subprocess.Popen(command, env=sim.env, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        said = Path(out.name)
        until(lambda: "Ctrl-C" in said.read_text() or main.poll() is not None, "observe is ready", 60)
        assert f"Prometheus  http://127.0.0.1:{port}" in said.read_text(), said.read_text()
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        main.send_signal(signal.SIGINT)
        assert main.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/-/ready")


@contextlib.contextmanager
def load(sim: Stack) -> Iterator[None]:
    """Clients of all sorts until the end of the block: good ones, ones that leave, ones that ask nonsense. More than there
    is room for, so that some are refused."""
    ended = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=sim.url, headers=sim.headers, timeout=60) as http:
            while not ended.is_set():
                name = "steady-fr" if number % 3 == 0 else "steady"
                body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
                with contextlib.suppress(httpx.HTTPError):  # an engine is killed underneath
                    if number % 6 == 0:
                        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
                            next(answer.iter_bytes(), None)
                    else:
                        body |= {"stream": number % 2 == 0} | ({"max_tokens": -1} if number == 1 else {})
                        http.post("/v1/chat/completions", json=body)
                ended.wait(0.05)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def ready(sim: Stack) -> list[dict[str, Any]]:
    return [r for r in json.loads(sim.cli("status", "--json").stdout)["replicas"] if r["state"] == "READY"]


@pytest.fixture(scope="module")
def eventful(sim: Stack, prometheus: Prometheus) -> Iterator[Prometheus]:
    """Under load, after replicas were added and one of their engines was killed."""
    sim.cli("keys", "create", "--name", "short", "--scope", "metrics", "--expires", "2d")
    with load(sim):
        up = 'count(up{job="steelyard",component="engine"} == 1) >= 2'
        until(lambda: prometheus.ask(up), "a second replica is scraped", 60)
        victim = ready(sim)[0]
        door = httpx.get(victim["url"] + "/-/door", headers={"x-steelyard-secret": sim.secret}).json()
        os.kill(door["pid"], signal.SIGKILL)
        died = 'steelyard_replica_faults_total{state="FAILED",cause="process"} > 0'
        until(lambda: prometheus.ask(died), "its death is counted", 60)
        yield prometheus


def filled(expr: str) -> str:
    """A panel's query with the values that Grafana would put in."""
    for name, value in (("__rate_interval", "10s"), ("job", "steelyard"), ("price", "3.00")):
        expr = expr.replace(f"${name}", value)
    return re.sub(r"\$\w+", ".*", expr)


@pytest.mark.parametrize("name", LOADED)
def test_every_panel_has_data(name: str, eventful: Prometheus) -> None:
    for panel in panels(LOADED[name]):
        queries = [filled(t["expr"]) for t in panel["targets"]]
        until(lambda q=queries: any(eventful.ask(e) for e in q), f"data for {panel['title']}: {queries}", 30)  # type: ignore[misc]
    for variable in LOADED[name]["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", filled(variable["definition"]))
            assert found and any(found[2] in r["metric"] for r in eventful.ask(found[1])), variable["name"]


def test_every_rule_and_alert_evaluates(eventful: Prometheus) -> None:
    for group in (*RULES["recording"], *RULES["alerts"]):
        for rule in group["rules"]:
            eventful.ask(rule["expr"])
    found = [rule for group in eventful.get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == sum(len(g["rules"]) for groups in RULES.values() for g in groups)
    assert [r for r in found if r.get("lastError")] == []


def test_what_is_true_fires_and_its_words_are_filled_in(eventful: Prometheus) -> None:
    until(lambda: "SteelyardKeyExpires" in eventful.firing(), "an expiring key is told of")
    firing = eventful.firing()
    assert re.search(r"key [0-9a-f]{8} expires in 1d 23h", firing["SteelyardKeyExpires"]["summary"])
    assert firing.keys() <= ALERTS.keys() and "<error" not in json.dumps(firing)


def test_every_process_is_a_target_that_is_up(sim: Stack, eventful: Prometheus) -> None:
    down = 'up{job="steelyard"} == 0'
    until(lambda: not eventful.ask(down), "the killed engine's target is gone", 30)
    components = {r["metric"]["component"] for r in eventful.ask('up{job="steelyard"} == 1')}
    assert components == {"gateway", "engine", "directory", "gpu"}
    assert {r["metric"]["replica"] for r in eventful.ask("vllm:num_requests_running")} >= {r["id"] for r in ready(sim)}
    labels = eventful.ask("vllm:num_requests_running")[0]["metric"]
    assert {"model", "version", "replica", "node"} <= labels.keys()


def test_no_ready_replica_fires_for_real(tmp_path: Path) -> None:
    """A version that must be up is added, and its engine never gets ready."""
    models = catalog(tmp_path / "models")
    never = {
        "name": "never",
        "versions": [
            {"version": "a", "engine": {"kind": "simulator", "args": {"sim-sins": "never_ready"}}, "start_timeout_s": 5}
        ],
    }
    with with_gpus(tmp_path / "state", models) as sim, observed(sim) as prometheus:
        (models / "never.yaml").write_text(yaml.safe_dump(never))
        up = subprocess.Popen(
            [sys.executable, "-m", "serving.cli.main", "up"], env=sim.env, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        try:
            began = time.monotonic()
            until(lambda: "SteelyardNoReadyReplica" in prometheus.firing(), "the alert fires", 180)
            assert time.monotonic() - began >= 60
            assert prometheus.firing()["SteelyardNoReadyReplica"]["summary"] == "never@a has no ready replica"
            assert "SteelyardDown" not in prometheus.firing()
        finally:
            up.kill()
            up.wait()
