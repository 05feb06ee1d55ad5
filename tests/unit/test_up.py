"""What `steelyard up` makes of a catalog on a cluster that runs: what surges, and how many gateways stay."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.catalog.spec import Catalog, ModelSpec
from serving.cli import cluster, node, up
from serving.cli.cluster import ClusterFile, Room
from serving.engine.process import STACK_MARK
from serving.errors import ClusterError, EngineError, OperatorError, PortTaken
from serving.fleet import manifest
from serving.fleet.endpoint import GATEWAY_APP, Snapshot
from serving.gateway.keys import KeyRing
from serving.settings import load_settings


def config(*, nodes: int = 1, gateways: int = 1, slots: int = 8) -> dict[str, Any]:
    version = {
        "version": "a",
        "weights": {"source": "/w"},
        "engine": {"args": {"max-num-seqs": slots}},
        "resources": {"gpus": 2, "accelerator": "H100"},
    }
    spec = {"name": "m", "versions": [version], "placement": {"labels": {"region": "eu"}}}
    catalog = Catalog((ModelSpec.model_validate(spec),), {"m": Path("/")})
    return manifest.serve_config(catalog, gateways=gateways, nodes=nodes, locate=lambda source, base: Path(source))


def served(of: dict[str, Any]) -> dict[str, Any]:
    return {app["name"]: app for app in of["applications"]}


FULL = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}
EU = {"region": "eu"}


@pytest.mark.parametrize(
    ("nodes", "surges"),
    [
        ([Room(FULL, EU)], True),
        ([Room({}, EU), Room(FULL, EU)], True),
        ([Room(FULL | {"GPU": 1.0}, EU), Room(FULL | {"GPU": 1.0}, EU)], False),
        ([Room(FULL, {})], False),
        ([Room({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0}, EU)], False),
        ([], False),
    ],
)
def test_a_new_replica_starts_first_where_a_node_has_room_for_it(nodes: list[Room], surges: bool) -> None:
    wanted = config(slots=9)
    assert up.surge(wanted, served(config()), nodes) == ([] if surges else ["m@a"])
    assert served(wanted)["m@a"]["deployments"][0]["max_surge_percent"] == (100 if surges else 0)


def test_who_is_not_replaced_is_not_named() -> None:
    assert up.surge(config(), served(config()), []) == up.surge(config(), {}, []) == []


@pytest.mark.parametrize(
    ("before", "steered_to", "now", "kept"),
    [
        ({"nodes": 3}, 3, {"nodes": 2}, 3),  # a node has just died: the keeper knows when
        ({"nodes": 2}, 2, {"nodes": 3}, 3),
        ({"nodes": 2, "gateways": 2}, 4, {"nodes": 2, "gateways": 1}, 2),  # somebody wants fewer
    ],
)
def test_gateways_are_not_taken_away_because_a_node_is(
    before: dict[str, int], steered_to: int, now: dict[str, int], kept: int
) -> None:
    wanted = config(**now)
    up.keep_gateways(wanted, served(config(**before)), steered_to)
    assert served(wanted)[GATEWAY_APP]["deployments"][0]["num_replicas"] == kept


def test_the_first_up_has_as_many_gateways_as_it_asks_for() -> None:
    wanted = config(nodes=2)
    up.keep_gateways(wanted, {}, 0)
    assert served(wanted)[GATEWAY_APP]["deployments"][0]["num_replicas"] == 2


def test_on_one_node_their_number_changes_without_a_bound_in_the_way() -> None:
    """Ray has a running replica hold the share of its node that the bound was when it started."""
    before, now = config(gateways=2), config(gateways=4)
    for one in (before, now):
        up.gateways_go_anywhere(one)
    up.keep_gateways(now, served(before), 2)
    deployment = served(now)[GATEWAY_APP]["deployments"][0]
    assert deployment["num_replicas"] == 4
    assert "max_replicas_per_node" not in deployment


def test_a_main_process_that_nobody_has_waited_for_is_gone(tmp_path: Path) -> None:
    settings = load_settings(state_dir=tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as main:
        cluster.write_cluster_file(settings, ClusterFile(address="", pid=main.pid, temp_dir="", profile="sim"))
        assert cluster.read_cluster_file(settings) is not None
        assert main.stdin is not None
        main.stdin.close()
        os.waitid(os.P_PID, main.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert cluster.read_cluster_file(settings) is None


def test_what_a_killed_stack_left_does_not_keep_its_port_from_the_next(tmp_path: Path) -> None:
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    environ = os.environ | {STACK_MARK: f"{tmp_path}:ray"}
    argv = [sys.executable, "-c", listen]
    with subprocess.Popen(argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        settings = load_settings(state_dir=tmp_path, host="127.0.0.1", port=int(left.stdout.readline()))
        with pytest.raises(PortTaken):
            up.preflight(settings)
        said: list[str] = []
        with up.only_one(settings, said.append):
            up.preflight(settings)
    assert said == ["removed 1 process that an earlier run left behind"]


def ray_folder(within: Path) -> Path:
    """Of a Ray that wrote more than anybody reads."""
    made = within / "steelyard-x"
    logs = made / "session_2026-11-22_00-00-00" / "logs"
    (logs / "old").mkdir(parents=True)
    (logs / "raylet.err").write_text("no\n" * 100_000 + "out of file descriptors\n")
    (made / "session_latest").symlink_to(logs.parent)
    return made


def test_where_ray_does_not_start_or_dies_the_message_names_logs_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("the node timed out")

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return False

    never = Never()

    def start() -> None:
        cluster.start(settings, "sim")

    def stay() -> None:
        up._until(never, settings, str(made))

    def stay_as_node() -> None:
        raylet = SimpleNamespace(returncode=1)
        node._watch(SimpleNamespace(dead_processes=lambda: [("raylet", raylet)]), never, settings, str(made))

    settings = load_settings(state_dir=tmp_path / "state")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=fails))
    monkeypatch.setattr(cluster, "environment", lambda *_, **__: None)
    monkeypatch.setattr(cluster, "runtime_folder", lambda _: str(made))
    monkeypatch.setattr(up, "_ray_lives", lambda: False)
    (settings.log_dir / "ray").mkdir(parents=True)
    (settings.log_dir / "ray" / "of-another").touch()
    for end in (start, stay, stay_as_node):
        made = ray_folder(tmp_path)
        with pytest.raises(OperatorError) as told:
            end()
        cluster.remove(settings, str(made))
        [kept] = (settings.log_dir / "ray").iterdir()
        assert told.value.fix.startswith(f"see {kept.parent}")
        assert kept.name == "raylet.err" and kept.stat().st_size < 100_000
        assert kept.read_text().endswith("out of file descriptors\n")


def test_a_stack_that_ends_meanwhile_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise ClusterError("the directory does not answer")

    monkeypatch.setattr(up.cluster, "snapshot", away)
    settings = load_settings(state_dir=tmp_path)
    with pytest.raises(ClusterError, match="the stack ended while the catalog was applied"):
        up._wait(config(), settings, print, before={})


def serve_says(monkeypatch: pytest.MonkeyPatch, apps: dict[str, Any], *statuses: tuple[str, str]) -> None:
    """Serve runs `apps`, and says of all of them first this, then that, and the last for ever."""
    told = itertools.chain(statuses, itertools.repeat(statuses[-1]))
    stubs = {
        "snapshot": lambda: Snapshot(epoch="e", number=1, complete=True),
        "app_statuses": lambda: dict.fromkeys(apps, next(told)),
        "deployed_apps": lambda: apps,
    }
    for name, value in stubs.items():
        monkeypatch.setattr(up.cluster, name, value)
    monkeypatch.setattr(up, "_readyz", lambda _: True)


def another_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve runs what somebody else has applied, and not what `config()` says."""
    there = {app["name"].replace("m@", "other@"): app for app in config()["applications"]}
    serve_says(monkeypatch, {name: {**app, "name": name} for name, app in there.items()}, ("RUNNING", ""))


