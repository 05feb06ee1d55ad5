"""`steelyard up`: from a catalog to a ready endpoint. `run` is the summary; each step is a function."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from serving.catalog import store, weights
from serving.catalog.spec import Catalog
from serving.cli import bounds, cluster
from serving.cli.cluster import write_private
from serving.engine.probe import check_arguments
from serving.errors import ClusterError, EngineError, OperatorError, PortTaken, counted
from serving.fleet import manifest
from serving.fleet.endpoint import GATEWAY_APP, Snapshot, State
from serving.gateway.keys import create_key
from serving.settings import Profile, Settings

Say = Callable[[str], None]

STOP_DRAIN_S = 8.0  # Ctrl-C and SIGTERM: how long streams in progress may take to finish
_UNHEALTHY_S = 60.0  # longest wait for an application that Serve calls unhealthy to recover
_START_FAILED = "A replica failed to start with exception"  # of Serve's messages
_NODE_DIED = "its node has died"  # of Ray's, in them
_START_AGAIN = "see why in its output or its unit's log, then run `steelyard up` again"
_FREE_DISK_BYTES = 512 * 1024 * 1024  # logs and sockets


def detect_profile() -> Profile:
    """gpu when NVML sees a GPU, else cpu."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return "cpu"
    return "gpu" if count else "cpu"


def profile_of(settings: Settings) -> Profile:
    """The one asked for, else the running stack's, else what this machine has."""
    running = cluster.read_cluster_file(settings)
    return settings.profile or (running.profile if running else detect_profile())


def load_catalog(settings: Settings) -> Catalog:
    return store.load(settings.models, profile_of(settings), simulated_gpus=settings.nvml_script is not None)


def locator(settings: Settings, *, here: bool = True) -> manifest.Locate:
    """Where weights lie, without building or fetching anything; unless `here`, other nodes may hold them."""
    return lambda source, base: weights.locate(source, base=base, cache=settings.cache_dir, here=here)


def run(settings: Settings, say: Say) -> None:
    """Starts a cluster for the catalog and stays until told to stop; or, when one runs for this state folder already,
    applies the catalog to it and returns."""
    began = time.monotonic()
    catalog = load_catalog(settings)
    running = cluster.read_cluster_file(settings)
    check_engine_arguments(catalog, settings)
    if settings.ray_address or running:
        _apply(catalog, running, settings, say)
        _print_ready(catalog, _as_running(settings, running), say, time.monotonic() - began, stays=False)
        return
    config = _config(catalog, settings, say)
    with only_one(settings, say):
        preflight(settings)
        prepare_weights(catalog, settings, say)
        prepare_secrets(settings, say)
        _serve(catalog, config, settings, say, began)


def _apply(catalog: Catalog, running: cluster.ClusterFile | None, settings: Settings, say: Say) -> None:
    """Applies the catalog to a cluster that runs and waits until it is ready."""
    alone = running is not None and running.role == "one"
    if alone:
        prepare_weights(catalog, settings, say)
    with cluster.joined(settings):
        with cluster.only_writer(settings):
            # Of several nodes, this one may run no engine: each replica checks the weights on its own.
            config = _config(catalog, settings, say, nodes=len(cluster.nodes()), alone=alone)
            served = cluster.deployed_apps()
            for name in surge(config, served, cluster.free_nodes()):
                say(f"{name}: no node has room for a second replica, so the old one stops before the new one starts")
            keep_gateways(config, served, cluster.target_counts().get(GATEWAY_APP, 0))
            before = {name: message for name, (_, message) in cluster.app_statuses().items()}
            cluster.forget_failures()
            cluster.apply(config)
        _wait(config, _as_running(settings, running), say, before=before)


def _config(catalog: Catalog, settings: Settings, say: Say, *, nodes: int = 1, alone: bool = True) -> dict[str, Any]:
    """What is to be served: the catalog, with the bounds that were set at run time over it. `alone`: on this node for ever."""
    catalog, set_at_run_time = bounds.laid_over(catalog, settings)
    for line in set_at_run_time:
        say(line)
    locate = locator(settings, here=alone)
    config = manifest.serve_config(catalog, gateways=settings.gateways, nodes=nodes, locate=locate)
    if alone:
        gateways_go_anywhere(config)
    return config


