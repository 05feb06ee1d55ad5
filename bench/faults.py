"""The faults of `bench.chaos`, one function each: it breaks something of a scene under load and says who was hit."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from bench import mix, procs
from bench.mix import Witness
from bench.scene import EVERY, Lines, Scene, Victims
from bench.sides import Side

Strike = Callable[[Scene], Victims]
STUCK_TIMEOUT_S = 15.0
_HALF_A_REQUEST_S = 90.0  # a gateway waits for the rest of a body for 60 s, for that of a head for 30 to 60


def engine_killed(scene: Scene) -> Victims:
    replica, pid = scene.busiest()
    return _hit(pid, signal.SIGKILL, Victims({replica}))


def engine_stopped(scene: Scene) -> Victims:
    known = scene.endpoints()
    replica, pid = scene.busiest()
    return _hit(scene.core(pid), signal.SIGSTOP, Victims({replica}, stuck_after_s=known[replica].stuck_after_s))


def core_killed(scene: Scene) -> Victims:
    """Of a real engine, the process that computes; its server answers 500 for a moment more."""
    replica, pid = scene.busiest()
    return _hit(scene.core(pid), signal.SIGKILL, Victims({replica}))


def replica_killed(scene: Scene) -> Victims:
    replica, pid = scene.busiest()
    return _hit(scene.actor(pid), signal.SIGKILL, Victims({replica}))


def gateway_killed(scene: Scene) -> Victims:
    """The one with most connections."""
    pid, ports = _busiest_gateway(scene)
    return _hit(pid, signal.SIGKILL, Victims(ports=ports))


def _busiest_gateway(scene: Scene) -> tuple[int, set[int]]:
    """The gateway with most connections, and their client ports. It is stopped: while it is looked at, and until it is killed, it
    must not take others."""
    pid = max(scene.fleet.gateways(), key=lambda pid: len(scene.ports_of(pid)))
    os.kill(pid, signal.SIGSTOP)
    return pid, scene.ports_of(pid)


def directory_killed(scene: Scene) -> Victims:
    return _restarted(scene, "ray::Directory")


def controller_killed(scene: Scene) -> Victims:
    return _restarted(scene, "ray::ServeController")


def _restarted(scene: Scene, title: str) -> Victims:
    """One of Ray's actors that no request passes. It is back when another process has its name, and works when `up` does."""
    before = scene.process(title)
    victims = _hit(before, signal.SIGKILL, Victims(leaves=False, settle_s=15.0))
    _until(lambda: bool(scene.processes(title) - {before}), f"{title} runs again", 60)
    victims.back_s = time.monotonic() - victims.at
    victims.wait = lambda: _applied(scene.up())
    return victims


def engine_fails(scene: Scene) -> Victims:
    """Every generation is answered with 500; what runs goes on."""
    return _sins(scene, "returns_500")


def engine_lies(scene: Scene) -> Victims:
    """Its core is dead, and /health says 200."""
    return _sins(scene, "lies_about_health")


def engine_wedged(scene: Scene) -> Victims:
    """It accepts, and nothing gets another token."""
    known = scene.endpoints()
    replica, _ = scene.busiest()
    endpoint = known[replica]
    scene.sin(endpoint.url, "hangs", after=0)
    return Victims({replica}, at=scene.last_step(endpoint.url), stuck_after_s=endpoint.stuck_after_s)


def rolling_update(scene: Scene) -> Victims:
    """Other engine arguments, and the first ones again: every replica is replaced twice."""
    victims = Victims(leaves=False)
    for model in (changed(scene.model, "engine", "args", {"sim-ttft-ms": 120}), scene.model):
        before = set(scene.engines())
        done = _beside(functools.partial(_applied_file, scene, model))
        _until(functools.partial(_replaced, scene, before), "every engine is another", 120 + scene.long_s)
        done()
    return victims


def scale_down(scene: Scene) -> Victims:
    """From four replicas to two, and back."""
    victims = Victims(leaves=False)
    _applied(scene.up(changed(scene.model, "scaling", None, {"min": 2, "max": 2})))
    _until(lambda: len(scene.engines()) == 2, "two engines are left", 120 + scene.long_s)
    _applied(scene.up())
    return victims