DIED = """A replica failed to start with exception. Retrying. Error:
Traceback (most recent call last):
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
	class_name: ServeReplica:gateway:gateway
	ip: 198.18.209.12
The actor died because its node has died. Node Id: 28572ccce2ca827b27e6ce7dcf6fb639128fc980f595955133b55c9b
	the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats
The actor never ran - it was cancelled before it started running."""
RAISED = "A replica failed to start with exception. Retrying. Error:\nValueError: no such thing"


def test_a_replica_placed_on_a_node_that_had_just_died_fails_no_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = served(config())
    settings = load_settings(state_dir=tmp_path, ready_timeout_s=20)
    serve_says(monkeypatch, apps, ("UPDATING", DIED), ("RUNNING", DIED))
    assert up._wait(config(), settings, lambda _: None, before={})
    serve_says(monkeypatch, apps, ("UPDATING", RAISED))
    with pytest.raises(EngineError, match="no such thing"):
        up._wait(config(), settings, lambda _: None, before={})


def test_who_starts_a_stack_does_not_end_it_since_another_catalog_was_applied_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_applied(monkeypatch)
    said: list[str] = []
    up._wait(config(), load_settings(state_dir=tmp_path, ready_timeout_s=1), said.append, threading.Event())
    assert said == ["another `steelyard up` has applied its catalog meanwhile, which is served now"]


