"""Other ways to put a door before vLLM, on the same raw engine: `PEERS=1 make bench-overhead`. Informational, no bars.

A peer that is not installed is named and left out; none of them is a dependency.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from bench.paired import Bench, Phase, Row
from bench.procs import Service, StartFailed, free_port, pin
from bench.sides import Side

ROUTER = "vllm-router"
_ROUNDS = 3


def measure(bench: Bench, phases: Sequence[Phase], raw: Side) -> list[Row]:
    """Rows of vllm-router before the raw engine, under the side name ROUTER; none when it does not start."""
    bench.say("peer ray serve llm: left out, it brings an engine of its own and cannot stand before the raw one")
    if find_spec("vllm_router") is None:
        bench.say("peer vllm-router: left out, not installed")
        return []
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "vllm_router.launch_router", "--worker-urls", raw.base_url]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    try:
        with Service(argv, raw.service.env, bench.work / "vllm-router.log", grace_s=5.0) as service:
            service.wait_until(f"{url}/health", 60.0)
            peer = Side(ROUTER, url, raw.model, service)
            pin(service.pid, {min(os.sched_getaffinity(0))})
            return [bench.sample(phase, peer, 5000 + n, raw) for n in range(_ROUNDS) for phase in phases]
    except StartFailed as error:
        bench.say(f"peer vllm-router: left out, {str(error).splitlines()[-1]}")
        return []
