"""The command line's side of Ray: start a local cluster, join one, apply a Serve config, look at it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from serving import files
from serving.cli import pids
from serving.engine.command import GUARD
from serving.engine.process import STACK_MARK, sweep
from serving.errors import ClusterError, OperatorError
from serving.fleet import spare
from serving.fleet.endpoint import Snapshot
from serving.fleet.keeper import staying_nodes
from serving.settings import Profile, Role, Settings, worker_environment

# Ray's CPUs are bookkeeping here: engines on one box share the cores, GPUs are what is scarce.
LOGICAL_CPUS = 1024
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's smallest; nothing of ours goes through it
_KEPT_OF_A_LOG = 64 * 1024  # bytes
_TURN_S = 60.0  # longest wait for another command that changes what is served


class ClusterFile(msgspec.Struct):
    """`STATE_DIR/cluster.json`: how other commands find the running cluster."""

    address: str
    pid: int
    temp_dir: str
    profile: Profile
    role: Role = "one"
    node_address: str | None = None  # None: 127.0.0.1, a cluster of one node
    host: str | None = None  # where this node's gateways listen, when its main process says so
    port: int | None = None
    process: str | None = None  # `pids.mark` of its main process


def _path(settings: Settings) -> Path:
    return settings.state_dir / "cluster.json"


def read_cluster_file(settings: Settings) -> ClusterFile | None:
    """The running cluster of this state folder, or None when its main process is gone."""
    try:
        found = msgspec.json.decode(_path(settings).read_bytes(), type=ClusterFile)
    except (OSError, ValueError, msgspec.MsgspecError):  # ValueError: no UTF-8
        return None
    return found if pids.runs(found.pid, found.process) else None


def environment(settings: Settings, *, one_node: bool) -> None:
    """Ray reads these when it is imported and when it starts processes. Every process of the cluster needs the token."""
    if one_node:
        # Ray's own switch for laptops: the node's address is 127.0.0.1, and no server of Ray's listens beyond it.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    token = settings.state_dir / "ray-token"
    if "RAY_AUTH_TOKEN" not in os.environ:  # KubeRay gives it so
        if not token.exists():
            write_private(token, secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",  # starts; a replica itself waits longer after each failure
        "RAY_enable_metrics_collection": "0",  # Ray's exporters would answer without a key
        "RAY_event_stats": "0",  # statistics of Ray's own loops
        # Ray runs these two on jemalloc, where each of their fifty threads hoards what it frees: 9 MiB in a raylet that uses
        # 8, and it takes hours until they are full.
        "RAY_JEMALLOC_PROFILE": "raylet,gcs_server",
        "RAY_JEMALLOC_CONF": "narenas:1,tcache:false",
        "RAY_worker_niceness": "0",  # not Ray's 15: gateways and engines are what the machine is for
        "RAY_task_events_report_interval_ms": "0",  # for a dashboard that does not run
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "60000",  # Serve's own metrics are not collected either
        "AUTOSCALER_METRIC_PORT": "0",  # a fixed port would clash with a second stack on the host
        "DASHBOARD_METRIC_PORT": "0",
        "RAY_raylet_start_wait_time_s": "180",  # 30 s are not enough on a busy box
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_preload_python_modules": spare.PRELOAD,  # by every process of Ray's as it starts; most need them anyway
        **worker_environment(settings),
    }


def gpus(settings: Settings, profile: Profile) -> int | None:
    """What Ray is told of this node's GPUs; None lets it look."""
    if settings.nvml_script is None:
        return None if profile == "gpu" else 0
    if profile != "sim":
        raise OperatorError(
            f"STEELYARD_NVML_SCRIPT is set and the profile is {profile}", "unset it: scripted GPUs are for profile sim"
        )
    from serving.telemetry import nvml_scripted

    return nvml_scripted.read(settings.nvml_script).units


def runtime_folder(settings: Settings) -> str:
    """Makes the folder of Ray's sockets and logs; Ray's processes are tied to their parents and marked as engines are:
    see `engine/guard`."""
    temp = tempfile.mkdtemp(prefix="steelyard-")  # sockets live there: their paths must stay under 107 bytes
    os.environ |= {
        "STEELYARD_RUNTIME_DIR": temp,
        "PYTHONPATH": ":".join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "STEELYARD_PARENT": str(os.getpid()),
        "SPT_NOENV": "1",  # a process that sets its title would wipe the mark
        STACK_MARK: f"{settings.state_dir}:ray",
    }
    return temp


