"""What to run: one engine's launch spec -> argv and environment. Pure, except that it knows this interpreter.

An engine is "a command that serves OpenAI HTTP and Prometheus text"; a new kind is one more function here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from serving.errors import EngineError

DEFAULT_SLOTS = 256
# Longer than any stop gives it: told to end, vLLM goes on with what runs, and is ended in the middle of it, which a client can
# see. With 0, its default, it ends every answer as if it were whole, and on two of its routes does not even say so.
SHUTDOWN_TIMEOUT_S = 60
DOOR = "serving.engine.door.Door"
GUARD = Path(__file__).parent / "guard"
_ROOT = Path(__file__).parents[2]

# Of the replica's environment, only what an engine needs: never our keys, never Ray's.
_DROP_PREFIXES = ("STEELYARD_", "RAY_", "SERVE_", "PYTHON", "__RAY")
# Ray sets these for its own processes; an engine picks its own.
_DROP = frozenset({"OMP_NUM_THREADS", "LD_PRELOAD", "MALLOC_CONF"})


class AdapterSpec(msgspec.Struct, frozen=True):
    """A LoRA adapter the engine loads at start: the name clients use, and its folder."""

    name: str
    path: str


class EngineSpec(msgspec.Struct, frozen=True):
    """Everything that identifies what an engine serves; it is the `args` of its Serve application, so a change of any
    field rolls the replicas, and nothing else does."""

    model: str
    version: str
    kind: str
    weights: str
    served_names: list[str]
    args: dict[str, object] = {}
    env: dict[str, str] = {}
    adapters: list[AdapterSpec] = []

    @property
    def id(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def slots(self) -> int:
        """Concurrent generations the engine takes; one more is `busy` at its door."""
        value = str(self.args.get("max-num-seqs", DEFAULT_SLOTS))
        return int(value) if value.isdigit() else DEFAULT_SLOTS  # nonsense is the engine's to refuse, by name


class Traces(msgspec.Struct, frozen=True):
    """Where an engine's spans go. Of the node, not of the spec: a change rolls no replica, and holds from the next start."""

    endpoint: str
    headers: dict[str, str]
    service: str
    about: dict[str, str] = {}  # resource attributes


class Command(msgspec.Struct, frozen=True):
    argv: list[str]
    env: dict[str, str]


