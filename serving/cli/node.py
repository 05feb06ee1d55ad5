"""`steelyard node head` and `steelyard node worker`: this machine's part of a cluster, in the foreground, for a unit.
`steelyard node drain`: the same end for a node that something else starts and stops, as Kubernetes does.

The main process starts Ray's processes as its children and watches them; it is no part of Ray itself, so the control store
may go away and come back without it. `_run` is the summary. Ends:
  * SIGTERM: requests in progress on this node finish within `STEELYARD_NODE_DRAIN_S`, others go elsewhere; exit code 0;
  * one of Ray's processes dies: one sentence, everything of this node ends, exit code 1, and the unit starts it again;
  * `kill -9`: every process of Ray and of engines on this node ends with it (`engine/guard`, and the kernel for Ray's own).
Engines and gateways of the other nodes serve on in each case, also while the head is away.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.cli import cluster, up
from serving.cli.cluster import ClusterFile, one_line
from serving.cli.term import one_line_errors
from serving.engine.process import sweep
from serving.errors import ClusterError, OperatorError
from serving.settings import Profile, Role, Settings, read_private

Say = Callable[[str], None]

# How long a worker's processes keep trying to reach a head that is away, serving on meanwhile. Ray's own limit is a minute,
# after which they end themselves; a head may have to be repaired.
HEAD_AWAY_S = 24 * 3600
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_TRY_EVERY_S = 1.0
_SAY_EVERY_S = 10.0
_STARTED_WITHIN_S = 300  # opening a large control store after a crash takes longest


class _Stop(BaseException):
    """SIGTERM before Ray is up: nothing to drain."""


def run_head(settings: Settings, say: Say) -> None:
    """Stays until told to stop. Raises OperatorError when this node cannot start or Ray dies."""
    settings = _as_node(settings, "head")
    if settings.head is not None:
        raise OperatorError("STEELYARD_HEAD is set on the head", "unset it: it tells a worker where the head is")
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with up.only_one(settings, say):
        up.prepare_secrets(settings, say)
        up.preflight(settings)
        _require_free(settings.node_address, settings.ray_port, "set STEELYARD_RAY_PORT to a free one")
        _run(settings, say, _start_head)


def run_worker(settings: Settings, say: Say) -> None:
    """Waits for the head, joins, and stays until told to stop. Raises OperatorError when it cannot join or Ray dies."""
    settings = _as_node(settings, "worker")
    host, port = _head_of(settings)
    for name in ("cluster-secret", "ray-token"):
        path = settings.secret_file if name == "cluster-secret" else settings.state_dir / name
        if name != "cluster-secret" or settings.cluster_secret is None:
            read_private(path, f"the cluster's {name}", f"copy it from the head ({host}), mode 0600")
    with up.only_one(settings, say):
        up.preflight(settings)
        _run(settings, say, partial(_start_worker, head=(host, port)))


def _run(settings: Settings, say: Say, start: Callable[[Settings, str, Profile, Say], Any]) -> None:
    """Start, stay, drain, stop."""
    told_to_stop = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, _interrupt)
    cluster.environment(settings, one_node=False)
    os.environ |= _ray_settings(settings)
    unit = os.environ.pop("NOTIFY_SOCKET", "")
    temp = cluster.runtime_folder(settings)
    profile = up.profile_of(settings)
    try:
        node = start(settings, temp, profile, say)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, lambda *_: told_to_stop.set())
        _write_cluster_file(settings, node, temp, profile)
        say(f"{settings.node_role} {settings.node_address} is up; control store {node.gcs_address}")
        _notify(unit, "READY=1")
        _watch(node, told_to_stop, settings, temp)
        _notify(unit, "STOPPING=1")
        say(f"stopping; requests in progress get up to {settings.node_drain_s:g} s")
        for sig in (signal.SIGTERM, signal.SIGINT):  # a second one does not wait for them
            signal.signal(sig, lambda *_: os._exit(1))
        _drain(node, settings, say)
    except _Stop:
        say("stopped before it was up")
    finally:
        sweep(f"{settings.state_dir}:", prefix=True)
        cluster.remove(settings, temp)
        settings.pid_file.unlink(missing_ok=True)
    say("stopped")


def drain(settings: Settings, say: Say, *, within_s: float, accept_for_s: float = 0.0) -> None:
    """Before whoever started this node's Ray stops it: requests in progress finish, others go elsewhere; returns when nothing
    of ours is left here or `within_s` has passed. Until `accept_for_s` (at most half of that) this node takes new
    requests too: balancers hear of its end no sooner. Raises OperatorError on a node that a unit or `up` started."""
    if settings.ray_address is None:
        raise OperatorError(
            "this node was not started by Kubernetes: what started it drains it",
            "`systemctl stop` its unit, or `steelyard down` where one node is the whole stack",
        )
    deadline = time.monotonic() + within_s
    accept_until = time.monotonic() + min(accept_for_s, within_s / 2)

    def left_s(until: float = deadline) -> float:
        return max(0.0, until - time.monotonic())

    try:
        with cluster.joined(settings):
            import ray
            from ray._raylet import GcsClient  # type: ignore[attr-defined]

            here, store = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address
            is_head = any(n["node_id"] == here and n["role"] == "head" for n in cluster.nodes())
            time.sleep(left_s(accept_until))
            if is_head:
                say(f"the head drains its own gateways and engines, for at most {left_s():.0f} s")
                _shut_replicas_of(here, left_s())
        if not is_head:  # outside: this process is no part of the node that is to become empty
            say(f"this node drains, for at most {left_s():.0f} s")
            client = GcsClient(address=store)
            _leave(client, here, left_s(), lambda: not client.check_alive([ray.NodeID.from_hex(here)], timeout=5)[0])
    except Exception as e:  # Ray's own errors are many: without its head nobody can be told
        say(f"the cluster cannot be told: {one_line(e)}; requests in progress here get the rest of the time")
        time.sleep(left_s())
    say("drained" if left_s() else "the time is over; what is left ends with this node")


# -- start ---------------------------------------------------------------------------------------------------------


def _as_node(settings: Settings, role: Role) -> Settings:
    """Settings of a node of several: its own address, which its gateways listen on unless told otherwise."""
    address = settings.node_address
    if address is None:
        raise OperatorError("STEELYARD_NODE_ADDRESS is not set", "set it to this node's IP address in the cluster")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise OperatorError(f"STEELYARD_NODE_ADDRESS={address!r} is no IP address", "write it as 10.0.0.11") from None
    if parsed.is_unspecified or parsed.is_loopback:
        raise OperatorError(
            f"STEELYARD_NODE_ADDRESS={address} cannot be reached by other nodes",
            "set it to this node's IP address in the cluster; one node alone is `steelyard up`",
        )
    with socket.socket(socket.AF_INET6 if parsed.version == 6 else socket.AF_INET) as s:
        try:
            s.bind((address, 0))
        except OSError:
            raise OperatorError(
                f"STEELYARD_NODE_ADDRESS={address} is no address of this machine", "`ip -br address` shows them"
            ) from None
    _labels(settings.node_labels)
    update: dict[str, object] = {"node_role": role}
    if "host" not in settings.model_fields_set:
        update["host"] = address
    return settings.model_copy(update=update)


def _head_of(settings: Settings) -> tuple[str, int]:
    text = settings.head or ""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise OperatorError(
            f"STEELYARD_HEAD={text!r} is not HOST:PORT", "write the head's address, e.g. 10.0.0.10:6379"
        )
    return host.strip("[]"), int(port)


def _labels(text: str) -> dict[str, str]:
    """Of `key=value,key=value`. Ray allows what Kubernetes allows."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not (equals and _LABEL.fullmatch(key) and _LABEL.fullmatch(value)):
            raise OperatorError(f"STEELYARD_NODE_LABELS={text!r}: {part!r} is no label", "write region=eu,rack=7")
        if key.startswith("ray.io/"):
            raise OperatorError(f"STEELYARD_NODE_LABELS: {key} is one of Ray's own labels", "use another prefix")
        found[key] = value
    return found