def start(settings: Settings, profile: Profile) -> ClusterFile:
    """A one-node Ray cluster whose processes die with this one. Listens on 127.0.0.1 only, without the dashboard."""
    environment(settings, one_node=True)
    import ray

    temp = runtime_folder(settings)
    try:
        ray.init(
            address="local",
            num_cpus=LOGICAL_CPUS,
            num_gpus=gpus(settings, profile),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="steelyard",
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=temp,
        )
    except Exception as e:
        kept = keep_logs(settings, temp)
        shutil.rmtree(temp, ignore_errors=True)
        raise ClusterError(f"Ray did not start: {one_line(e)}", f"see {kept}") from None
    address = ray.get_runtime_context().gcs_address
    found = ClusterFile(address=address, pid=os.getpid(), temp_dir=temp, profile=profile)
    write_cluster_file(settings, found)
    return found


def keep_logs(settings: Settings, temp_dir: str) -> Path:
    """The ends of the logs of a Ray that failed, instead of those of the one before: its own folder goes. Returns where
    they are."""
    kept = settings.log_dir / "ray"
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):  # why it failed is told all the same
        kept.mkdir(mode=0o700, parents=True)
        for log in Path(temp_dir).glob("session_[0-9]*/logs/*"):
            if log.is_file():
                with log.open("rb") as whole:
                    whole.seek(max(0, log.stat().st_size - _KEPT_OF_A_LOG))
                    (kept / log.name).write_bytes(whole.read(_KEPT_OF_A_LOG))
    return kept


def write_cluster_file(settings: Settings, found: ClusterFile) -> None:
    found = msgspec.structs.replace(found, process=pids.mark(found.pid))
    write_private(_path(settings), msgspec.json.encode(found).decode())