def broken_version(scene: Scene) -> Victims:
    """`up` with a second version whose engine does not start, and then without it."""
    victims = Victims(leaves=False)
    model = copy.deepcopy(scene.model)
    broken = copy.deepcopy(model["versions"][0])
    broken["version"], broken["engine"]["args"]["max-num-seqs"] = "v2", "many"
    model["versions"].append(broken)
    model["release"] = {"stable": "v1"}
    told = scene.up(model)
    if told.returncode == 0 or "v2" not in told.stderr:
        raise procs.StartFailed(f"`up` did not name the broken version: {told.returncode} {told.stderr[-300:]}")
    _applied(scene.up())
    return victims


def two_faults(scene: Scene) -> Victims:
    """An engine and a gateway at once."""
    replica, engine = scene.busiest()
    gateway, ports = _busiest_gateway(scene)
    victims = _hit(gateway, signal.SIGKILL, Victims({replica}, ports))
    os.kill(engine, signal.SIGKILL)
    return victims


def poison(scene: Scene) -> Victims:
    """Two prompts that end engines, five times each, as one client sends them that tries again. Five at the same moment
    would be inside several engines before anybody can know."""
    expect = mix.simulated(scene.name, "v1")
    victims = Victims({EVERY}, settle_s=5.0)
    for prompt in ("SIM_DIE once", "SIM_DIE again"):
        before = scene.deaths()
        ask = mix.ask(scene.name, expect, "chat", f"{prompt} {scene.turn}", 4, poison=True)
        said = [scene.crowd.send(ask, 120.0).told().code for _ in range(5)]
        time.sleep(2.0)  # the directory hears of the last one
        victims.deaths.append(scene.deaths() - before)
        scene.say(f"{prompt}: {victims.deaths[-1]:.0f} engines ended, the client was told {', '.join(said)}")
    return victims


def saturation(scene: Scene) -> Victims:
    """Twice as many requests as slots, some with prompts of 32k tokens, and clients with such prompts that leave soon: nobody is
    at fault."""
    victims = Victims(leaves=False)
    for number, ask in enumerate(scene.leavers):
        if time.monotonic() > victims.at + scene.saturation_s:
            break
        client = _asked(scene, ask, f"leaves-{scene.turn}-{number}")
        time.sleep(0.1 * (number % 9))
        client.close()
    return victims


def gateways_scaled(scene: Scene) -> Victims:
    """From two gateways to four and back to two."""
    victims = Victims(leaves=False)
    _applied(scene.up(STEELYARD_GATEWAYS="4"))
    _until(lambda: len(scene.fleet.gateways()) == 4, "four gateways", 60)
    time.sleep(3.0)  # new connections go to all four
    _applied(scene.up(STEELYARD_GATEWAYS="2"))
    _until(lambda: len(scene.fleet.gateways()) == 2, "two gateways", 60 + scene.long_s)
    return victims


def slow_clients(scene: Scene) -> Victims:
    """Twenty clients that read one byte a second of eight choices at once, until their connections are full; then they leave."""
    expect = mix.simulated(scene.name, "v1")
    ids = [f"chaos-slow-{scene.turn}-{number}" for number in range(20)]
    opened = []
    for name in ids:
        ask = mix.ask(scene.name, expect, "chat", name, 2000)
        ask.body["n"] = 8
        opened.append(_asked(scene, ask, name))
    victims = Victims(leaves=False)
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        for client in opened:
            client.recv(1)
        time.sleep(1.0)  # that is the fault: a byte a second
    for client in opened:
        client.close()

    def noticed(lines: Lines, _: Sequence[Witness]) -> str:
        kept = sum(not lines.get(name, {}).get("client_gone") for name in ids)
        return f"{kept} of {len(ids)} slow clients left and were not missed" if kept else ""

    victims.check = noticed
    return victims