def _require_free(address: str | None, port: int, fix: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((address, port))
        except OSError as e:
            raise OperatorError(f"cannot listen on {address}:{port}: {e.strerror}{up.by_whom(port)}", fix) from None


def _ray_settings(settings: Settings) -> dict[str, str]:
    """What makes a cluster outlive its head. Ray reads them in every process of every node."""
    found = {
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_AWAY_S),
        "RAY_health_check_period_ms": "1000",  # a node whose raylet died is noticed in five of them
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the drain is ours
        "RAY_gcs_server_port_wait_time_s": str(_STARTED_WITHIN_S),
    }
    if settings.node_role == "head" and settings.redis is None:
        store = settings.state_dir / "gcs"
        store.mkdir(mode=0o700, exist_ok=True)
        found |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)}
    elif settings.node_role == "head":  # Ray's own default is one name for all
        found["RAY_external_storage_namespace"] = settings.redis_namespace()
    return found


def _start_head(settings: Settings, temp: str, profile: Profile, say: Say) -> Any:
    say(f"starting the head on {settings.node_address}:{settings.ray_port}")
    runs_engines = settings.head_runs_engines
    if runs_engines is None:
        runs_engines = profile == "gpu" and up.detect_profile() == "gpu"
    more: dict[str, Any] = {}
    if settings.redis is not None:
        _check_redis(settings.redis, settings.redis_username, settings.redis_password())
        more = {
            "external_addresses": [settings.redis, settings.redis],
            "num_redis_shards": 1,
            "redis_username": settings.redis_username,
            "redis_password": settings.redis_password(),
        }
    gpus = cluster.gpus(settings, profile) if runs_engines else 0
    return _ray_node(
        settings,
        temp,
        head=True,
        num_cpus=cluster.LOGICAL_CPUS if runs_engines else 0,
        num_gpus=gpus,
        gcs_server_port=settings.ray_port,
        no_monitor=True,  # Ray's autoscaler: machines do not come by themselves here
        **more,
    )