def test_who_applied_a_catalog_is_told_that_another_one_came_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_applied(monkeypatch)
    with pytest.raises(OperatorError, match="another `steelyard up` has applied its catalog meanwhile"):
        up._wait(config(), load_settings(state_dir=tmp_path, ready_timeout_s=1), print, before={})


@pytest.fixture
def drained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long streams got at the end of each stack; each is ready at once, and told to stop in the same instant."""
    found: list[float] = []
    nothing = dict.fromkeys(("apply", "read_cluster_file"), lambda *_: None)
    started = SimpleNamespace(temp_dir="")
    running = SimpleNamespace(
        **nothing,
        start=lambda *_: started,
        stop=lambda *given: found.append(given[-1]),
        only_writer=lambda _: contextlib.nullcontext(),
    )
    stubs = {"cluster": running, "_wait": lambda *_: None, "_until": lambda *_: None, "_ray_lives": lambda: True}
    for name, value in stubs.items():
        monkeypatch.setattr(up, name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return found


def serve(state_dir: Path, say: up.Say = lambda _: None) -> None:
    settings = load_settings(state_dir=state_dir, profile="sim")
    version = {"version": "v", "engine": {"kind": "simulator"}}
    catalog = Catalog((ModelSpec.model_validate({"name": "m", "versions": [version]}),))
    up._serve(catalog, config(), settings, say, 0.0)


def test_who_is_told_to_stop_drains(tmp_path: Path, drained: list[float]) -> None:
    serve(tmp_path)
    assert drained == [up.STOP_DRAIN_S]


def test_where_ray_has_died_nothing_is_drained_through_it(
    tmp_path: Path, drained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked it meanwhile would wait for nothing, and have Ray's own complaints on his terminal."""

    def dies(*_: object) -> None:
        raise OperatorError("a Ray process of this node died")

    monkeypatch.setattr(up, "_until", dies)
    monkeypatch.setattr(up, "_ray_lives", lambda: False)
    with pytest.raises(OperatorError, match="died"):
        serve(tmp_path)
    assert drained == [0.0]


def test_a_stack_that_cannot_say_that_it_is_ready_serves_already_and_drains(
    tmp_path: Path, drained: list[float]
) -> None:
    def say(line: str) -> None:
        if line.startswith(("ready", "stopping")):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        serve(tmp_path, say)
    assert drained == [up.STOP_DRAIN_S]


def test_one_that_does_not_become_ready_has_nothing_to_drain(
    tmp_path: Path, drained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EngineError("not ready")

    monkeypatch.setattr(up, "_wait", fails)
    with pytest.raises(EngineError):
        serve(tmp_path)
    assert drained == [0.0]


def test_nobody_applies_to_a_cluster_before_who_starts_it_has(
    tmp_path: Path, drained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands find it as soon as its file is there; what they applied before would be undone."""
    only_writer, settings, was_free = cluster.only_writer, load_settings(state_dir=tmp_path), []

    def look(*_: object) -> SimpleNamespace:
        free = False
        with contextlib.suppress(OperatorError), only_writer(settings):
            free = True
        was_free.append(free)
        return SimpleNamespace(temp_dir="")

    monkeypatch.setattr(cluster, "_TURN_S", 0.0)
    for where, name in ((up.cluster, "start"), (up.cluster, "apply"), (up, "_wait"), (up.cluster, "stop")):
        monkeypatch.setattr(where, name, look)
    monkeypatch.setattr(up.cluster, "only_writer", only_writer)
    serve(tmp_path)
    assert was_free == [False, False, True, True]


def test_a_first_key_that_nobody_was_told_is_followed_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, text: str) -> None:
        if path == settings.api_key_file:
            raise KeyboardInterrupt
        write_private(path, text)

    settings, write_private = load_settings(state_dir=tmp_path), up.write_private
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(up, "write_private", killed)
        up.prepare_secrets(settings, print)
    up.prepare_secrets(settings, print)
    token = settings.api_key_file.read_text().strip()
    assert "admin" in KeyRing(settings.keys_file).check(token, time.time()).scopes
    assert settings.api_key_file.stat().st_mode & 0o777 == 0o600
    settings.api_key_file.unlink()  # kept elsewhere: no other one comes in its place
    up.prepare_secrets(settings, print)
    assert not settings.api_key_file.exists()