def gateways_go_anywhere(config: dict[str, Any]) -> None:
    """Where there is one node there is nothing to spread, and the bound would be in the way: Ray has each replica hold its share
    of a node as it was at its start, so that with two of at most two there is no room for a third of at most four."""
    app = next(a for a in config["applications"] if a["name"] == GATEWAY_APP)
    del app["deployments"][0]["max_replicas_per_node"]


def surge(config: dict[str, Any], served: Mapping[str, dict[str, Any]], nodes: Sequence[cluster.Room]) -> list[str]:
    """Has new replicas start before those that they replace stop, wherever a node has room for one: where none has, they
    would wait for ever. Returns the applications that are replaced without."""
    without = []
    for app in config["applications"]:
        if app["name"] == GATEWAY_APP:
            continue
        engine = app["deployments"][0]
        fits = any(room.fits(engine["ray_actor_options"]) for room in nodes)
        engine["max_surge_percent"] = 100 if fits else 0
        if not fits and served.get(app["name"], app)["args"] != app["args"]:
            without.append(app["name"])
    return without


def keep_gateways(config: dict[str, Any], served: Mapping[str, dict[str, Any]], steered_to: int) -> None:
    """Leaves it to `fleet/keeper` to take gateways away when nodes are gone: before Serve has noticed whose node that is, a
    smaller number stops the gateway of a live one."""
    wanted = next(a for a in config["applications"] if a["name"] == GATEWAY_APP)["deployments"][0]
    bound = wanted.get("max_replicas_per_node")
    before = served.get(GATEWAY_APP, {}).get("deployments", [{}])[0].get("max_replicas_per_node")
    if bound is not None and before == bound:
        wanted["num_replicas"] = max(wanted["num_replicas"], steered_to)


def _as_running(settings: Settings, running: cluster.ClusterFile | None) -> Settings:
    """Settings with the address on which this node's gateways listen in fact."""
    if running is None or running.host is None:
        return settings
    return settings.model_copy(update={"host": running.host, "port": running.port})


def _serve(catalog: Catalog, config: dict[str, Any], settings: Settings, say: Say, began: float) -> None:
    told_to_stop = threading.Event()
    turn = contextlib.ExitStack()  # as soon as there is a cluster file, other commands would apply to it, and be undone
    turn.enter_context(cluster.only_writer(settings))
    say("starting Ray")
    found = cluster.start(settings, profile_of(settings))
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda *_: told_to_stop.set())
    ready = False
    try:
        say(f"starting {counted(len(config['applications']) - 1, 'engine')}")
        cluster.apply(config)
        turn.close()
        own = _wait(config, settings, say, told_to_stop)
        ready = not told_to_stop.is_set()
        if ready:
            _print_ready(catalog if own else None, settings, say, time.monotonic() - began, stays=True)
            write_private(settings.state_dir / "ready", f"{_url(settings)}\n")
            _until(told_to_stop, settings, found.temp_dir)
    finally:
        with contextlib.suppress(OSError):  # a disk or a reader that is gone may be why
            (settings.state_dir / "ready").unlink(missing_ok=True)
            say("stopping")
        for sig in (signal.SIGINT, signal.SIGTERM):  # a second one does not wait for streams
            signal.signal(sig, lambda *_: os._exit(1))
        # Not where Ray has died: it would be asked to drain, and complain.
        cluster.stop(settings, found, STOP_DRAIN_S if ready and _ray_lives() else 0.0)
        settings.pid_file.unlink(missing_ok=True)
        say("stopped")