def _check_redis(address: str, username: str, password: str) -> None:
    """Asks it once before Ray does: Ray aborts the whole process, with a stack trace, when it may not enter. One with TLS
    (`rediss://`) is left to Ray, which alone knows its certificates."""
    if address.startswith("rediss://"):
        return
    host, _, port = address.removeprefix("redis://").rpartition(":")
    if not host or not port.isdigit():
        raise OperatorError(
            f"STEELYARD_REDIS={address!r} is not HOST:PORT", "write 10.0.0.9:6379 or rediss://HOST:PORT"
        )
    auth = ["AUTH", *([username] if username else []), password] if password else []
    asked = b""
    for words in filter(None, (auth, ["PING"])):
        asked += f"*{len(words)}\r\n".encode()
        asked += b"".join(f"${len(w.encode())}\r\n{w}\r\n".encode() for w in words)
    told = b""
    try:
        with socket.create_connection((host, int(port)), 5) as s, s.makefile("rb") as answer:
            s.sendall(asked)
            for _ in range(1 + bool(auth)):
                told = answer.readline().strip()
                if told.startswith(b"-"):
                    break
    except OSError as e:
        raise ClusterError(
            f"no Redis at {address}: {e.strerror or e}", "start it, or correct STEELYARD_REDIS"
        ) from None
    if told != b"+PONG":
        said = told[1:].decode(errors="replace") or "it says nothing"
        raise ClusterError(
            f"the Redis at {address} refuses: {said}",
            "correct STEELYARD_REDIS_USERNAME and STEELYARD_REDIS_PASSWORD_FILE",
        )