def half_open_clients(scene: Scene) -> Victims:
    """Three hundred clients that send half a request and no more, until the gateways have closed on each."""
    expect = mix.simulated(scene.name, "v1")
    opened = []
    for number in range(300):
        ask = mix.ask(scene.name, expect, "chat", f"half {scene.turn} {number}", 8)
        whole = mix.encode(ask, f"half-{scene.turn}-{number}", "x", scene.fleet.side.headers)
        opened.append(connected(scene.fleet.side, whole[: len(whole) * (number % 4 + 1) // 5]))
    victims = Victims(leaves=False)
    try:
        _until(lambda: not _still_open(opened), "the gateways close on those who do not go on", _HALF_A_REQUEST_S)
        victims.back_s = time.monotonic() - victims.at
    finally:
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
                held.append(connected(scene.fleet.side, b""))
            time.sleep(0.25)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for client in held:
            client.close()
    newcomers = [connected(scene.fleet.side, b"") for _ in range(40)]  # the kernel gives them to all gateways evenly
    time.sleep(1.0)  # nothing tells when it has been accepted but the table of sockets below
    taken = scene.ports_of(pid) & {client.getsockname()[1] for client in newcomers}
    for client in newcomers:
        client.close()
    if not taken:
        raise procs.StartFailed("the gateway takes no connection any more")
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
    free_again = time.monotonic() + 1.0

    def goes_on(lines: Lines, answers: Sequence[Witness]) -> str:
        lost = sum(w.due > free_again and w.status == 200 and w.request_id not in lines for w in answers)
        return f"{lost} answers from after it are not in the log" if lost else ""

    victims.check = goes_on
    return victims


@dataclass(frozen=True)
class Row:
    """One fault and how the run around it is shaped. `recover_s` bounds the wait for full service, once what ran has ended;
    `over`: how many times as many clients as else, for which four replicas have room for 1.67; `large`: clients whose prompts
    have 32k tokens; `detects`: the bar that the detection is held to; `engines`: those on which it is played."""

    strike: Strike
    recover_s: float = 150.0
    over: float = 1.0
    large: int = 0
    detects: str = ""
    quick: bool = False
    engines: tuple[str, ...] = ("simulator",)


BOTH = ("simulator", "vllm")
ROWS: dict[str, Row] = {
    "engine-killed": Row(engine_killed, detects="death", quick=True, engines=BOTH),
    "core-killed": Row(core_killed, detects="death", engines=("vllm",)),
    "engine-stopped": Row(engine_stopped, detects="hang", engines=BOTH),
    "replica-killed": Row(replica_killed, detects="death"),
    "gateway-killed": Row(gateway_killed, detects="death", quick=True, engines=BOTH),
    "directory-killed": Row(directory_killed),
    "controller-killed": Row(controller_killed),
    "engine-500s": Row(engine_fails),
    "engine-lies": Row(engine_lies),
    "engine-wedged": Row(engine_wedged, detects="hang"),
    "rolling-update": Row(rolling_update),
    "scale-down": Row(scale_down),
    "broken-version": Row(broken_version),
    "two-faults": Row(two_faults, detects="death"),
    "saturation": Row(saturation, over=3.3, large=24, engines=BOTH),
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


def _sins(scene: Scene, *names: str) -> Victims:
    known = scene.endpoints()
    replica, _ = scene.busiest()
    at = scene.sin(known[replica].url, *names, after=1)
    return Victims({replica}, at=at)


def _applied(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise procs.StartFailed(f"`up` ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def _applied_file(scene: Scene, model: dict[str, Any]) -> None:
    _applied(scene.up(model))


def _replaced(scene: Scene, before: set[str]) -> bool:
    now = set(scene.engines())
    return bool(now) and not before & now


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


def _asked(scene: Scene, ask: mix.Ask, request_id: str) -> socket.socket:
    """A client that has sent this request."""
    return connected(scene.fleet.side, mix.encode(ask, request_id, "x", scene.fleet.side.headers))


def _still_open(clients: Sequence[socket.socket]) -> int:
    """Connections that the other side has not closed, whatever it said before."""
    count = 0
    for client in clients:
        client.setblocking(False)
        try:
            while client.recv(4096):
                pass
        except BlockingIOError:
            count += 1
        except OSError:  # reset: closed as well
            pass
    return count


def connected(side: Side, said: bytes) -> socket.socket:
    """A client with a small buffer that has sent this."""
    host, _, port = side.base_url.removeprefix("http://").rpartition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((host, int(port)))
    client.sendall(said)
    return client
