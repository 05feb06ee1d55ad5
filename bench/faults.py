"""The faults of `bench.chaos`, one function each: it breaks something of a scene under load and says who was hit."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from bench import mix, procs
from bench.scene import EVERY, Scene, Victims

Strike = Callable[[Scene], Victims]
STUCK_TIMEOUT_S = 15.0


def engine_killed(scene: Scene) -> Victims:
    replica, pid = scene.busiest()
    return _hit(pid, signal.SIGKILL, Victims({replica}))


def engine_stopped(scene: Scene) -> Victims:
    replica, pid = scene.busiest()
    return _hit(pid, signal.SIGSTOP, Victims({replica}))


def replica_killed(scene: Scene) -> Victims:
    replica, pid = scene.busiest()
    return _hit(scene.actor(pid), signal.SIGKILL, Victims({replica}))


def gateway_killed(scene: Scene) -> Victims:
    """The one with most connections."""
    held = {pid: scene.ports_of(pid) for pid in scene.fleet.gateways()}
    pid = max(held, key=lambda pid: len(held[pid]))
    return _hit(pid, signal.SIGKILL, Victims(ports=held[pid]))


def directory_killed(scene: Scene) -> Victims:
    return _hit(scene.fleet.directory(), signal.SIGKILL, Victims(leaves=False, settle_s=15.0))


def controller_killed(scene: Scene) -> Victims:
    return _hit(scene.process("ray::ServeController"), signal.SIGKILL, Victims(leaves=False, settle_s=15.0))


def engine_fails(scene: Scene) -> Victims:
    """Every generation is answered with 500; what runs goes on."""
    return _sins(scene, "returns_500")


def engine_lies(scene: Scene) -> Victims:
    """Its core is dead, and /health says 200."""
    return _sins(scene, "lies_about_health")


def engine_wedged(scene: Scene) -> Victims:
    """It accepts, and nothing gets another token."""
    return _sins(scene, "hangs", after=0)


def rolling_update(scene: Scene) -> Victims:
    """Other engine arguments: every replica is replaced."""
    model = changed(scene.model, "engine", "args", {"sim-ttft-ms": 120})
    before = set(scene.engines())
    victims = Victims(leaves=False)
    victims.wait = _beside(lambda: _applied(scene, scene.up(model)))
    victims.settle_s = 5.0
    _until(lambda: not before & set(scene.engines()), "every engine is another", 150)
    return victims


def scale_down(scene: Scene) -> Victims:
    """From four replicas to two, and back."""
    victims = Victims(leaves=False)
    bounds = {"min": 2, "max": 2, "target_ongoing": 80}
    _applied(scene, scene.up(changed(scene.model, "scaling", None, bounds)))
    _until(lambda: len(scene.engines()) == 2, "two engines are left", 120)
    _applied(scene, scene.up())
    return victims


def broken_version(scene: Scene) -> Victims:
    """`up` with a second version that cannot start, and, as operators do, with the same again."""
    victims = Victims(leaves=False)
    model = copy.deepcopy(scene.model)
    broken = copy.deepcopy(model["versions"][0])
    broken["version"], broken["engine"]["args"]["max-num-seqs"] = "v2", "many"
    model["versions"].append(broken)
    model["release"] = {"stable": "v1"}
    told = scene.up(model)
    if told.returncode == 0 or "v2" not in told.stderr:
        raise procs.StartFailed(f"`up` did not name the broken version: {told.returncode} {told.stderr[-300:]}")
    _applied(scene, scene.up())
    return victims


def two_faults(scene: Scene) -> Victims:
    """An engine and a gateway at once."""
    engine, gateway = engine_killed(scene), gateway_killed(scene)
    return Victims(engine.replicas, gateway.ports, engine.at)


def poison(scene: Scene) -> Victims:
    """Two prompts that end engines, five times each, as one client sends them that tries again. Five at the same moment
    would be inside several engines before anybody can know."""
    expect = mix.simulated(scene.name, "v1")
    victims = Victims({EVERY}, settle_s=5.0)
    for prompt in ("SIM_DIE once", "SIM_DIE again"):
        before = scene.deaths()
        ask = mix.ask(scene.name, expect, "chat", prompt, 4, poison=True)
        said = [scene.crowd.send(ask, 120.0).told().code for _ in range(5)]
        time.sleep(2.0)  # the directory hears of the last one
        victims.deaths.append(scene.deaths() - before)
        scene.say(f"{prompt}: {victims.deaths[-1]:.0f} engines ended, the client was told {', '.join(said)}")
    return victims


def saturation(scene: Scene) -> Victims:
    """Twice as many requests as slots, and clients that leave soon, with prompts of most of the context: nobody is at
    fault."""
    expect = mix.simulated(scene.name, "v1")
    victims = Victims(leaves=False)
    for number in range(100):
        ask = mix.ask(scene.name, expect, "chat", f"{number} " + "harbour " * 1700, 300)
        client = _connected(scene, mix.encode(ask, f"leaves-{number}", "x", scene.fleet.side.headers))
        time.sleep(0.1 * (number % 9))
        client.close()
    return victims


def gateways_scaled(scene: Scene) -> Victims:
    """From two gateways to four and back to two."""
    victims = Victims(leaves=False)
    _applied(scene, scene.up(STEELYARD_GATEWAYS="4"))
    _until(lambda: len(scene.fleet.gateways()) == 4, "four gateways", 60)
    time.sleep(3.0)  # new connections go to all four
    _applied(scene, scene.up(STEELYARD_GATEWAYS="2"))
    _until(lambda: len(scene.fleet.gateways()) == 2, "two gateways", 150)
    return victims


def slow_clients(scene: Scene) -> Victims:
    """Twenty clients that read one byte a second."""
    expect = mix.simulated(scene.name, "v1")
    opened = []
    for number in range(20):
        ask = mix.ask(scene.name, expect, "chat", f"slowly {number}", 2000)
        opened.append(_connected(scene, mix.encode(ask, f"slow-{number}", "x", scene.fleet.side.headers)))
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        for client in opened:
            client.recv(1)
        time.sleep(1.0)
    for client in opened:
        client.close()
    return Victims(leaves=False)


def half_open_clients(scene: Scene) -> Victims:
    """Three hundred clients that send half a request and no more."""
    expect = mix.simulated(scene.name, "v1")
    opened = []
    for number in range(300):
        whole = mix.encode(
            mix.ask(scene.name, expect, "chat", f"half {number}", 8), "half", "x", scene.fleet.side.headers
        )
        opened.append(_connected(scene, whole[: len(whole) * (number % 4 + 1) // 5]))
    victims = Victims(leaves=False)
    time.sleep(15.0)
    for client in opened:
        client.close()
    return victims


def descriptors_gone(scene: Scene) -> Victims:
    """A gateway that may open no more files for ten seconds, and clients that connect all the while."""
    pid = scene.fleet.gateways()[0]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    victims = Victims(leaves=False)
    held: list[socket.socket] = []
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 4, before[1]))
    try:
        for _ in range(40):
            with contextlib.suppress(OSError):
                held.append(_connected(scene, b""))
            time.sleep(0.25)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for client in held:
            client.close()
    return victims


def disk_full(scene: Scene) -> Victims:
    """Ten seconds in which gateways, replicas and directory can write no byte to any file."""
    titles = ("ServeReplica:", "ray::Directory")
    pids = [p.pid for p in scene.fleet.side.processes() if any(t in procs.title(p) for t in titles)]
    victims = Victims(leaves=False, settle_s=12.0)
    _, most = resource.prlimit(pids[0], resource.RLIMIT_FSIZE)
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
        time.sleep(10.0)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    return victims


@dataclass(frozen=True)
class Row:
    """One fault and how the run around it is shaped. `recover_s` bounds the wait for full service; `over`: how many times
    as many clients as else; four replicas have room for 1.67; `detects`: the bar that the detection is held to."""

    strike: Strike
    recover_s: float = 150.0
    over: float = 1.0
    detects: str = ""
    quick: bool = False


ROWS: dict[str, Row] = {
    "engine-killed": Row(engine_killed, detects="death", quick=True),
    "engine-stopped": Row(engine_stopped, detects="hang"),
    "replica-killed": Row(replica_killed, detects="death"),
    "gateway-killed": Row(gateway_killed, quick=True),
    "directory-killed": Row(directory_killed),
    "controller-killed": Row(controller_killed),
    "engine-500s": Row(engine_fails),
    "engine-lies": Row(engine_lies),
    "engine-wedged": Row(engine_wedged, detects="hang"),
    "rolling-update": Row(rolling_update),
    "scale-down": Row(scale_down),
    "broken-version": Row(broken_version),
    "two-faults": Row(two_faults, detects="death"),
    "saturation": Row(saturation, over=3.3),
    "gateways-scaled": Row(gateways_scaled),
    "slow-clients": Row(slow_clients),
    "half-open-clients": Row(half_open_clients),
    "fd-limit": Row(descriptors_gone),
    "disk-full": Row(disk_full),
    # The last: replicas that failed so often wait before they start again, in whatever follows.
    "poison": Row(poison, quick=True),
}


def changed(model: dict[str, Any], part: str, inner: str | None, more: dict[str, Any]) -> dict[str, Any]:
    """The model file with further values in one part of its version."""
    model = copy.deepcopy(model)
    target = model["versions"][0][part]
    (target if inner is None else target[inner]).update(more)
    return model


def _hit(pid: int, number: signal.Signals, victims: Victims) -> Victims:
    victims.at = time.monotonic()
    os.kill(pid, number)
    return victims


def _sins(scene: Scene, *names: str, after: int = 1) -> Victims:
    replica, _ = scene.busiest()
    at = scene.sin(replica, *names, after=after)
    return Victims({replica}, at=at)


def _applied(scene: Scene, done: Any) -> None:
    if done.returncode:
        raise procs.StartFailed(f"`up` ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def _beside(work: Callable[[], None]) -> Callable[[], None]:
    """Runs it on a thread; what waits for its end, and raises what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> None:
        thread.join()
        if raised:
            raise raised[0]

    return wait


def _until(holds: Callable[[], bool], what: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise procs.StartFailed(f"not within {within_s:g} s: {what}")
        time.sleep(0.5)


def _connected(scene: Scene, said: bytes) -> socket.socket:
    host, _, port = scene.fleet.side.base_url.removeprefix("http://").rpartition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((host, int(port)))
    client.sendall(said)
    return client
