"""A real Prometheus in front of a gateway with engines under load, a directory and scripted GPUs, without Ray: every query of
every dashboard, rule and alert evaluates, and has data. `test_live.py` does the same on a whole stack."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from serving.fleet import gpu_exporter
from serving.fleet.endpoint import Target
from serving.telemetry.gpu import GpuTelemetry, Holder
from serving.telemetry.metrics import DirectoryMetrics, set_all
from serving.telemetry.nvml_scripted import Event, Script, ScriptedNvml
from tests.gateway import harness
from tests.gateway.harness import SECRET, EngineRoom, Front, Keys, chat
from tests.observe.test_live import filled
from tests.observe.test_rules import LOADED, RULES, panels
from tests.stack import free_port
from tools import observe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

CLIENTS = 24
WALK_S = 120.0
# What does not happen here: (panel, legend of the query, which is the title where it has none).
WITHOUT_DATA = {
    ("Error budget burn", "{{model}} 3d"),  # recorded every two minutes
    ("Retries", "{{outcome}}"),
    ("Streams that broke", "{{model}}"),
    ("Processes without metrics", "Processes without metrics"),
}


def directory() -> DirectoryMetrics:
    """What a directory counts that has seen one start, one decision, and replicas that failed."""
    metrics = DirectoryMetrics(CollectorRegistry())
    metrics.seen("tiny", "v1")
    metrics.started("tiny", "v1", {"spawn": 0.1, "health": 1.0, "first_token": 0.2})
    metrics.scale_decisions.labels("tiny", "v1", "up", "load").inc()
    set_all(metrics.health, {("tiny", "v1", "tiny@v1#a", "n1"): 1.0})
    metrics.troubled("tiny", "v1", "SUSPECT", "silent")
    metrics.troubled("tiny", "v1", "FAILED", "silent")
    set_all(metrics.quarantined, {("tiny", "v1", "n2"): 10.0})
    return metrics


async def client(front: Front, number: int) -> None:
    """Asks until it is cancelled; one of them nonsense. There are more than places, so that some are refused."""
    while True:
        body = chat(model="pirate" if number % 3 == 0 else "tiny", max_tokens=20, stream=number % 2 == 0)
        await front.ask(body=body | ({"max_tokens": -1} if number == 1 else {}))
        await asyncio.sleep(0.05)


async def spend(gpus: GpuTelemetry) -> None:
    """The exporter's rounds: one GPU works for tiny@v1, the other one is reserved and idle."""
    while True:
        busy = Holder(replica="a", model="tiny", version="v1", gpus=("0",), starting=False, running=1)
        idle = Holder(replica="b", model="tiny", version="v1", gpus=("1",), starting=False, running=0)
        gpus.hold([busy, idle])
        await asyncio.to_thread(gpus.round)
        await asyncio.sleep(0.3)


async def test_every_query_evaluates_and_has_data(tmp_path: Path) -> None:
    keys, room = Keys.make(tmp_path / "keys.json"), EngineRoom(tmp_path)
    # An increase shows only between two scrapes.
    faults = tuple(Event(at=s, gpu=0, xid=74) for s in range(1, int(WALK_S), 4))
    gpus = GpuTelemetry(ScriptedNvml(Script(gpus=2, events=faults), time.monotonic))
    known = directory()

    async def told() -> str:
        return known.text()

    async with contextlib.AsyncExitStack() as stack:
        stack.callback(room.close)
        front = await stack.enter_async_context(harness.front(keys, tmp_path / "logs"))
        url, exporter = await gpu_exporter.listen("127.0.0.1", SECRET, gpus.text)
        stack.push_async_callback(exporter.cleanup)
        front.gateway.sources["directory"] = told
        front.serve(room.start(slots=4), room.start(slots=4), limits={"max_queue": 8, "max_wait_s": 2})
        front.gateway.fleet.announced = (Target(id="gpu#n1", component="gpu", url=url, node="n1"),)
        async with asyncio.TaskGroup() as work:
            tasks = [work.create_task(client(front, n)) for n in range(CLIENTS)] + [work.create_task(spend(gpus))]
            with prometheus(front, tmp_path) as at:
                await asyncio.to_thread(walk, at)
            for task in tasks:
                task.cancel()
        await front.rest()


@contextlib.contextmanager
def prometheus(front: Front, folder: Path) -> Iterator[str]:
    (folder / "key").write_text(front.keys.metrics)
    (folder / "prometheus.yml").write_text(observe.configuration(front.url, folder / "key", "1s"))
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(observe.FOLDER / name, folder)
    port = free_port()
    argv = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with open(folder / "prometheus.log", "wb") as log:
        child = subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        child.terminate()
        child.wait(20)


def without_zero(expr: str) -> str:
    """What a panel asks before it shows a zero instead of nothing."""
    found = re.fullmatch(r"\((.*)\) or vector\(0\)", expr)
    return found[1] if found else expr


def walk(api: str) -> None:
    """Waits for each query's data; what lacks it at the end is named."""
    wanted = {
        (name, panel["title"], target["legendFormat"]): without_zero(filled(target["expr"]))
        for name, dashboard in LOADED.items()
        for panel in panels(dashboard)
        for target in panel["targets"]
        if (panel["title"], target["legendFormat"]) not in WITHOUT_DATA
    }
    for name, dashboard in LOADED.items():
        for variable in dashboard["templating"]["list"]:
            if found := re.fullmatch(r"label_values\((.*), (\w+)\)", filled(variable.get("definition", ""))):
                wanted[name, f"${variable['name']}", ""] = (
                    f"count by ({found[2]}) ({found[1]}) and on ({found[2]}) {found[1]}"
                )
    deadline = time.monotonic() + WALK_S
    with httpx.Client(timeout=30) as http:

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return http.get(f"{api.removesuffix('/api/v1')}/-/ready").is_success
            return False

        def ask(expr: str) -> list[object]:
            answer = http.get(f"{api}/query", params={"query": expr}).json()
            assert answer["status"] == "success", f"{expr}: {answer}"
            return list(answer["data"]["result"])

        def unhealthy() -> list[object]:
            """Rules that cannot be evaluated, and targets that are not up: one scrape may be late on a busy machine."""
            rules = [rule for group in http.get(f"{api}/rules").json()["data"]["groups"] for rule in group["rules"]]
            assert len(rules) == sum(len(g["rules"]) for groups in RULES.values() for g in groups)
            targets = http.get(f"{api}/targets").json()["data"]["activeTargets"]
            up = {t["labels"]["component"] for t in targets if t["health"] == "up"}
            return (
                [r for r in rules if r.get("lastError")]
                + [t for t in targets if t["health"] != "up"]
                + [f"no target of {c}" for c in {"gateway", "engine", "directory", "gpu"} ^ up]
            )

        wrong: list[object] = ["Prometheus did not become ready"]
        while (wanted or wrong) and time.monotonic() < deadline:
            time.sleep(0.5)
            if ready():
                wanted = {key: query for key, query in wanted.items() if not ask(query)}
                wrong = unhealthy()
        assert not wanted
        assert not wrong
        for group in (*RULES["recording"], *RULES["alerts"]):
            for rule in group["rules"]:
                ask(rule["expr"])
