"""Starts what does not run, and restarts what runs something older: machine by machine, so that the others serve on."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter

import gevent
from pyinfra.operations import files, systemd

from deploy import layout, place
from deploy.inventory import Inventory
from deploy.release import Release
from deploy.target import Failed, Fleet, Target
from serving.errors import OperatorError
from serving.fleet.endpoint import State

_START_TIMEOUT_S = 960  # the unit's own TimeoutStartSec, and a minute
STOP_MARGIN_S = 120  # beyond the drain bound; the unit's own TimeoutStopSec is a minute beyond it
_READY_WAIT_S = 300

# Runs on the machine: its own gateway says when every model that must be up is.
_READY = """
import sys, time, urllib.request, urllib.error
url, deadline, why = sys.argv[1], time.monotonic() + float(sys.argv[2]), ""
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
while True:
    try:
        opener.open(url, timeout=3).close()
        sys.exit(0)
    except urllib.error.HTTPError as e:
        why = f"{e.code} {e.read(300).decode(errors='replace')}"
    except OSError as e:
        why = str(e)
    if time.monotonic() > deadline:
        sys.exit(f"{url}: {why}")
    time.sleep(0.5)
"""


def wanted_digest(settings_digest: str, secrets: dict[str, str], inventory: Inventory, release: Release) -> str:
    """Of all that a restart would bring into force. The secrets stand in it as a hash of hashes."""
    parts = [settings_digest, release.id, place.runtime_path(inventory, release)]
    parts += [hashlib.sha256(secrets[name].encode()).hexdigest() for name in sorted(secrets)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def roll(fleet: Fleet, release: Release, digests: dict[str, str], *, downtime: bool) -> bool:
    """New machines first: the head, then its workers together. Then those that run something older: worker by worker, then
    the head. A machine that does not come back ends it: the others are as they were. True when any was started."""
    active = {t.name: is_active(t) for t in fleet.targets}
    older = [t for t in fleet.targets if active[t.name] and running(t) != digests[t.name]]
    if older and downtime:
        # Nodes of different Ray versions do not join: all stop, then all start.
        _or_end(fleet.each(lambda t: stop(t, fleet.inventory), older))
        active |= {t.name: False for t in older}
        older = []

    def begin(target: Target) -> None:
        start(target, fleet.inventory, release, digests[target.name])

    down = [t for t in fleet.targets if not active[t.name]]
    _or_end(fleet.each(begin, [t for t in down if t.role == "head"]))
    _or_end(fleet.each(begin, [t for t in down if t.role == "worker"]))

    def again(target: Target) -> None:
        restart(fleet.head, target, fleet.inventory, release, digests[target.name])

    for target in sorted(older, key=lambda t: t.role == "head"):
        _or_end(fleet.each(again, [target]))
    return bool(down or older)


def restart(head: Target, target: Target, inventory: Inventory, release: Release, digest: str) -> None:
    served, before = ready(target, inventory, 5) is None, replicas(head)
    stop(target, inventory)
    start(target, inventory, release, digest)
    if served and (why := ready(target, inventory, _READY_WAIT_S)) is not None:
        raise Failed(f"it runs, but is not ready after {_READY_WAIT_S} s: {why}\n{journal(target)}")
    # A gateway is ready with one replica of each model. The next machine may hold that one: it waits for the others.
    deadline = time.monotonic() + inventory.serve.ready_timeout_s
    while lacking := before - replicas(head):
        if time.monotonic() > deadline:
            raise Failed(f"it runs, but replicas that served before are not back: {dict(lacking)}\n{journal(target)}")
        gevent.sleep(2)


def stop(target: Target, inventory: Inventory) -> None:
    """The unit drains: requests in progress finish, new ones go elsewhere."""
    timeout_s = inventory.serve.drain_s + STOP_MARGIN_S
    target.do(f"{target.unit} drains and stops", systemd.service, target.unit, running=False, _timeout=timeout_s)


def start(target: Target, inventory: Inventory, release: Release, digest: str) -> None:
    """Puts release and runtime into force, and starts the unit; returns when it is up (Type=notify)."""
    target.do(f"release {release.id} is current", files.link, layout.CURRENT, target=f"{layout.RELEASES}/{release.id}")
    target.do("runtime is current", files.link, layout.VENV, target=place.runtime_path(inventory, release))
    try:
        target.do(
            f"{target.unit} starts", systemd.service, target.unit, running=True, enabled=True, _timeout=_START_TIMEOUT_S
        )
    except Failed as e:
        # It would try again for ever; the next run starts it.
        target.ask(f"systemctl stop {target.unit}; systemctl reset-failed {target.unit}")
        raise Failed(f"{e}\n{journal(target)}") from None
    target.do("what runs is noted", files.put, io.StringIO(digest + "\n"), layout.RUNNING, mode="0644")


def replicas(head: Target) -> Counter[str]:
    """Ready replicas of each version; none when the head cannot say."""
    said = head.ask(f"{layout.COMMAND} status --json", timeout_s=90)
    try:
        endpoints = json.loads(said.out[-1])["replicas"]
        return Counter(f"{e['model']}@{e['version']}" for e in endpoints if e["state"] == State.READY)
    except (IndexError, ValueError, KeyError, TypeError):
        return Counter()


def is_active(target: Target) -> bool:
    return target.ask(f"systemctl is-active {target.unit}").text == "active"


def running(target: Target) -> str:
    return target.ask(f"cat {layout.RUNNING} 2>/dev/null").text


def ready(target: Target, inventory: Inventory, wait_s: float) -> str | None:
    """None when this machine's gateway says that every model is up; else why not."""
    address = target.machine.address
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{inventory.serve.port}/readyz"
    said = target.ask(f"python3 - {url} {wait_s:g}", stdin=_READY, timeout_s=int(wait_s) + 30)
    return None if said.ok else said.why


def journal(target: Target) -> str:
    """The unit's last words."""
    said = target.ask(f"journalctl -u {target.unit} -n 15 --no-pager -o cat 2>/dev/null || true")
    return "\n".join(f"  | {line}" for line in said.out[-15:])


def _or_end(failed: dict[str, str]) -> None:
    if failed:
        lines = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise OperatorError(lines, "mend it and run the same command: it goes on from here")