def detach(settings: Settings, argv: list[str], say: Say) -> None:
    """Runs `up` in the background and returns when it is ready; its output goes to a log file."""
    if cluster.read_cluster_file(settings):
        run(settings, say)
        return
    weights.require_free_disk(settings.state_dir, _FREE_DISK_BYTES, "the state folder", "STEELYARD_STATE_DIR")
    log = settings.log_dir / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    ready = settings.state_dir / "ready"
    ready.unlink(missing_ok=True)
    with open(log, "wb") as out:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    shown = 0
    while child.poll() is None and not ready.exists():
        shown = _show_new(log, shown, say)
        time.sleep(0.2)
    _show_new(log, shown, say)
    if child.poll() is not None:
        raise OperatorError("the stack did not start", f"see {log}")


def down(settings: Settings, say: Say, timeout_s: float = 60.0) -> None:
    """Stops the stack of this state folder and waits until its processes are gone."""
    found = cluster.read_cluster_file(settings)
    if found is not None and found.role != "one":
        raise OperatorError(f"this is the {found.role} of a cluster", f"stop its unit, steelyard-{found.role}")
    pid = found.pid if found else _pid(settings)
    if pid is None:
        cluster.clear(settings)
        say("nothing runs")
        return
    try:
        main = psutil.Process(pid)
        main.terminate()  # nobody else who has the number by now
        say(f"stopping (pid {pid})")
        main.wait(timeout_s)
    except psutil.TimeoutExpired:
        raise OperatorError(
            f"pid {pid} did not stop within {timeout_s:g} s", f"kill -9 {pid} ends everything"
        ) from None
    except (
        psutil.NoSuchProcess,
        FileNotFoundError,
    ):  # it ended in this instant: some kernels have no pidfd of it any more
        pass
    say("stopped")


# -- before anything starts ----------------------------------------------------------------------------------------


def check_engine_arguments(catalog: Catalog, settings: Settings) -> None:
    for model, version in catalog.versions():
        spec = manifest.engine_spec(catalog, model, version, lambda source, base: Path(source))
        check_arguments(spec, f"{model.name}@{version.version}", settings.cache_dir)


def preflight(settings: Settings) -> None:
    """Port and secrets' files, before the slow things."""
    settings.otlp_headers()
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((settings.host, settings.port))
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"port {settings.port} on {settings.host} is taken{by_whom(settings.port)}",
                    "set PORT to a free one",
                ) from None
            raise OperatorError(f"cannot listen on {settings.host}:{settings.port}: {e.strerror}", "set HOST") from None


def prepare_weights(catalog: Catalog, settings: Settings, say: Say) -> None:
    """Builds or finds and verifies everything the catalog names; progress is passed on."""
    for model, version in catalog.versions():
        base = catalog.folders[model.name]
        if version.weights is None:
            continue
        path = weights.resolve(version.weights.source, base=base, cache=settings.cache_dir, on_progress=say)
        weights.verify(path, "model", version.weights.sha256)
        for adapter in version.adapters:
            path = weights.resolve(adapter.source, base=base, cache=settings.cache_dir, on_progress=say)
            weights.verify(path, "adapter")


def prepare_secrets(settings: Settings, say: Say) -> None:
    """Cluster secret and first key, made once, mode 0600."""
    import secrets

    settings.state_dir.mkdir(parents=True, exist_ok=True)
    if settings.cluster_secret is None and not settings.secret_file.exists():
        write_private(settings.secret_file, secrets.token_urlsafe(32))
    elif settings.cluster_secret is not None:
        # Workers read it from its file: an environment variable would reach every process of the node.
        write_private(settings.state_dir / "cluster-secret", settings.cluster_secret.get_secret_value())
    begun = settings.state_dir / ".first-key"  # still there: whoever made one may have been killed before it was told
    if begun.exists() or not settings.keys_file.exists():
        begun.touch()
        _, token = create_key(
            settings.keys_file, name="first", scopes=["infer:*", "metrics", "admin"], now=time.time(), expires_at=None
        )
        write_private(settings.api_key_file, token + "\n")
        begun.unlink()
        say(f"made the first key: {_short(settings.api_key_file)}")


