"""The two sides of a comparison: vLLM's own server without a door, and the whole stack in front of the same engine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.client import ROOT
from bench.procs import Service, free_port
from serving.engine.command import flags

Args = Mapping[str, Any]
STACK = ("-m", "serving.cli.main", "up")
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Side:
    """Where load goes, and whose processes answer it."""

    name: str
    base_url: str
    model: str
    service: Service
    headers: dict[str, str] = field(default_factory=dict)
    state_dir: Path | None = None

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this side: below its process, and, for the stack, whatever it put elsewhere but gave
        its state folder to."""
        found = {p.pid: p for p in self.service.tree()}
        if self.state_dir is not None:
            needle = f"STEELYARD_STATE_DIR={self.state_dir}\0".encode()
            for process in psutil.process_iter():
                with contextlib.suppress(OSError):
                    if process.pid not in found and needle in Path(f"/proc/{process.pid}/environ").read_bytes():
                        found[process.pid] = process
        return list(found.values())


@dataclass(frozen=True)
class EngineUnderTest:
    """A vLLM engine as both sides start it: the same weights, arguments (vLLM's own names) and environment."""

    weights: Path
    args: Args
    env: Mapping[str, str]
    resources: Mapping[str, float] = field(default_factory=dict)
    name: str = "bench"

    def model_file(self) -> dict[str, Any]:
        """The model's YAML for the stack."""
        engine = {"kind": "vllm", "args": dict(self.args), "env": dict(self.env)}
        version = {"version": "v1", "weights": {"source": str(self.weights)}, "engine": engine}
        if self.resources:
            version["resources"] = dict(self.resources)
        return {"name": self.name, "versions": [version]}


@contextlib.contextmanager
def raw(engine: EngineUnderTest, work: Path) -> Iterator[Side]:
    """vLLM's server alone, starting; wait with `side.service.wait_until(f"{base_url}/health")`.

    Its access log is off, as in the stack's engines: the comparison leans towards the raw side.
    """
    port = free_port()
    argv = [
        *(sys.executable, "-u", "-m", "vllm.entrypoints.openai.api_server", "--model", str(engine.weights)),
        *("--served-model-name", engine.name, "--host", "127.0.0.1", "--port", str(port)),
        *("--disable-uvicorn-access-log", *flags(engine.args)),
    ]
    env = _environment({"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **engine.env})
    with Service(argv, env, work / "raw.log") as service:
        yield Side("raw", f"http://127.0.0.1:{port}", engine.name, service)


@contextlib.contextmanager
def stack(models: list[dict[str, Any]], profile: str, work: Path, **settings: str) -> Iterator[Side]:
    """`steelyard up` over `models`, starting; wait with `wait_ready`. `settings` are further STEELYARD_* variables."""
    port = free_port()
    state_dir, catalog = work / "state", work / "models"
    catalog.mkdir(parents=True, exist_ok=True)
    for model in models:
        (catalog / f"{model['name']}.yaml").write_text(yaml.safe_dump(model, sort_keys=False))
    env = _environment(
        {
            "STEELYARD_PORT": str(port),
            "STEELYARD_STATE_DIR": str(state_dir),
            "STEELYARD_MODELS": str(catalog),
            "STEELYARD_PROFILE": profile,
            **settings,
        }
    )
    with Service([sys.executable, *STACK], env, work / "stack.log", grace_s=60.0) as service:
        headers: dict[str, str] = {}
        yield Side("stack", f"http://127.0.0.1:{port}", models[0]["name"], service, headers, state_dir)


@contextlib.contextmanager
def traced(ratio: float, work: Path) -> Iterator[dict[str, str]]:
    """Settings of a stack that sends so many of its traces to a collector, which forgets them; 0: none, and no collector."""
    if not ratio:
        yield {}
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with Service(
        [sys.executable, "-m", "bench.swallow", str(port)], _environment({}), work / "collector.log"
    ) as service:
        service.wait_until(url, START_TIMEOUT_S)
        yield {"STEELYARD_OTLP_ENDPOINT": url, "STEELYARD_TRACE_RATIO": str(ratio)}


def wait_ready(side: Side, timeout_s: float, look: Callable[[], None] = lambda: None) -> float:
    """Seconds until the side answers; the stack's key is then in its headers. `look` as in `Service.wait_until`."""
    if side.state_dir is None:
        return side.service.wait_until(f"{side.base_url}/health", timeout_s, look)
    waited = side.service.wait_until(f"{side.base_url}/readyz", timeout_s, look)
    key = (side.state_dir / "api-key").read_text().strip()
    side.headers["Authorization"] = f"Bearer {key}"
    return waited


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of another stack, plus the repository on the search path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("STEELYARD_", "RAY_"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env | dict(extra)
