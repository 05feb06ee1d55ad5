"""What the parts of `bench.scale` stand on: stacks over simulated engines, and what an operator's tools say of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import procs, workloads
from bench.client import ROOT
from bench.load import Party, Spec, Summary
from bench.paired import Bench
from bench.recording import Recording
from bench.sides import Side
from bench.workloads import Workload

_LABEL = re.compile(r'(\w+)="([^"]*)"')
_DIRECTORY_TITLE = "ray::Directory"
_KEYS_TAKEN_S = 2.5  # gateways look at the keys file once a second


@dataclass(frozen=True)
class Fleet:
    """A running stack. Everything is read through the doors a person has: `/metrics`, the command line, `ps`."""

    side: Side

    def ask(
        self,
        bench: Bench,
        model: str,
        workload: Workload,
        *,
        tick: Callable[[], None] = lambda: None,
        every_s: float = 1.0,
        **more: Any,
    ) -> tuple[Summary, Recording]:
        """One phase of load; `more` are fields of `bench.load.Spec`."""
        spec = Spec(
            base_url=self.side.base_url,
            model=model,
            headers=self.side.headers,
            workload=workloads.dump(workload),
            out=str(bench.work / "recording.npz"),
            **more,
        )
        return bench.client.run(spec, tick, every_s)

    def gateways(self) -> list[int]:
        return sorted(procs.gateway_pids(self.side.processes()))

    def directory(self) -> int:
        """The directory's pid; StartFailed when there is not exactly one."""
        found = [p.pid for p in self.side.processes() if _DIRECTORY_TITLE in procs.title(p)]
        if len(found) != 1:
            raise procs.StartFailed(f"{len(found)} directory processes, not one")
        return found[0]

    def metrics(self) -> Metrics:
        request = urllib.request.Request(f"{self.side.base_url}/metrics", headers=self.side.headers)
        with urllib.request.urlopen(request, timeout=20) as response:
            return Metrics(response.read().decode())

    def changes(self, model: str) -> list[dict[str, Any]]:
        """What the policy decided for the model, oldest first, as `steelyard scale explain` tells it."""
        argv = [sys.executable, "-m", "serving.cli.main", "scale", "explain", model, "--json", "--last", "50"]
        done = subprocess.run(argv, env=self.side.service.env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise procs.StartFailed(done.stderr.strip())
        (version,) = json.loads(done.stdout)
        return list(version["changes"])

    def keys(self, *names: str) -> list[dict[str, str]]:
        """New keys for every model, as headers; returns when the gateways know them."""
        from serving.gateway.keys import create_key

        assert self.side.state_dir is not None
        file = self.side.state_dir / "keys.json"
        made = [create_key(file, name=name, scopes=["infer:*"], now=time.time())[1] for name in names]
        time.sleep(_KEYS_TAKEN_S)
        return [{"Authorization": f"Bearer {token}"} for token in made]

    def until(self, probe: Callable[[Metrics], bool], what: str, within_s: float) -> None:
        """Waits, looking twice a second; StartFailed when it does not come."""
        deadline = time.monotonic() + within_s
        while not probe(self.metrics()):
            if time.monotonic() > deadline:
                raise procs.StartFailed(f"not within {within_s:g} s: {what}")
            time.sleep(0.5)


@dataclass(frozen=True)
class Metrics:
    """One scrape of the merged exposition."""

    text: str

    def series(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Samples of one name that have these labels."""
        found = []
        for labelled, value in re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.text, re.M):
            has = dict(_LABEL.findall(labelled))
            if labels.items() <= has.items():
                found.append((has, float(value)))
        return found

    def total(self, name: str, **labels: str) -> float:
        return sum(value for _, value in self.series(name, **labels))

    def replicas(self, model: str, *states: str) -> int:
        """Replicas of the model in these states (all, without any), as a gateway of the stack sees them."""
        seen: dict[str, float] = {}
        for labels, value in self.series("steelyard_replicas", model=model, component="gateway"):
            if not states or labels["state"] in states:
                seen[labels["instance"]] = seen.get(labels["instance"], 0.0) + value
        return int(max(seen.values(), default=0.0))

    def engines(self, name: str, model: str) -> dict[str, float]:
        """One of vLLM's own gauges by replica."""
        return {labels["replica"]: value for labels, value in self.series(f"vllm:{name}", model=model)}


def skewed(gateways: list[int], share: float, headers: Mapping[str, str]) -> tuple[Party, ...]:
    """`share` of the requests at the first gateway, the rest spread over the others."""
    first, *others = gateways
    return (
        Party(share, dict(headers), (first,)),
        Party(1 - share, dict(headers), tuple(others)),
    )