def only_one(settings: Settings, say: Say) -> FileLock:
    """Held by the main process of this state folder; nothing of an earlier one runs any more, or holds its ports."""
    weights.require_free_disk(settings.state_dir, _FREE_DISK_BYTES, "the state folder", "STEELYARD_STATE_DIR")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(settings)
    try:
        lock.acquire()
    except Timeout:
        raise OperatorError(f"another `steelyard up` is at work in {settings.state_dir}", "wait, or stop it") from None
    settings.pid_file.write_text(f"{os.getpid()}\n")
    left = cluster.clear(settings)
    if left:
        say(f"removed {counted(left, 'process', 'processes')} that an earlier run left behind")
    return lock


def by_whom(port: int) -> str:
    try:
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                return f" by pid {c.pid} ({psutil.Process(c.pid).name()})"
    except psutil.Error:
        pass
    return ""


# -- until ready ---------------------------------------------------------------------------------------------------


def _wait(
    config: dict[str, Any],
    settings: Settings,
    say: Say,
    stop: threading.Event | None = None,
    before: Mapping[str, str] | None = None,
) -> bool:
    """Until every application that must be up runs and a gateway says ready; the first engine of them that fails ends the
    wait with its reason. A version that may have no replica starts with its first request, and fails with that.
    `before`: Serve's messages before the config was applied. Returns whether that is still what is served: a main process,
    which has a `stop`, goes on though another command has applied its catalog since, and waits for what is in both."""
    before, own = before or {}, True
    known = {a["name"] for a in config["applications"]}
    wanted = {a["name"] for a in config["applications"] if _must_run(a)}
    began, told, deadline = time.time(), "", time.monotonic() + settings.ready_timeout_s
    next_line = 0.0
    unhealthy: dict[str, float] = {}  # since when
    while stop is None or not stop.is_set():
        try:
            table = cluster.snapshot()
        except ClusterError:  # it starts beside everything else on a machine that is busy with that
            if stop is None and not settings.ray_address and cluster.read_cluster_file(settings) is None:
                raise ClusterError("the stack ended while the catalog was applied to it", _START_AGAIN) from None
            if time.monotonic() > deadline:
                raise
            continue
        applied = _applied_names()
        if applied not in (known, set()):
            if stop is None:
                raise OperatorError(
                    "another `steelyard up` has applied its catalog meanwhile", "`steelyard status` says what is served"
                )
            say("another `steelyard up` has applied its catalog meanwhile, which is served now")
            known, wanted, own = applied, wanted & applied, False
        for e in table.endpoints:
            if e.state is State.FAILED and e.version_id in wanted and e.started_at >= began - 1:
                raise EngineError(e.reason)
        statuses = cluster.app_statuses()
        for name, (status, message) in statuses.items():
            now = time.monotonic()
            since = unhealthy.setdefault(name, now) if status == "UNHEALTHY" else now
            if status != "UNHEALTHY":
                unhealthy.pop(name, None)
            # A replica of a node that has just died is unhealthy until Serve has started another. Serve never gives up on
            # a replica that fails; one that fails before it can tell the directory is told of here alone.
            failed = status == "DEPLOY_FAILED" or (message != before.get(name) and start_failed(message))
            if name in wanted and (failed or now - since > _UNHEALTHY_S):
                raise EngineError(f"{name}: {_sentence(message)}", f"see {settings.log_dir}")
        running = {n for n, (status, _) in statuses.items() if status == "RUNNING"}
        if wanted <= running and set(statuses) == known and (_readyz(settings) or not own):
            return own
        line = _progress(wanted, running, table)
        if line != told or time.monotonic() > next_line:
            say(f"{time.time() - began:5.1f} s  {line}")
            told, next_line = line, time.monotonic() + 10
        if time.monotonic() > deadline:
            raise EngineError(f"not ready within {settings.ready_timeout_s:g} s: {line}", f"see {settings.log_dir}")
        (stop or threading.Event()).wait(0.25)
    return own


