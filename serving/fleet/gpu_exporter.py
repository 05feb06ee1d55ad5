"""One GPU exporter on every node that has GPUs: an actor that the directory keeps there, and removes from a node that leaves.

It reads NVML every `EVERY_S`, tells the directory how its replicas' GPUs worked and hears which replicas they are, and serves
its metrics to whoever has the cluster secret: gateways hand them on at `/metrics`. The same on one machine, on many,
and on Kubernetes: all it needs is Ray. It holds no GPU, and no CPU that Ray counts.

A node without GPUs has none. One whose driver hangs goes on serving what it knows, with `steelyard_gpu_up` 0.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from serving.fleet import directory
from serving.fleet.endpoint import Endpoint, GpuReport, Snapshot, State, Target
from serving.settings import load_settings
from serving.telemetry import logs
from serving.telemetry.gpu import GpuTelemetry, Holder
from serving.telemetry.nvml import from_settings

log = logging.getLogger(__name__)

EVERY_S = 2.0  # a round: below 1 % of a core for eight GPUs
AGAIN_AFTER_S = 10.0  # what ends it may do so again, and each start costs a second of a core
OLD_S = 6.0  # without the directory for so long, nobody knows what runs


class GpuExporter:
    """The actor. All it does, it does in threads of its own: nobody calls it."""

    def __init__(self) -> None:
        import ray

        settings = load_settings()
        self._process_log = logs.setup("gpu-exporter", settings.log_dir)
        self._node = ray.util.get_node_ip_address()
        self._secret = settings.secret()
        self._directory = directory.Client()
        here = ray.get_runtime_context().get_node_id()
        node = next((n for n in ray.nodes() if n["NodeID"] == here), None)
        counted = int(node["Resources"].get("GPU", 0)) if node else 0
        self._telemetry = GpuTelemetry(from_settings(settings.nvml_script), expected=counted)
        self._replicas: dict[str, Endpoint] = {}
        threading.Thread(target=self._live, name="gpu-exporter", daemon=True).start()

    def _live(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException:
            log.exception("the GPU exporter of %s ended", self._node)
            self._process_log.close()
            time.sleep(AGAIN_AFTER_S)
            os._exit(1)  # Ray starts it again, at once

    async def _run(self) -> None:
        url, _ = await listen(self._node, self._secret, self._telemetry.text)
        target = Target(id=f"gpu#{self._node}", component="gpu", url=url, node=self._node)
        loop, driver = asyncio.get_running_loop(), ThreadPoolExecutor(1, "nvml")
        reading: asyncio.Future[None] | None = None
        heard_at, untold, why = float("-inf"), False, ""
        while True:
            began = loop.time()
            if reading is None or reading.done():  # a call of a driver that hangs ends some time, or never
                reading = loop.run_in_executor(driver, self._telemetry.round)
            await asyncio.wait({reading}, timeout=EVERY_S)
            if reading.done() and (e := reading.exception()) is not None and str(e) != why:
                why = str(e)
                log.error("the GPUs cannot be read: %s", e, exc_info=e)
            try:
                report = GpuReport(target=target, busy=self._telemetry.busy())
                self._take(
                    directory.unpack(await self._directory.call("report_gpus", directory.pack(report)), Snapshot)
                )
                heard_at, untold = loop.time(), False
            except Exception as e:  # any Ray error: asked again in a moment
                if not untold:
                    log.warning("the directory does not take the GPU report: %s", type(e).__name__)
                untold = True
            self._telemetry.hold(map(holder, self._replicas.values()), fresh=loop.time() - heard_at < OLD_S)
            await asyncio.sleep(max(0.0, EVERY_S - (loop.time() - began)))

    def _take(self, here: Snapshot) -> None:
        """The replicas of this node; a directory that has just been restarted may not know them all."""
        fresh = {e.id: e for e in here.endpoints}
        self._replicas = fresh if here.complete else self._replicas | fresh


async def listen(host: str, secret: str, text: Callable[[], str]) -> tuple[str, web.AppRunner]:
    """Serves `text` at a port of its own to whoever has the secret; its URL, and what to clean up."""

    async def metrics(request: web.Request) -> web.Response:
        if not hmac.compare_digest(request.headers.get("x-steelyard-secret", "").encode(), secret.encode()):
            return web.Response(status=401, text="this listener answers gateways only\n")
        return web.Response(text=text())

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{runner.addresses[0][1]}/metrics", runner


def holder(endpoint: Endpoint) -> Holder:
    return Holder(
        replica=endpoint.id,
        model=endpoint.model,
        version=endpoint.version,
        gpus=endpoint.gpus,
        starting=endpoint.state is State.STARTING,
        running=endpoint.in_flight,
    )
