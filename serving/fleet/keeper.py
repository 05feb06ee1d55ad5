"""What every node has follows the nodes that come and go, without a person. Runs beside the directory.

`keep_gateways` on the head of a bare-metal cluster, never on Kubernetes, where the RayService alone writes. It changes one
number of one deployment through Serve's external-scaler call, so it cannot race with `steelyard up`: no other part of the
config passes through here.

`keep_gpu_exporters` everywhere: they are actors of their own, and only on nodes with GPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from serving.fleet.endpoint import GATEWAY_APP, GATEWAY_DEPLOYMENT

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0  # of the nodes: a call to the control store
EXPORTERS_CHECK_EVERY_S = 2.0  # likewise; a leaving node waits for its exporter no longer
EXPORTER_AGAIN_AFTER_S = 30.0  # one that did not start, e.g. with a bad script
SERVE_CHECK_EVERY_S = 10.0  # of Serve's count when no node came or went: somebody may have applied another config

_EXPORTER = "gpu-exporter-"  # and Ray's id of the node


def wanted(nodes: int, per_node: int) -> int:
    """Gateways of a cluster. Never none: a cluster whose last node leaves keeps its config."""
    return per_node * max(1, nodes)


async def keep_gateways() -> None:
    """Keeps the number of gateways at so many per node that is alive and not leaving."""
    seen, checked, troubled = frozenset[str](), float("-inf"), False
    loop = asyncio.get_running_loop()
    while True:
        try:
            nodes = await asyncio.to_thread(staying_nodes)
            due = nodes != seen or loop.time() - checked > SERVE_CHECK_EVERY_S
            if due and await _set_gateways(nodes):
                seen, checked = nodes, loop.time()
            troubled = False
        except asyncio.CancelledError:
            raise
        except Exception as e:  # Serve is not there yet, or comes back: asked again in a moment
            if not troubled:
                log.warning("the number of gateways cannot be kept now: %s", type(e).__name__)
            troubled = True
        await asyncio.sleep(CHECK_EVERY_S)


async def keep_gpu_exporters() -> None:
    """Keeps an exporter on every node with GPUs that is alive and not leaving."""
    started: dict[str, float] = {}  # by Ray's id of the node
    troubled = False
    while True:
        try:
            await asyncio.to_thread(_set_exporters, started)
            troubled = False
        except Exception as e:  # the control store is away or slow: asked again in a moment
            if not troubled:
                log.warning("GPU exporters cannot be kept now: %s", type(e).__name__)
            troubled = True
        await asyncio.sleep(EXPORTERS_CHECK_EVERY_S)


def _set_exporters(started: dict[str, float]) -> None:
    """Ray says which there are: a directory that was restarted did not start those that run, and one whose start failed is
    gone from the names, while its handle would look as before."""
    import ray

    from serving.fleet.directory import NAMESPACE  # it imports this

    if not started and not any(map(_has_gpus, ray.nodes())):
        return
    nodes = {n["NodeID"] for n in staying() if _has_gpus(n)}
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    running = {n.removeprefix(_EXPORTER) for n in names if n.startswith(_EXPORTER)}
    for node in running - nodes:  # Ray ends a leaving node when the last actor is gone from it
        with contextlib.suppress(ValueError):  # it has just ended
            ray.kill(ray.get_actor(_EXPORTER + node, namespace=NAMESPACE))
    for node in due_exporters(nodes, running, started, time.monotonic()):
        _start_exporter(node)
        log.info("a GPU exporter for node %s", node)


def due_exporters(nodes: Collection[str], running: Collection[str], started: dict[str, float], now: float) -> list[str]:
    """Nodes that get an exporter now; `started` remembers when each got its last one."""
    for node in started.keys() - set(nodes):
        del started[node]
    due = [n for n in nodes if n not in running and now - started.get(n, float("-inf")) >= EXPORTER_AGAIN_AFTER_S]
    started.update(dict.fromkeys(due, now))
    return due


def _has_gpus(node: Mapping[str, Any]) -> bool:
    return bool(node["Alive"] and node["Resources"].get("GPU", 0) > 0)


def _start_exporter(node: str) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from serving.fleet import directory, gpu_exporter  # one tells the other, and the directory imports this

    options = {
        "name": _EXPORTER + node,
        "namespace": directory.NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    ray.remote(gpu_exporter.GpuExporter).options(**options).remote()


def staying_nodes() -> frozenset[str]:
    """Nodes that are alive and not being drained, as the control store knows them. Blocks."""
    return frozenset(n["NodeID"] for n in staying())


def staying() -> list[dict[str, Any]]:
    """The same with all that Ray says of them."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    leaving = set(client.get_draining_nodes())
    return [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]


def strays(replicas: Iterable[Mapping[str, Any]], staying: Collection[str]) -> list[str]:
    """Gateways on nodes that do not stay which Serve still counts as running, or does not know yet where they are."""
    counted = ("RUNNING", "UPDATING", "RECOVERING")
    return [r["replica_id"] for r in replicas if r["state"] in counted and r["node_id"] not in staying]


async def _set_gateways(nodes: frozenset[str]) -> bool:
    """Whether Serve's number of gateways fits the nodes now; False when it must be asked again in a moment."""
    from ray.serve._private.common import DeploymentID

    controller = await asyncio.to_thread(serve_controller)
    if controller is None:
        return True
    details: dict[str, Any] = await controller.get_serve_instance_details.remote()
    found = details["applications"].get(GATEWAY_APP, {}).get("deployments", {}).get(GATEWAY_DEPLOYMENT)
    if found is None:
        return True
    per_node = found["deployment_config"].get("max_replicas_per_node") or 1
    count, before = wanted(len(nodes), per_node), found["target_num_replicas"]
    if count < before and strays(found["replicas"], nodes):
        # Serve notices a dead node's replicas later than Ray, at their next health check, and until then a smaller number
        # stops the gateway on the node with the fewest replicas, which may be a live one. Once it has noticed, what it
        # stops is the replacement that has no place.
        return False
    if count != before:
        log.info("%d nodes: %d gateways, %d before", len(nodes), count, before)
        which = DeploymentID(name=GATEWAY_DEPLOYMENT, app_name=GATEWAY_APP)
        await controller.update_deployment_replicas.remote(which, count)
    return True


def serve_controller() -> Any | None:
    """Serve's controller; None while nothing was ever applied."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
