"""The cluster as a whole: every machine has joined, the catalog is applied, every gateway is ready."""

from __future__ import annotations

import io
import json
import time

import gevent
from pyinfra.operations import files

from deploy import layout, place, roll
from deploy.target import Failed, Fleet, Target
from serving.errors import OperatorError

_JOIN_WAIT_S = 300


def joined(fleet: Fleet) -> None:
    """Until the head counts every machine of the inventory among its nodes."""
    wanted = {t.machine.address for t in fleet.targets}
    deadline = time.monotonic() + _JOIN_WAIT_S
    while True:
        status = fleet.head.ask(f"{layout.COMMAND} status --json", timeout_s=90)
        try:
            there = {n["node"] for n in json.loads(status.out[-1])["nodes"]}
        except (IndexError, ValueError, KeyError, TypeError):
            there = set()
        if wanted <= there:
            return
        if time.monotonic() > deadline:
            missing = ", ".join(sorted(wanted - there))
            why = "" if status.ok else f": {status.why}"
            raise OperatorError(
                f"{missing} did not join the head within {_JOIN_WAIT_S} s{why}", "see the journal of its unit"
            )
        gevent.sleep(1)


def apply(fleet: Fleet, digest: str) -> None:
    """The catalog, unless the same one was applied last and serves."""
    head, timeout_s = fleet.head, fleet.inventory.serve.ready_timeout_s
    same = head.ask(f"cat {layout.APPLIED} 2>/dev/null").text == digest
    if same and (fleet.dry_run or roll.ready(head, fleet.inventory, 10) is None):
        return
    head.tell("catalog applied")
    if fleet.dry_run:
        return
    said = head.ask(f"{layout.COMMAND} up", timeout_s=timeout_s + 120, show=True)
    if not said.ok:
        raise OperatorError(f"the catalog was not applied: {said.why}", "mend it and run the same command again")
    head.do("what is applied is noted", files.put, io.StringIO(digest + "\n"), layout.APPLIED, mode="0644")


def ready(fleet: Fleet) -> None:
    """Until every machine's gateway answers for every model."""

    def wait(target: Target) -> None:
        why = roll.ready(target, fleet.inventory, 120)
        if why is not None:
            raise Failed(f"its gateway is not ready: {why}")

    failed = fleet.each(wait)
    if failed:
        lines = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise OperatorError(lines, "see `steelyard status` on the head and the units' journals")


def endpoints(fleet: Fleet) -> list[str]:
    return [f"http://{place.at(t.machine.address, fleet.inventory.serve.port)}" for t in fleet.targets]
