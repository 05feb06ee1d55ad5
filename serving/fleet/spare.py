"""A process that waits for this node's next replica, kept where a version may be at zero: a start from zero takes it.

Between Serve's decision and a replica's first line lie a new process of Ray's, its connections and all imports: two seconds,
where everything else of ours takes half of one. Ray starts an actor in an idle process that has run nothing yet: one that
has run a task is for tasks alone. Ray's node process (raylet) makes one, of no job, when it is asked to, and `PRELOAD` has
it import what a replica needs. About 90 MB.

Each gateway looks after its own node, since there is one on every node; of several on one, the holder of a lock does.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# By name, and for Ray's environment: a replica is no part of this room.
PRELOAD = "serving.replica,ray.serve._private.replica"
CHECK_EVERY_S = 2.0
AFTER_ONE_S = 10.0  # until the next: where memory is short Ray ends them, and imports cost a second of a core
RETRY_S = 60.0
COMES_WITHIN_S = 60.0
KEPT_S = 24 * 3600  # then Ray ends it, and another one is made
_CALL_S = 5.0


async def keep_for_ever(wanted: Callable[[], bool], lock: Path) -> None:
    """Whenever `wanted()` and there is none, has one made. It is a comfort: without it a start takes longer. Returns where
    there can be none."""
    mine, raylet = FileLock(lock, timeout=0, mode=0o600), os.getppid()
    troubled = False
    while True:
        pause_s = CHECK_EVERY_S
        try:
            if wanted() and _held(mine) and not await _is_there(raylet):
                if not await asyncio.to_thread(_make):
                    return
                if not await _comes(wanted, raylet):
                    # Each round would make another that nobody sees.
                    log.error("the process for the next replica did not come: none is kept any more")
                    return
                pause_s = AFTER_ONE_S
            troubled = False
        except Exception as e:  # Ray's own are many
            if not troubled:
                log.warning("no process can be kept for the next replica: %s: %s", type(e).__name__, e)
            troubled, pause_s = True, RETRY_S
        await asyncio.sleep(pause_s)


async def _comes(wanted: Callable[[], bool], raylet: int) -> bool:
    for _ in range(round(COMES_WITHIN_S / CHECK_EVERY_S)):
        await asyncio.sleep(CHECK_EVERY_S)
        if not wanted() or await _is_there(raylet):  # a replica may have taken it already
            return True
    return False


async def _is_there(raylet: int) -> bool:
    return bool(await asyncio.to_thread(waiting, raylet))


def _held(lock: FileLock) -> bool:
    """Whether this process looks after the node; it does until it ends."""
    if not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            return False
    return True


def waiting(raylet: int) -> list[int]:
    """Pids of Ray's processes below its node process that wait for work, or start."""
    if (called := Path(f"/proc/{raylet}/comm").read_text().strip()) != "raylet":
        raise RuntimeError(f"this process's parent is {called}, not Ray's raylet")
    found = []
    for task in Path(f"/proc/{raylet}/task").iterdir():
        for pid in (task / "children").read_text().split():
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if title.rstrip(b"\0 ") == b"ray::IDLE" or b"default_worker.py" in title:
                found.append(int(pid))
    return found


def _make() -> bool:
    """Asks this node's raylet for a process of this one's environment, which is that of every replica; False on a head that
    runs no engines. Blocks."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    here = ray.get_runtime_context()
    node = next(n for n in ray.nodes() if n["NodeID"] == here.get_node_id())
    if not node["Resources"].get("CPU"):
        return False
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=ray.JobID.nil().binary(),  # replicas' own may have ended with the command that applied the catalog first
        num_workers=1,
        keep_alive_duration_secs=KEPT_S,
    )
    request.runtime_env_info.serialized_runtime_env = here.get_runtime_env_string()
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_CALL_S)
    return True
