"""`python -m serving.engine.simulator`: arguments, start, ready line, stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Generator
from types import SimpleNamespace

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from serving.engine.simulator.app import App
from serving.engine.simulator.asgi import ASGIApp, Receive, Scope, Send
from serving.engine.simulator.core import Core
from serving.engine.simulator.kv import KvCache
from serving.engine.simulator.metrics import Metrics
from serving.engine.simulator.models import Models
from serving.engine.simulator.sins import NAMES, Sins

# vLLM's (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): idle connections are closed under whoever pools them.
_KEEP_ALIVE_S = 5


def main(argv: list[str] | None = None) -> None:
    args = _arguments(sys.argv[1:] if argv is None else argv)
    sins = _sins(args)
    # Bound at once, so that a taken port is told early, and listening only when ready: like vLLM.
    sock = _bind(args.host, args.port)
    url = f"http://{args.host}:{sock.getsockname()[1]}"
    core, app = build(args, sins)
    time.sleep(max(0.0, sins.start_s(args.sim_start_s) - _age_s()))
    # Tokens leave no cycles behind; scanning thousands of open streams for some costs a tenth of the CPU.
    gc.freeze()
    gc.set_threshold(100_000)
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1 if sins.stops_politely else None,
    )
    uvloop.run(_Server(config, core, f"simulator ready: {url} serves {', '.join(args.served_model_name)}").run(sock))


def build(args: argparse.Namespace, sins: Sins) -> tuple[Core, ASGIApp]:
    """The core and the app around it, middleware outermost in the order vLLM gives it."""
    kv_tokens = args.sim_kv_tokens or args.max_num_seqs * args.max_model_len
    if kv_tokens < args.max_model_len:
        sys.exit(f"--sim-kv-tokens {kv_tokens} cannot hold one request of --max-model-len {args.max_model_len} tokens")
    registry = CollectorRegistry()
    kv = KvCache(kv_tokens, args.block_size)
    core = Core(
        slots=args.max_num_seqs,
        kv=kv,
        ttft_s=args.sim_ttft_ms / 1000,
        itl_s=args.sim_itl_ms / 1000,
        sins=sins,
        metrics=Metrics(registry, args.served_model_name[0], args.max_model_len, kv),
        prefill_s=args.sim_prefill_us / 1e6,
        preempts=args.sim_preempts,
    )
    models = Models(
        served=tuple(args.served_model_name),
        root=args.model,
        adapters=dict(module.split("=", 1) for module in args.lora_modules),
        max_model_len=args.max_model_len,
        seed=args.seed,
        started=int(time.time()),
    )
    app: ASGIApp = App(
        models,
        core,
        sins,
        registry,
        name_requests=args.enable_request_id_headers,
        force_usage=args.enable_force_include_usage,
        track_load=args.enable_server_load_tracking,
        prefix_block=args.block_size if args.enable_prefix_caching else 0,
        prompt_details=args.enable_prompt_tokens_details,
    )
    for path in args.middleware:
        module, _, name = path.rpartition(".")
        app = getattr(importlib.import_module(module), name)(app)
    return core, _Known(app, core)


class _Known:
    """Where middleware finds the engine, as in vLLM's server: `scope["app"].state.engine_client`."""

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self._app = app
        self.state = SimpleNamespace(engine_client=core)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._app(scope, receive, send)


