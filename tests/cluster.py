"""A cluster on hosts of its own (`tests/hosts.py`), started as units start it: `steelyard node head` and `... worker`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.hosts import Host, Network, Process, network
from tests.stack import ROOT, until

STATE = Path("/var/lib/steelyard")
CATALOG = Path("/etc/steelyard/models")
PORT = 8000


class Node:
    """One host as a node."""

    def __init__(self, cluster: Cluster, host: Host, role: str) -> None:
        self.cluster = cluster
        self.host = host
        self.role = role
        self.main: Process | None = None
        self.logs = cluster.folder / f"{host.name}.log"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")},
            "PYTHONPATH": str(ROOT),
            "STEELYARD_STATE_DIR": str(STATE),
            "STEELYARD_CACHE_DIR": "/var/cache/steelyard",
            "STEELYARD_MODELS": str(CATALOG),
            "STEELYARD_NODE_ADDRESS": host.address,
            "STEELYARD_PROFILE": cluster.profile,
            "STEELYARD_NODE_DRAIN_S": "20",
        }
        if role == "worker":
            self.env["STEELYARD_HEAD"] = f"{cluster.head.host.address}:6379"

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{PORT}"

    def start(self) -> Node:
        command = [sys.executable, "-m", "serving.cli.main", "node", self.role]
        self.main = self.host.start(command, env=self.env, cwd=ROOT, log=self.logs)
        return self

    def up(self) -> bool:
        """Whether its main process says so; fails the test when it ended."""
        assert self.main is not None
        assert self.main.poll() is None, self.main.output()
        return f"{self.role} {self.host.address} is up" in self.main.output()

    def kill(self) -> None:
        """As `kill -9` of the whole unit: its main process and all it started."""
        assert self.main is not None
        self.main.signal(signal.SIGKILL)
        self.main.wait(10)
        until(lambda: not self.host.pids(), f"nothing of {self.host.name} is left: {self.host.pids()}", 10)
        self.logs.unlink()

    def cli(self, *args: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return self.host.run(
            sys.executable, "-m", "serving.cli.main", *args, env=self.env, cwd=ROOT, check=check, timeout_s=timeout_s
        )


class Cluster:
    """A head and workers; the test is a client outside."""

    def __init__(self, net: Network, folder: Path, *, profile: str = "sim") -> None:
        self.net = net
        self.folder = folder
        self.profile = profile
        self.nodes: list[Node] = []
        self.key = ""

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        return self.nodes[1:]

    def add(self) -> Node:
        """Another node, not started: the first is the head; secrets are copied as a deployment does."""
        node = Node(self, self.net.add(), "worker") if self.nodes else None
        if node is None:
            node = Node(self, self.net.add(), "head")
        else:
            there = node.host.inside(STATE)
            there.mkdir(mode=0o700)
            for name in ("cluster-secret", "ray-token"):
                shutil.copy(self.head.host.inside(STATE / name), there / name)
        self.nodes.append(node)
        return node

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.head.cli("status", "--json").stdout)
        return told

    def chat(self, node: Node, model: str, key: str = "", **body: Any) -> httpx.Response:
        payload = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **body}
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.post(f"{node.url}/v1/chat/completions", headers=headers, json=payload, timeout=60)


def answers(node: Node) -> bool:
    """Whether a gateway of this node is ready for every model."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{node.url}/readyz", timeout=2).status_code == 200
    return False


@contextlib.contextmanager
def cluster(folder: Path, **options: Any) -> Iterator[Cluster]:
    """A head that is up, without workers and without a catalog."""
    with network() as net:
        made = Cluster(net, folder, **options)
        head = made.add().start()
        until(head.up, f"the head is up:\n{head.logs.read_text()}", 120)
        made.key = head.host.inside(STATE / "api-key").read_text().strip()
        yield made