def build(
    spec: EngineSpec,
    *,
    host: str,
    port: int,
    secret: str,
    mark: str,
    parent_pid: int,
    environ: Mapping[str, str],
    sockets: Path | None = None,
    traces: Traces | None = None,
) -> Command:
    """The command of `spec` listening on host:port behind its door. The secret goes by environment, never argv.
    `sockets` is a private folder for the engine's own IPC, by default the system's temporary one."""
    builders = {"vllm": _vllm, "simulator": _simulator}
    if spec.kind not in builders:
        raise EngineError(f"{spec.id}: unknown engine kind {spec.kind!r}", f"use one of {', '.join(builders)}")
    argv = [sys.executable, "-u", *builders[spec.kind](spec), "--host", host, "--port", str(port)]
    env = {k: v for k, v in environ.items() if k not in _DROP and not k.startswith(_DROP_PREFIXES)}
    env |= {
        "PYTHONPATH": ":".join([str(GUARD), str(_ROOT), *_kept_pythonpath(environ)]),
        "STEELYARD_DOOR_SECRET": secret,
        "STEELYARD_DOOR_SLOTS": str(spec.slots),
        "STEELYARD_ENGINE_MARK": mark,
        "STEELYARD_PARENT": str(parent_pid),
        # A process that sets its title would wipe its environment as others see it, and with it the mark.
        "SPT_NOENV": "1",
    }
    if spec.kind == "vllm":
        if sockets is not None:
            env |= {"VLLM_RPC_BASE_PATH": str(sockets)}
        # An engine is on one node: what its processes say to each other stays on loopback, wherever its server listens.
        env |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        # CUDA counts the fastest GPU first unless told otherwise; Ray, which assigns them by number, and NVML count by bus.
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        # FlashInfer's sampler is compiled when the engine starts, with a CUDA toolkit that a serving machine rarely has.
        env |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        env |= {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5"}  # gateways keep idle connections a second less
        if traces is not None and _traceable(spec.args):
            argv += ["--otlp-traces-endpoint", traces.endpoint]
            env |= _tracing(traces, environ)
    return Command(argv, env | spec.env)


def _traceable(args: Mapping[str, object]) -> bool:
    """It has no collector of its own, and its statistics are on: vLLM's spans are made of them, and without them an assertion of
    the tracing fails with the first answer, and the engine with it."""
    return "otlp-traces-endpoint" not in args and not args.get("disable-log-stats")


def _tracing(traces: Traces, environ: Mapping[str, str]) -> dict[str, str]:
    """For OpenTelemetry inside the engine. The headers are a secret, so they go by environment."""
    about = ",".join(f"{name}={quote(value)}" for name, value in traces.about.items())
    return {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": ",".join(f"{n}={quote(v)}" for n, v in traces.headers.items()),
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "3",  # seconds; a collector that is away must not hold up an engine that ends
        # Spans only under a gateway's: health probes and the engine's own start make none.
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        # vLLM asks for a span of every request. For one that came without a parent it looks into its environment, and
        # copies all of it (50 us, more on Kubernetes) unless there is this, which is none.
        "TRACEPARENT": "none",
        # Encoded at once while no token goes out: vLLM's server has one interpreter for both.
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64",
        "OTEL_SERVICE_NAME": f"{traces.service}-engine",
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(filter(None, [environ.get("OTEL_RESOURCE_ATTRIBUTES"), about])),
    }


def _kept_pythonpath(environ: Mapping[str, str]) -> list[str]:
    return [p for p in environ.get("PYTHONPATH", "").split(":") if p and p not in (str(GUARD), str(_ROOT))]


def _vllm(spec: EngineSpec) -> list[str]:
    adapters: list[str] = []
    if spec.adapters:
        adapters = ["--enable-lora", "--lora-modules", *(f"{a.name}={a.path}" for a in spec.adapters)]
        if "max-loras" not in spec.args:
            # One slot stays empty: on CPUs, in a batch that mixes both, requests for the base model get the adapter of
            # the last slot (vllm-project/vllm#49656).
            adapters += ["--max-loras", str(len(spec.adapters) + 1)]
    fixed = ["--disable-uvicorn-access-log"]
    if "shutdown-timeout" not in spec.args:
        fixed += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    return ["-m", "vllm.entrypoints.openai.api_server", *_common(spec), *fixed, *adapters]


def _simulator(spec: EngineSpec) -> list[str]:
    adapters = ["--lora-modules", *(f"{a.name}={a.path}" for a in spec.adapters)] if spec.adapters else []
    return ["-m", "serving.engine.simulator", *_common(spec), *adapters]


def _common(spec: EngineSpec) -> list[str]:
    args = {"max-num-seqs": DEFAULT_SLOTS} | spec.args
    return [
        *("--model", spec.weights, "--served-model-name", *spec.served_names),
        *("--middleware", DOOR, "--enable-request-id-headers"),
        *flags(args),
    ]


def flags(args: Mapping[str, object]) -> list[str]:
    """vLLM's own argument names to argv: true -> `--name`, false -> `--no-name`, null -> left out, list -> values,
    mapping -> JSON."""
    out: list[str] = []
    for name, value in args.items():
        if value is None:
            continue
        if value is True:
            out.append(f"--{name}")
        elif value is False:
            out.append(f"--no-{name}")
        elif isinstance(value, list):
            out += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            out += [f"--{name}", json.dumps(value)]
        else:
            out += [f"--{name}", str(value)]
    return out
