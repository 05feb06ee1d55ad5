"""Scripted GPUs under a real stack: Ray assigns them, replicas hold them, one exporter shows them, and it lives as Ray does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serving.fleet.gpu_exporter import EVERY_S
from serving.telemetry.gpu import GpuTelemetry, Holder
from serving.telemetry.nvml import from_settings
from tests.cluster import CATALOG, Cluster, cluster
from tests.hosts import missing
from tests.stack import ROOT, Stack, until

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(300)]

ENGINE = {"kind": "simulator", "args": {"max-num-seqs": 8, "sim-itl-ms": 50}}
GPUS = {"alpha": (2, 2), "beta": (0.5, 1)}  # model -> GPUs of a replica, replicas


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    for name, (gpus, count) in GPUS.items():
        version = {
            "version": "a",
            "engine": ENGINE,
            "resources": {"gpus": gpus},
            "scaling": {"min": count, "max": count},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "versions": [version]}))
    running = Stack(tmp_path_factory.mktemp("sim") / "state", profile="sim", models=folder)
    running.env["STEELYARD_NVML_SCRIPT"] = "h200x8"
    try:
        yield running.start()
    finally:
        running.stop()


Series = list[tuple[dict[str, str], float]]


def series(sim: Stack, name: str) -> Series:
    return scraped(sim.url, sim.key, name)


def scraped(url: str, key: str, name: str) -> Series:
    page = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=30).text
    found = (s for f in text_string_to_metric_families(page) for s in f.samples)
    return [(s.labels, s.value) for s in found if s.name == name]


def held(sim: Stack) -> list[str]:
    return sorted(labels["model"] for labels, _ in series(sim, "steelyard_gpu_up"))


def exporters(sim: Stack) -> list[psutil.Process]:
    found = (psutil.Process(pid) for pid in sim.processes() if psutil.pid_exists(pid))
    return [p for p in found if p.name().startswith("ray::GpuExporte")]


def test_each_gpu_shows_the_replica_that_ray_gave_it_to(sim: Stack) -> None:
    until(lambda: held(sim) == ["", "", "", "alpha", "alpha", "alpha", "alpha", "beta"], "every GPU has its holder")
    by_replica: dict[str, set[str]] = {}
    for labels, _ in series(sim, "steelyard_gpu_up"):
        by_replica.setdefault(labels["replica"], set()).add(labels["gpu"])
    assert sorted(len(gpus) for replica, gpus in by_replica.items() if replica) == [1, 2, 2]
    [(labels, up)] = series(sim, "steelyard_gpu_driver_up")
    assert (up, labels["component"]) == (1, "gpu")


def test_requests_make_their_gpus_busy_and_the_others_stay_idle(sim: Stack) -> None:
    def seconds(model: str, state: str) -> float:
        found = series(sim, "steelyard_gpu_seconds_total")
        return sum(v for labels, v in found if (labels["model"], labels["state"]) == (model, state))

    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(sim.chat, "alpha", "hello", max_tokens=200) for _ in range(8)]
        until(lambda: seconds("alpha", "busy") > 0, "time was spent on requests")
        for done in asked:
            done.result()
    assert seconds("beta", "busy") == 0 and seconds("beta", "idle") > 0 and seconds("", "free") > 0
    parts = sum(seconds("alpha", state) for state in ("loading", "idle", "busy"))
    assert parts == pytest.approx(seconds("alpha", "reserved"), rel=0.2)  # of two scrapes


def test_its_port_stands_in_the_security_page_and_answers_nobody_without_the_secret(sim: Stack) -> None:
    table = (ROOT / "docs" / "security.md").read_text().partition("## Several nodes")[0]
    [where] = re.findall(r"^\| `ray::GpuExporte[^`]*` \| `([^`]+)` \|", table, re.M)
    [exporter] = exporters(sim)
    out = subprocess.run(["ss", "-lntpH"], capture_output=True, text=True, check=True).stdout
    addresses = [line.split()[3] for line in out.splitlines() if f"pid={exporter.pid}," in line]
    [ours] = [a for a in addresses if re.fullmatch(where, a)]
    assert httpx.get(f"http://{ours}/metrics").status_code == 401


def test_it_costs_next_to_nothing(sim: Stack) -> None:
    """With what Ray's own threads take in any actor, which is most of it; a busy machine counts more."""
    [exporter] = exporters(sim)
    before, began = sum(exporter.cpu_times()[:2]), time.monotonic()
    until(lambda: time.monotonic() - began > 20, "some rounds pass")
    share = (sum(exporter.cpu_times()[:2]) - before) / (time.monotonic() - began)
    print(f"the exporter takes {share:.2%} of a core and {exporter.memory_full_info().pss / 2**20:.0f} MiB PSS")
    assert share < 0.02


def test_what_it_does_itself_is_below_one_percent_of_a_core() -> None:
    """A round each two seconds and a scrape each second, of eight GPUs that all work; without Ray's threads."""
    telemetry = GpuTelemetry(from_settings("h200x8"))
    held_by = [
        Holder(replica=f"r{i}", model="m", version="v", gpus=(str(i),), starting=False, running=1) for i in range(8)
    ]
    rounds, scrapes = [], []
    for _ in range(40):
        began = time.process_time()
        telemetry.round()
        telemetry.hold(held_by)
        telemetry.busy()
        rounds.append(time.process_time() - began)
        telemetry.text()
        scrapes.append(time.process_time() - began - rounds[-1])
        time.sleep(0.02)  # NVML's figures are of the time between two samples
    share = median(rounds) / EVERY_S + median(scrapes)
    print(f"a round takes {median(rounds):.2%} of a second, a scrape {median(scrapes):.2%}: {share:.2%} of a core")
    assert share < 0.01


def test_a_killed_exporter_comes_back(sim: Stack) -> None:
    [before] = exporters(sim)
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: [p.pid for p in exporters(sim)] not in ([], [before.pid]), "another process")
    until(lambda: held(sim).count("alpha") == 4, "its GPUs are shown again")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """A head without GPUs, and a worker with eight."""
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path) as made:
        worker = made.add()
        for node in made.nodes:
            node.env["STEELYARD_NVML_SCRIPT"] = "h200x8"
        worker.start()
        until(worker.up, "the worker is up", 60)
        catalog = made.head.host.inside(CATALOG)
        catalog.mkdir(parents=True)
        version = {"version": "a", "engine": ENGINE, "resources": {"gpus": 2}, "drain_s": 1}
        (catalog / "alpha.yaml").write_text(yaml.safe_dump({"name": "alpha", "versions": [version]}))
        made.head.cli("up")
        yield made


def test_a_leaving_node_does_not_wait_for_its_exporter(nodes: Cluster) -> None:
    worker, key = nodes.workers[0], nodes.key

    def shown() -> list[tuple[str, str]]:
        return [(own["node"], own["model"]) for own, _ in scraped(nodes.head.url, key, "steelyard_gpu_up")]

    address = worker.host.address
    until(lambda: sorted(shown()) == [(address, "")] * 6 + [(address, "alpha")] * 2, "the worker's GPUs are shown", 30)
    assert worker.main is not None
    began = time.monotonic()
    worker.main.signal(signal.SIGTERM)
    assert worker.main.wait(60) == 0
    assert time.monotonic() - began < float(worker.env["STEELYARD_NODE_DRAIN_S"]) - 4  # its bound is what it would wait
    until(lambda: not shown(), "a node that is gone shows no GPU", 30)