def _start_worker(settings: Settings, temp: str, profile: Profile, say: Say, head: tuple[str, int]) -> Any:
    address = _await_head(head, settings, say)
    say(f"joining {address} as {settings.node_address}")
    return _ray_node(
        settings,
        temp,
        head=False,
        num_cpus=cluster.LOGICAL_CPUS,
        num_gpus=cluster.gpus(settings, profile),
        gcs_address=address,
    )


def _ray_node(settings: Settings, temp: str, *, head: bool, **more: Any) -> Any:
    """Ray's processes of this node, as children that the kernel ends with this process."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Processes(Node):  # type: ignore[misc]
        def start_api_server(self, **_: object) -> None:
            """Not started: even without the dashboard it would listen on every interface, and nothing here asks it."""

    params = RayParams(
        node_ip_address=settings.node_address,
        node_name=settings.node_address,
        labels=_labels(settings.node_labels),
        object_store_memory=cluster.OBJECT_STORE_BYTES,
        temp_dir=temp,
        dashboard_agent_listen_port=0,  # any: a fixed one could be taken
        include_log_monitor=False,  # nobody reads logs through Ray
        **more,
    )
    try:
        return Processes(params, head=head, shutdown_at_exit=False, spawn_reaper=True)
    except Exception as e:
        raise ClusterError(f"Ray did not start on {settings.node_address}: {_why(e, temp)}") from None


def _await_head(head: tuple[str, int], settings: Settings, say: Say) -> str:
    """Until the head answers; says so while it does not. Returns its IP address and port. A wrong token or another
    version is an error at once."""
    from ray._common.usage import usage_lib
    from ray._private.utils import compute_version_info
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    where = f"{head[0]}:{head[1]}"
    refused = ClusterError(
        f"the head at {where} refuses this node's token",
        f"copy {settings.state_dir / 'ray-token'} from the head, mode 0600",
    )
    deadline, next_line = time.monotonic() + settings.head_wait_s, 0.0
    while True:
        try:
            with socket.create_connection(head, 3) as s:
                host, port = s.getpeername()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            told = usage_lib.get_cluster_metadata(GcsClient(address=address))
            if told:
                break
            why = "it is still starting"
        except AuthenticationError:
            raise refused from None
        except Exception as e:  # refused, unreachable, no such name, no answer: it may come
            why = one_line(e)
            if "authentication token" in why.lower():
                raise refused from None
        if time.monotonic() > deadline:
            raise ClusterError(f"no head at {where} within {settings.head_wait_s:g} s: {why}", "start it first")
        if time.monotonic() > next_line:
            say(f"waiting for the head at {where}: {why}")
            next_line = time.monotonic() + _SAY_EVERY_S
        time.sleep(_TRY_EVERY_S)
    _same_release(compute_version_info()[:2], (told["ray_version"], told["python_version"]))
    return address


def _same_release(mine: tuple[str, str], theirs: tuple[str, str]) -> None:
    """Ray and Python must be the same on every node: Ray would fail later, and say less."""
    if mine != theirs:
        raise ClusterError(
            f"the head runs Ray {theirs[0]} on Python {theirs[1]}, this node Ray {mine[0]} on Python {mine[1]}",
            "install the same release on every node",
        )


def _write_cluster_file(settings: Settings, node: Any, temp: str, profile: Profile) -> None:
    assert settings.node_address is not None
    found = ClusterFile(
        address=node.gcs_address,
        pid=os.getpid(),
        temp_dir=temp,
        profile=profile,
        role=settings.node_role,
        node_address=settings.node_address,
        host=settings.host,
        port=settings.port,
    )
    cluster.write_cluster_file(settings, found)


# -- stay and stop ---------------------------------------------------------------------------------------------------


def _watch(node: Any, stop: threading.Event, settings: Settings, temp: str) -> None:
    while not stop.wait(0.5):
        dead = node.dead_processes()
        if dead:
            kind, process = dead[0]
            raise ClusterError(
                f"Ray's {kind} on this node ended (exit code {process.returncode})",
                f"see {cluster.keep_logs(settings, temp)}",
            )


def _drain(node: Any, settings: Settings, say: Say) -> None:
    """Requests in progress finish, new ones go elsewhere. Bounded, and best effort: without a head nobody can be told."""
    if settings.node_drain_s <= 0:
        return
    try:
        if settings.node_role == "head":
            with cluster.joined(settings):
                _shut_replicas_of(node.node_id, settings.node_drain_s)
        else:
            client = node.get_gcs_client()
            _leave(client, node.node_id, settings.node_drain_s, lambda: bool(node.dead_processes()))
    except Exception as e:
        say(f"stopping without a drain: {one_line(e)}")


def _leave(client: Any, node_id: str, bound_s: float, gone: Callable[[], bool]) -> None:
    """Tells the head that this node goes: Serve starts its replicas elsewhere where there is room, drains these, and Ray
    ends the node when the last is gone."""
    from ray.core.generated import autoscaler_pb2

    deadline = time.monotonic() + bound_s
    accepted, why = client.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "steelyard stops this node",
        int((time.time() + bound_s) * 1000),
        timeout=5,
    )
    if not accepted:
        raise ClusterError(f"Ray refuses to drain this node: {why}")
    while time.monotonic() < deadline and not gone():
        time.sleep(0.1)


def _shut_replicas_of(node_id: str, bound_s: float) -> None:
    """The head's own gateways and engines: Serve cannot drain them, its controller goes with this node. Ray is joined."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    details = ray.get(controller.get_serve_instance_details.remote(), timeout=5)
    calls = []
    for app in details["applications"].values():
        for deployment in app["deployments"].values():
            for replica in deployment["replicas"]:
                if replica["node_id"] == node_id:
                    with contextlib.suppress(ValueError):  # it has just ended
                        actor = ray.get_actor(replica["actor_name"], namespace=SERVE_NAMESPACE)
                        calls.append(actor.perform_graceful_shutdown.remote())
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=bound_s)