class _Server(uvicorn.Server):
    """Says when it listens; on SIGTERM or SIGINT ends the open requests as vLLM's engine does when it is shut down,
    and leaves. uvicorn alone would wait for them."""

    def __init__(self, config: uvicorn.Config, core: Core, ready: str) -> None:
        super().__init__(config)
        self._core = core
        self._ready = ready

    async def run(self, sock: socket.socket) -> None:  # type: ignore[override]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        await self.serve(sockets=[sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def _stop(self) -> None:
        self._core.shut_down()
        self.should_exit = True


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.engine.simulator", allow_abbrev=False)
    vllm = parser.add_argument_group("vLLM's own")
    vllm.add_argument("--model", default="simulated")
    vllm.add_argument("--served-model-name", nargs="+")
    vllm.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=PATH")
    vllm.add_argument("--host", default="127.0.0.1")
    vllm.add_argument("--port", type=int, default=8000, help="0 picks a free one; the ready line tells which")
    vllm.add_argument("--middleware", action="append", default=[], metavar="MODULE.CLASS")
    vllm.add_argument("--max-model-len", type=_count, default=4096, help="tokens")
    vllm.add_argument("--max-num-seqs", type=_count, default=256, help="requests that run; more wait")
    vllm.add_argument("--block-size", type=_count, default=16, help="tokens of KV cache that are shared or not")
    vllm.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="prompts share KV cache"
    )
    vllm.add_argument(
        "--enable-prompt-tokens-details", action="store_true", help="usage tells the tokens found in the cache"
    )
    vllm.add_argument("--enable-request-id-headers", action="store_true")
    vllm.add_argument("--enable-force-include-usage", action="store_true")
    vllm.add_argument("--enable-server-load-tracking", action="store_true")
    vllm.add_argument("--seed", type=int, default=0, help="another seed, other answers")
    sim = parser.add_argument_group("the simulator's own")
    sim.add_argument("--sim-ttft-ms", type=float, default=20, help="prompt computed to first token")
    sim.add_argument(
        "--sim-prefill-us",
        type=float,
        default=0,
        help="a prompt's token that is not in the cache, one prompt at a time",
    )
    sim.add_argument("--sim-itl-ms", type=float, default=5, help="between tokens")
    sim.add_argument("--sim-kv-tokens", type=_count, help="KV room; default: every slot at full context")
    sim.add_argument(
        "--sim-preempts",
        action="store_true",
        help="answers take KV room token by token; when it is full, who came last gives its own back and is computed again",
    )
    sim.add_argument("--sim-start-s", type=float, default=0.5, help="seconds from its making until it listens")
    sim.add_argument("--sim-sins", help=f"comma-separated, of {', '.join(NAMES)}; default: environment SIM_SINS")
    sim.add_argument("--sim-sin-after", type=int, help="tokens; default: environment SIM_SIN_AFTER, else 8")
    # vLLM takes --max_model_len for --max-model-len.
    spelled = [
        re.sub("_", "-", a.split("=", 1)[0]) + a[len(a.split("=", 1)[0]) :] if a[:2] == "--" else a for a in argv
    ]
    args, unknown = parser.parse_known_args(spelled)
    if ignored := [a for a in unknown if a.startswith("--")]:
        print(f"simulator: ignores {' '.join(ignored)}", file=sys.stderr, flush=True)
    args.served_model_name = args.served_model_name or [args.model]
    return args


def _sins(args: argparse.Namespace) -> Sins:
    """The environment lets a person sin in a catalog that knows nothing of sins. Read here and nowhere else: the
    simulator is a process of its own and takes nothing of `settings.py`."""
    names = args.sim_sins if args.sim_sins is not None else os.environ.get("SIM_SINS", "")
    after = args.sim_sin_after if args.sim_sin_after is not None else int(os.environ.get("SIM_SIN_AFTER", "8"))
    try:
        return Sins(frozenset(name for name in names.split(",") if name), after)
    except ValueError as error:
        sys.exit(f"simulator: {error}")


def _count(text: str) -> int:
    """A whole number as vLLM takes it: 16384, 16k (thousands) or 16K (of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a whole number: {text!r}")
    return int(float(match[1]) * {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}[match[2]])


def _age_s() -> float:
    """Seconds since this process was made: its imports are part of its start, as an engine's are."""
    if sys.platform != "linux":
        return 0.0
    with open("/proc/self/stat") as f:
        made = int(f.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - made


def _bind(host: str, port: int) -> socket.socket:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sys.exit(f"simulator: cannot listen on {host}:{port}: {error.strerror}")
    return sock


if __name__ == "__main__":
    main()