@contextmanager
def joined(settings: Settings) -> Iterator[None]:
    """Connected to the running cluster, for one command."""
    found = read_cluster_file(settings)
    address = settings.ray_address or (found.address if found else None)
    if address is None:
        raise ClusterError(f"no cluster runs for {settings.state_dir}", "start one with `steelyard up`")
    environment(settings, one_node=found is not None and found.role == "one")
    import ray

    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="steelyard",
            _node_ip_address=settings.node_address or (found.node_address if found else None),
        )
    except Exception as e:
        raise ClusterError(f"cannot join the cluster at {address}: {one_line(e)}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def only_writer(settings: Settings) -> Iterator[None]:
    """Held by a command that changes what is served, from what it reads until it has applied it: what another one changes
    in between would be undone."""
    lock = FileLock(settings.state_dir / "apply.lock", timeout=_TURN_S, mode=0o600)
    try:
        held = lock.acquire()
    except Timeout:
        raise OperatorError("another command is changing what is served", "try again when it is done") from None
    except OSError as e:
        raise OperatorError(f"cannot write {lock.lock_file}: {e.strerror}") from None
    with held:
        yield


def apply(config: dict[str, Any]) -> None:
    """Makes the cluster serve `config`; applications that did not change keep their processes."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="Disabled")
        _get_global_client().deploy_apps(schema)
    except Exception as e:
        raise ClusterError(f"Serve did not take the config: {one_line(e)}") from None


def forget_failures() -> None:
    """Replicas that wait because their starts failed try again now."""
    with contextlib.suppress(ClusterError):  # a directory that is away has forgotten
        ask_directory("forget_failures")


def snapshot() -> Snapshot:
    """The directory's table now."""
    from serving.fleet.directory import unpack

    return unpack(ask_directory("snapshot"), Snapshot)


def ask_directory(method: str, *args: Any) -> Any:
    """One call of the directory's."""
    import ray

    from serving.fleet import directory

    try:
        return ray.get(getattr(directory.handle(), method).remote(*args), timeout=10)
    except (ray.exceptions.RayError, TimeoutError) as e:
        raise ClusterError(f"the directory does not answer: {type(e).__name__}", "try again in a moment") from None


def deployed_apps() -> dict[str, dict[str, Any]]:
    """Application -> its part of the Serve config, as it was applied last."""
    found = _ask_controller("get_app_configs") or {}
    return {name: schema.model_dump(exclude_unset=True) for name, schema in found.items()}


def target_counts() -> dict[str, int]:
    """Application -> replicas that Serve steers its deployment to."""
    found = (_ask_controller("get_serve_instance_details") or {"applications": {}})["applications"]
    return {n: sum(d["target_num_replicas"] for d in a["deployments"].values()) for n, a in found.items()}


def _ask_controller(method: str) -> Any:
    """One call of Serve's controller; None while there is none."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    try:
        return ray.get(getattr(client._controller, method).remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError) as e:
        raise ClusterError(f"Serve does not answer: {type(e).__name__}", "try again in a moment") from None


def app_statuses() -> dict[str, tuple[str, str]]:
    """Application -> (Serve's status, message)."""
    from ray import serve

    told = {}
    for name, a in serve.status().applications.items():
        # The application's message says that a deployment failed, the deployment's says why.
        messages = [a.message, *(d.message for d in a.deployments.values())]
        told[name] = (str(a.status.value), "\n".join(filter(None, messages)))
    return told


def nodes() -> list[dict[str, Any]]:
    """Every node that is alive, the head first: its address, role, GPUs, and Ray's id of it."""
    import ray
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    found = [
        {
            "node": n["NodeManagerAddress"],
            "role": "head" if HEAD_NODE_RESOURCE_NAME in n["Resources"] else "worker",
            "gpus": n["Resources"].get("GPU", 0.0),
            "node_id": n["NodeID"],
        }
        for n in ray.nodes()
        if n["Alive"]
    ]
    return sorted(found, key=lambda n: (n["role"], n["node"]))


class Room(msgspec.Struct, frozen=True):
    """What a node has left, in Ray's words."""

    free: dict[str, float]
    labels: dict[str, str]

    def fits(self, options: Mapping[str, Any]) -> bool:
        """Whether an actor with these `ray_actor_options` could start there now."""
        wanted = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
        if options.get("accelerator_type"):
            wanted[f"accelerator_type:{options['accelerator_type']}"] = 0.001
        return all(self.free.get(name, 0) >= amount for name, amount in wanted.items()) and all(
            self.labels.get(key) == value for key, value in options.get("label_selector", {}).items()
        )


def free_nodes() -> list[Room]:
    """What each node that stays has left. Ray's own count, which may be a second old."""
    import ray
    from ray._private.state import available_resources_per_node

    free, staying = available_resources_per_node(), staying_nodes()
    return [Room(free.get(n["NodeID"], {}), n["Labels"]) for n in ray.nodes() if n["NodeID"] in staying]


def stop(settings: Settings, found: ClusterFile, drain_s: float) -> None:
    """Ends the cluster this process started: Serve drains within its bounds, then everything goes."""
    import ray

    if drain_s > 0 and ray.is_initialized():
        _shut_serve(drain_s)
    ray.shutdown()
    sweep(f"{settings.state_dir}:", prefix=True)
    remove(settings, found.temp_dir)


def _shut_serve(drain_s: float) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        _get_global_client().shutdown(timeout_s=drain_s)
    except Exception as e:  # it ends anyway when Ray does
        logging.getLogger(__name__).warning("Serve did not shut down in time: %s", one_line(e))
    serve.context._set_global_client(None)


def clear(settings: Settings) -> int:
    """Removes what a killed predecessor could not remove itself: processes (their count), temporary folder."""
    left = sweep(f"{settings.state_dir}:", prefix=True)
    try:
        old = json.loads(_path(settings).read_text())["temp_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return left
    remove(settings, old)
    return left


def remove(settings: Settings, temp_dir: str) -> None:
    """The traces of a cluster that ended."""
    _path(settings).unlink(missing_ok=True)
    if Path(temp_dir).name.startswith("steelyard-"):
        shutil.rmtree(temp_dir, ignore_errors=True)


def write_private(path: Path, text: str) -> None:
    """Atomically, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, text.encode())


def one_line(e: BaseException) -> str:
    lines = [line for line in str(e).splitlines() if line.strip()]
    return (lines[-1] if lines else type(e).__name__)[:400]