def start_failed(message: str) -> bool:
    """Whether Serve says that a replica could not start. One that was placed on a node that Ray did not know for dead yet is
    nobody's fault: it starts elsewhere."""
    return _START_FAILED in message and _NODE_DIED not in message


def _applied_names() -> set[str]:
    """Applications of what was applied last; none where Serve is too busy to say."""
    with contextlib.suppress(ClusterError):
        return set(cluster.deployed_apps())
    return set()


def _must_run(app: dict[str, Any]) -> bool:
    bounds = app["deployments"][0].get("autoscaling_config")
    return bounds is None or bounds["min_replicas"] > 0


def _progress(wanted: set[str], running: set[str], table: Snapshot) -> str:
    def state(name: str) -> str:
        states = [str(e.state) for e in table.endpoints if e.version_id == name]
        if name in running or not states:
            return "READY" if name in running else "waiting"
        return "/".join(sorted(set(states)))

    return "  ".join(f"{name} {state(name)}" for name in sorted(wanted))


def _sentence(message: str) -> str:
    """Serve's status messages are tracebacks: their last telling line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line:
            return line.split("Error: ", 1)[-1][:500]
    return lines[-1][:500] if lines else "it failed"


def _readyz(settings: Settings) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(settings)}/readyz", timeout=2) as r:
            return bool(r.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _ray_lives() -> bool:
    import ray

    node = ray._private.worker._global_node
    return node is None or bool(node.remaining_processes_alive())


def _until(stop: threading.Event, settings: Settings, temp_dir: str) -> None:
    """Waits for the signal; ends with an error when Ray dies under us."""
    while not stop.wait(1.0):
        if not _ray_lives():
            kept = cluster.keep_logs(settings, temp_dir)
            raise OperatorError("a Ray process of this node died", f"see {kept}, then run `steelyard up` again")


def _print_ready(catalog: Catalog | None, settings: Settings, say: Say, took_s: float, *, stays: bool) -> None:
    """Without a `catalog` where it is another one's that is served."""
    url, key = _url(settings), _short(settings.api_key_file)
    models = f"  models: {', '.join(sorted(catalog.served_names))}" if catalog else ""
    say(f"ready after {took_s:.1f} s: {url}{models}")
    say(f"key: {key}")
    say("")
    if catalog:
        ask = f'curl -s {url}/v1/chat/completions -H "Authorization: Bearer $(cat {key})"'
        say(f"{ask} -H 'content-type: application/json' \\")
        body = f'{{"model": "{catalog.models[0].name}", "messages": [{{"role": "user", "content": "What is Steelyard?"}}]}}'
        say(f"  -d '{body}'")
        say("")
    if stays:
        say("Ctrl-C stops everything.")


def address(settings: Settings) -> str:
    """The URL of this node's gateways."""
    return _url(_as_running(settings, cluster.read_cluster_file(settings)))


def _url(settings: Settings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _short(path: Path) -> str:
    """Relative to the working folder, unless that is the root, as it is for units."""
    if Path.cwd() == Path("/"):
        return str(path)
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _lock(settings: Settings) -> FileLock:
    """Held by a main process for as long as it lives."""
    return FileLock(settings.state_dir / "up.lock", timeout=0)


def _pid(settings: Settings) -> int | None:
    """A main process that has not written a cluster file yet. Scripts read its pid file, so that holds the number alone; that
    the one who wrote it still runs is told by its lock, which the kernel takes from whoever ends."""
    try:
        with _lock(settings):
            return None
    except Timeout:
        with contextlib.suppress(OSError, ValueError):  # it is about to write it, or has just removed it
            return int(settings.pid_file.read_text())
    except OSError:  # there is no state folder
        pass
    return None


def _show_new(log: Path, shown: int, say: Say) -> int:
    text = log.read_bytes()
    whole = text.rfind(b"\n") + 1
    for line in text[shown:whole].decode(errors="replace").splitlines():
        say(line)
    return max(shown, whole)


def detached_argv() -> list[str]:
    return [sys.executable, "-m", "serving.cli.main", "up"]
