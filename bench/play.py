"""One row of `bench.chaos`: the stack whole, a crowd under way, a fault, the stack whole again, and what became of every
answer."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from bench import mix, procs
from bench.crowd import Crowd
from bench.faults import Row
from bench.fleet import Fleet
from bench.mix import Witness
from bench.scene import EVERY, Lines, Scene, Victims, Watch, logged, up
from serving.telemetry.metrics import unrested_gauges

_WHOLE_BY_ITSELF_S, _WHOLE_BEFORE_S = 10.0, 120.0
_BEGUN = 0.8  # of the crowd have had a byte before the fault strikes
_SETTLE_S = 3.0
_HANGS_S = 180.0  # beyond the length of long streams: a request that is not answered then has failed
_TROUBLE = (procs.StartFailed, OSError, LookupError, subprocess.SubprocessError, psutil.Error)
_KEPT = 5  # answers that were not whole, of each verdict, for whoever must find out why
_REST_S = 10.0  # after the last answer, until nothing is inside of anything
# Asks for ever, with a name that no other of them has: what the fuse remembers of one is not to be taken for another.
Clients = Callable[[str, Row], list[tuple[int, Iterator[mix.Ask]]]]


@dataclass
class Found:
    """One row of the table. Seconds are None where nothing was to go, or nothing came back. `verdicts`: of replicas'
    watches against their engines, by cause. `preempted`: times that an engine gave up a request's KV cache, and computed it
    again. `stuck_after_s`: the limit of an engine that stood still. `trouble`: why the row shows less than it should."""

    fault: str
    turn: int = 0
    in_flight: int = 0
    on_victim: int = 0
    off_victim_failed: int = 0
    retried: int = 0
    typed: int = 0
    cut: int = 0
    silent: int = 0
    wrong: int = 0
    unsent_failed: int = 0
    answers: int = 0
    detect_s: float | None = None
    stuck_after_s: float = 0.0
    full_s: float | None = None
    verdicts: dict[str, float] = field(default_factory=dict)
    preempted: float = 0.0
    deaths: list[float] = field(default_factory=list)
    odd: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True)
class Stage:
    """A stack that is whole with so many replicas and gateways, and how much load a row puts on it. `start_s`: what one of its
    engines may take to start."""

    fleet: Fleet
    model: dict[str, Any]
    watch: Watch
    replicas: int
    gateways: int
    clients: Clients
    leavers: Callable[[str], Iterator[mix.Ask]]
    long_s: float
    saturation_s: float
    start_s: float
    say: Callable[[str], None]
    _failures: Counter[str] = field(default_factory=Counter)  # that were there when `up` forgave them

    def play(self, name: str, row: Row, turn: int) -> Found:
        """One row. What goes wrong in it is said in it, and is no reason not to play the next."""
        found = Found(name, turn)
        try:
            self._play(row, found)
        except _TROUBLE as error:
            found.trouble = found.trouble or f"{type(error).__name__}: {error}"
        return found

    def _play(self, row: Row, found: Found) -> None:
        self._ready()
        verdicts, preempted = self._verdicts(), self._preempted()
        side = self.fleet.side
        clients = self.clients(f"{found.fault} {found.turn}", row)
        with Crowd(side.base_url, side.headers, clients, self.long_s + _HANGS_S) as crowd:
            scene = Scene(
                self.fleet,
                self.model,
                crowd,
                self.watch,
                self.say,
                self.leavers(f"{found.fault} {found.turn} leaves"),
                found.turn,
                self.long_s,
                self.saturation_s,
            )
            under_way(crowd, row.over)
            struck, in_flight = time.monotonic(), {w.request_id for w in crowd.open()}
            victims = Victims(leaves=False)
            try:
                victims = row.strike(scene)
                self._see(row, victims, found)
            except _TROUBLE as error:
                found.trouble = f"{type(error).__name__}: {error}"
                scene.up()  # its own model file again, for the rows that follow
            answers = crowd.stop()
        time.sleep(_SETTLE_S)  # the gateways' last lines, and the directory's
        lines = logged(scene.state_dir)
        at = victims.at if victims.replicas or victims.ports else struck
        count(answers, victims, lines, in_flight, at, found)
        found.odd.extend(_odd(answers, lines))
        found.deaths, found.stuck_after_s = victims.deaths, victims.stuck_after_s
        found.verdicts = {k: v - verdicts.get(k, 0.0) for k, v in self._verdicts().items() if v > verdicts.get(k, 0.0)}
        found.preempted = sum(max(0.0, n - preempted.get(replica, 0.0)) for replica, n in self._preempted().items())
        found.trouble = found.trouble or victims.check(lines, answers) or self._left_behind()

    def _ready(self) -> None:
        """The stack is whole, and nothing that failed in the rows before is held against it."""
        failures = Counter({k: n for k, n in self._verdicts().items() if k.startswith("failed")})
        if failures != self._failures or not self.watch.until(self.replicas, self.gateways, _WHOLE_BY_ITSELF_S):
            up(self.fleet, self.model)  # ends the pauses of replicas that failed again and again, and forgets why
            self._failures.clear()
            self._failures.update(failures)
        if not self.watch.until(self.replicas, self.gateways, _WHOLE_BEFORE_S + self.start_s):
            raise procs.StartFailed(f"not whole before it: {self.watch.now()}")

    def _left_behind(self) -> str:
        """What still counts as inside a gateway or an engine although every client has its answer or has left."""
        deadline = time.monotonic() + _REST_S
        while True:
            metrics = self.fleet.metrics()
            inside = unrested_gauges(metrics.text)
            running = sum(metrics.engines("num_requests_running", str(self.model["name"])).values())
            if not inside and not running:
                return ""
            if time.monotonic() > deadline:
                return f"left behind: {inside}, {running:.0f} at engines"
            time.sleep(0.5)

    def _see(self, row: Row, victims: Victims, found: Found) -> None:
        """Until the fault was noticed, and everything is as it was."""
        # An engine is not judged by what it refuses while other requests make steps there: those end first.
        recover_s = row.recover_s + self.start_s + self.long_s
        victims.wait()
        time.sleep(max(0.0, victims.at + victims.settle_s - time.monotonic()))
        if victims.leaves:
            found.detect_s = self._gone_after(victims, recover_s)
        if not self.watch.until(self.replicas, self.gateways, recover_s):
            found.trouble = f"not whole again within {recover_s:g} s: {self.watch.now()}"
        elif found.detect_s is not None:
            gone = victims.at + found.detect_s
            back = self.watch.first(gone, lambda *now: now == (self.replicas, self.gateways))
            found.full_s = back and found.detect_s + back
        else:
            found.full_s = victims.back_s
        if victims.leaves and found.detect_s is None:
            found.trouble = found.trouble or "nobody noticed"

    def _gone_after(self, victims: Victims, within_s: float) -> float | None:
        """Seconds until a replica, or where none was hit a gateway, was out of the table."""
        while True:
            gone = self.watch.first(
                victims.at,
                lambda replicas, gateways: replicas < self.replicas if victims.replicas else gateways < self.gateways,
            )
            if gone is not None or time.monotonic() > victims.at + within_s:
                return gone
            time.sleep(0.2)

    def _preempted(self) -> dict[str, float]:
        return self.fleet.metrics().engines("num_preemptions_total", str(self.model["name"]))

    def _verdicts(self) -> dict[str, float]:
        """Verdicts against replicas so far, by state and cause."""
        found: Counter[str] = Counter()
        name = "steelyard_replica_faults_total"
        for labels, value in self.fleet.metrics().series(name, model=str(self.model["name"])):
            found[f"{labels['state'].lower()} {labels['cause']}"] += int(value)
        return dict(found)


def under_way(crowd: Crowd, over: float) -> None:
    """Until most of what fits is being answered, and a while longer, so that it has spread."""
    deadline = time.monotonic() + 30.0
    while crowd.begun() < crowd.size * _BEGUN / over and time.monotonic() < deadline:
        time.sleep(0.1)  # clients run in a thread of their own; this only looks how many have begun
    time.sleep(_SETTLE_S)


def count(
    answers: Iterable[Witness], victims: Victims, lines: Lines, in_flight: set[str], at: float, found: Found
) -> None:
    """The counts of a row. `at`: when the fault struck."""
    found.in_flight = len(in_flight)
    for witness in answers:
        found.answers += 1
        if witness.ask.poison:
            _count_poison(witness, found)
            continue
        line = lines.get(witness.request_id, {})
        by_gateway = witness.port in victims.ports and witness.due <= at < witness.end
        on = by_gateway or line.get("replica") in victims.replicas or EVERY in victims.replicas
        again = witness.again or int(line.get("attempts") or 0) > 1
        found.on_victim += witness.request_id in in_flight and (on or again) and EVERY not in victims.replicas
        _count(witness, on, by_gateway, again, found)


def _count(witness: Witness, on: bool, by_gateway: bool, again: bool, found: Found) -> None:
    verdict = witness.verdict()
    if verdict == "ok":
        found.retried += again
        return
    found.off_victim_failed += not on
    if verdict == "refused" or (not witness.body and verdict in ("cut", "silent")):
        found.unsent_failed += 1
    elif verdict == "cut" and by_gateway:
        found.cut += 1
    else:  # a gateway that lives has an error event to say
        field = "silent" if verdict == "cut" else verdict
        setattr(found, field, getattr(found, field) + 1)


def _count_poison(witness: Witness, found: Found) -> None:
    """It is to be refused by its name, or to end in an error event if its answer had begun."""
    verdict = witness.verdict()
    found.unsent_failed += verdict == "refused" and witness.told().code != "request_crashed_engine"
    found.silent += verdict not in ("refused", "typed")


def _odd(answers: Iterable[Witness], lines: Lines) -> Iterator[dict[str, Any]]:
    kept: Counter[str] = Counter()
    for witness in answers:
        verdict = witness.verdict()
        kept[verdict] += 1
        if verdict != "ok" and kept[verdict] <= _KEPT:
            yield {
                "verdict": verdict,
                "kind": witness.ask.kind,
                "error": witness.error,
                "code": witness.told().code,
                "status": witness.status,
                "after_s": witness.end - witness.due,
                "again": witness.again,
                "last": bytes(witness.body[-200:]).decode(errors="replace"),
                "log": dict(lines.get(witness.request_id, {})),
            }