def _interrupt(*_: object) -> None:
    raise _Stop


def _notify(unit: str, state: str) -> None:
    """Tells systemd (`Type=notify`), when it is there. See sd_notify(3)."""
    if unit:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.connect("\0" + unit[1:] if unit.startswith("@") else unit)
            s.sendall(state.encode())


def _why(e: BaseException, temp: str) -> str:
    """Ray's reason in one line; its control store's own words when it has any."""
    said = one_line(e)
    for log in sorted(Path(temp).glob("session_*/logs/gcs_server.*")):
        with contextlib.suppress(OSError):
            telling = [line for line in log.read_text(errors="replace").splitlines() if " C " in line or " E " in line]
            if telling:
                return f"{said} | {telling[-1][:300]}"
    return said


# -- commands ----------------------------------------------------------------------------------------------------------

app = typer.Typer(help="This machine as a node of a cluster; for units and pods.", no_args_is_help=True)


def _say(line: str) -> None:
    print(line, flush=True)


@app.command()
def head() -> None:
    """Run this machine as the cluster's head, in the foreground."""
    from serving.settings import load_settings

    with one_line_errors():
        run_head(load_settings(), _say)


@app.command()
def worker() -> None:
    """Run this machine as a worker of the cluster at STEELYARD_HEAD, in the foreground."""
    from serving.settings import load_settings

    with one_line_errors():
        run_worker(load_settings(), _say)


@app.command("drain")
def drain_(
    within: Annotated[
        float | None, typer.Option(min=0, help="Seconds for all of it; by default STEELYARD_NODE_DRAIN_S.")
    ] = None,
    accept_for: Annotated[
        float, typer.Option(min=0, help="Seconds at first in which new requests are still taken: balancers are slow.")
    ] = 0,
) -> None:
    """Empty this node before its pod ends: for the preStop hook of the Helm chart."""
    from serving.settings import load_settings

    with one_line_errors():
        settings = load_settings()
        bound = settings.node_drain_s if within is None else within
        drain(settings, _say, within_s=bound, accept_for_s=accept_for)
