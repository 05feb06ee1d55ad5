"""A stack under `bench.chaos`: whom a fault can hit, and when the stack has noticed it and is whole again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import psutil
import yaml

from bench import procs
from bench.client import ROOT
from bench.crowd import Crowd
from bench.fleet import Fleet, Metrics
from bench.load import sockets_of, taken
from bench.mix import Ask, Witness
from serving.engine import stats
from serving.engine.door import SECRET_HEADER
from serving.engine.process import ENGINE_MARK
from serving.fleet.endpoint import Endpoint

# What the gateways wrote down of each request, by its id.
Lines = Mapping[str, Mapping[str, Any]]
EVERY = "*"  # as a victim: whoever it was
LOOK_EVERY_S = 0.2
_UP_TIMEOUT_S = 900.0  # more than `up` gives itself, however long streams and starts are
_STILL_S = 1.5  # without a step: one that is busy makes dozens


@dataclass
class Victims:
    """Who was hit: replicas by id, client ports of the gateways' connections. `at`: when, on the monotonic clock.
    `leaves`: a replica or a gateway goes out of the table, which is what detection is. `settle_s`: how long it is to go on
    at least. `wait`: for what goes on beside, before that."""

    replicas: set[str] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)
    at: float = field(default_factory=time.monotonic)
    leaves: bool = True
    stuck_after_s: float = 0.0  # the engine's own limit, of one that is to be seen standing still
    settle_s: float = 2.0
    wait: Callable[[], None] = lambda: None
    back_s: float | None = None  # where nothing leaves: until it was whole again
    check: Callable[[Lines, Sequence[Witness]], str] = lambda lines, answers: ""  # what else is wrong, at the end
    deaths: list[float] = field(default_factory=list)  # of engines, for each poison


@dataclass(frozen=True)
class Scene:
    """The running stack, its model file, and the crowd in front of it. `leavers`: what those ask who will not wait for it;
    `turn`: which time this row is played."""

    fleet: Fleet
    model: dict[str, Any]
    crowd: Crowd
    watch: Watch
    say: Callable[[str], None]
    leavers: Iterator[Ask]
    turn: int
    long_s: float
    saturation_s: float

    @property
    def name(self) -> str:
        return str(self.model["name"])

    @property
    def state_dir(self) -> Path:
        assert self.fleet.side.state_dir is not None
        return self.fleet.side.state_dir

    def engines(self) -> dict[str, int]:
        return engines(self.state_dir, self.name)

    def busiest(self, *but: str) -> tuple[str, int]:
        """The replica with most streams (by /metrics), and its engine's pid."""
        found = self.engines()
        running = self.fleet.metrics().engines("num_requests_running", self.name)
        replica = max((r for r in found if r not in but), key=lambda r: running.get(r, 0.0))
        return replica, found[replica]

    def deaths(self) -> float:
        """Engines whose process ended by itself, ever."""
        return self.fleet.metrics().total(
            "steelyard_replica_faults_total", model=self.name, state="FAILED", cause="process"
        )

    def actor(self, engine: int) -> int:
        """The pid of the replica that supervises this engine."""
        return psutil.Process(engine).ppid()

    def processes(self, title: str) -> set[int]:
        """The stack's processes with this in their title."""
        return {p.pid for p in self.fleet.side.processes() if title in procs.title(p)}

    def process(self, title: str) -> int:
        """The only one of them."""
        found = self.processes(title)
        if len(found) != 1:
            raise procs.StartFailed(f"{len(found)} processes are called {title}, not one")
        return found.pop()

    def core(self, engine: int) -> int:
        """Where this engine computes: vLLM's core, or the simulator's one process."""
        below = psutil.Process(engine).children(recursive=True)
        return next((p.pid for p in below if "EngineCore" in procs.title(p)), engine)

    def ports_of(self, gateway: int) -> set[int]:
        """Client ports of the connections that a gateway holds."""
        sockets = sockets_of((gateway,))
        port = int(self.fleet.side.base_url.rpartition(":")[2])
        return {client for client, inode in taken(port).items() if inode in sockets}

    def sin(self, url: str, *names: str, after: int) -> float:
        """Turn the simulated engine there bad; when, on the monotonic clock."""
        body = json.dumps({"names": names, "after": after}).encode()
        at = time.monotonic()
        self._ask(url + "/-/sins", body)
        return at

    def last_step(self, url: str) -> float:
        """When the engine there, which is about to stand still, has made its last step, by its own counters, on the monotonic
        clock: a simulated one that is told to obeys at its next request."""
        at, mark = time.monotonic(), None
        while time.monotonic() < at + _STILL_S:
            asked = time.monotonic()
            found = stats.vitals(self._ask(url + stats.VITALS_PATH))
            if found is None:
                raise procs.StartFailed(f"{url} says nothing of its steps")
            if found.mark != mark:
                at, mark = asked, found.mark
            time.sleep(0.1)  # an engine tells its steps when asked, and not by itself
        return at

    def endpoints(self) -> dict[str, Endpoint]:
        """Replicas as the directory knows them. Takes a second or two, so it is asked before a victim is chosen."""
        return {r["id"]: msgspec.convert(r, Endpoint) for r in self.status()["replicas"]}

    def _ask(self, url: str, body: bytes | None = None) -> str:
        """An engine, past its door."""
        secret = (self.state_dir / "cluster-secret").read_text().strip()
        headers = {SECRET_HEADER.decode(): secret, "content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as response:
            return str(response.read().decode())

    def up(self, model: dict[str, Any] | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """`steelyard up` with another model file, or other settings; its own one again without any."""
        return up(self.fleet, model or self.model, **settings)

    def status(self) -> dict[str, Any]:
        done = _cli(self.fleet, "status", "--json")
        if done.returncode:
            raise procs.StartFailed(done.stderr.strip())
        return dict(json.loads(done.stdout))


class Watch:
    """Looks all the time at how many replicas a gateway has in its table, and how many gateways there are: a context
    manager with a thread of its own."""

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._fleet, self._model = fleet, model
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.seen: list[tuple[float, int, int]] = []  # when, replicas READY, gateways

    def now(self) -> str:
        _, replicas, gateways = self.seen[-1] if self.seen else (0.0, 0, 0)
        return f"{replicas} replicas, {gateways} gateways"

    def first(self, since: float, holds: Callable[[int, int], bool]) -> float | None:
        """Seconds from `since` until this was first seen."""
        return next(
            (at - since for at, replicas, gateways in self.seen if at >= since and holds(replicas, gateways)), None
        )

    def until(self, replicas: int, gateways: int, within_s: float) -> bool:
        """Waits for as many READY replicas and gateways, twice in a row; whether they came."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if len(self.seen) > 1 and all(found[1:] == (replicas, gateways) for found in self.seen[-2:]):
                return True
            time.sleep(LOOK_EVERY_S)
        return False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        gateways: list[str] = []
        while not self._ending.wait(LOOK_EVERY_S):
            with contextlib.suppress(OSError, ValueError):
                listed = json.loads(self._get("/metrics/targets"))
                gateways = sorted(t["labels"]["instance"] for t in listed if t["labels"]["component"] == "gateway")
            for gateway in gateways:  # the first that answers: one may be the victim
                with contextlib.suppress(OSError):
                    metrics = Metrics(self._get(f"/metrics?source={quote(gateway)}"))
                    ready = metrics.total("steelyard_replicas", model=self._model, state="READY")
                    self.seen.append((time.monotonic(), int(ready), len(gateways)))
                    break

    def _get(self, path: str) -> str:
        request = urllib.request.Request(self._fleet.side.base_url + path, headers=self._fleet.side.headers)
        with urllib.request.urlopen(request, timeout=2) as response:
            return str(response.read().decode())


def up(fleet: Fleet, model: dict[str, Any], **settings: str) -> subprocess.CompletedProcess[str]:
    """`steelyard up` with this model file."""
    file = Path(fleet.side.service.env["STEELYARD_MODELS"]) / f"{model['name']}.yaml"
    file.write_text(yaml.safe_dump(model, sort_keys=False))
    return _cli(fleet, "up", **settings)


def _cli(fleet: Fleet, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "serving.cli.main", *args]
    env = fleet.side.service.env | settings
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=_UP_TIMEOUT_S)


def engines(state_dir: Path, model: str) -> dict[str, int]:
    """Replica id -> pid of its engine's first process, by the marks that processes carry."""
    mark = f"{ENGINE_MARK}={state_dir}:{model}@"
    found: dict[str, int] = {}
    for pid, environ in _environs():
        for part in environ.split("\0"):
            if part.startswith(mark):
                replica = part.removeprefix(f"{ENGINE_MARK}={state_dir}:")
                found[replica] = min(pid, found.get(replica, pid))
    return found


def _environs() -> Iterator[tuple[int, str]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), Path(entry.path, "environ").read_text(errors="replace")


def logged(state_dir: Path) -> dict[str, dict[str, Any]]:
    """The gateways' lines about requests, by request id."""
    found: dict[str, dict[str, Any]] = {}
    for file in (state_dir / "logs").glob("requests-*.jsonl*"):
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                read = json.loads(line)
                if str(read.get("request_id", "")).startswith("chaos-"):
                    found[read["request_id"]] = read
    return found
