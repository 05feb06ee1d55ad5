"""Requests that end engines: pure. Whoever was inside when one died may be the reason. He gets one more engine, on trial: alone
among those under suspicion. Who was inside two is refused for a while, wherever and however often he comes back, unless
somebody else answers for one of them: who was on trial in an engine that died, and had been inside another, is guilty of both.
Neither is said before everybody who was new in that engine has had his own trial, for it may be one of them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from serving.gateway.prefix import stable_hash

DEATHS = 2  # of engines, that one request may cost
MOST_DEATHS = 4  # with it inside, whoever else answers for them: he may be a scapegoat
HEARD_S = 15.0  # for so long nobody is refused because of a death of which newcomers may be guilty
REMEMBERED_S = 600.0  # since the last of them
MOST = 4096  # requests that are remembered, and deaths
TOLD = 256  # of them, to the other gateways
ENGINES_KEPT = 8  # of those that died with one request inside

# What may differ between two tries of one request without making it another for the engine.
_NOISE = frozenset(
    (
        "model",
        "user",
        "seed",
        "stream",
        "stream_options",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
    )
)


def fingerprint(version_id: str, path: str, adapter: str | None, fields: Mapping[str, Any]) -> str:
    told = {k: v for k, v in fields.items() if k not in _NOISE}
    data = msgspec.json.encode((version_id, path, adapter, told), order="sorted")
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class Told(Protocol):
    """What a gateway tells of the deaths it saw; `GatewayInfo` is one."""

    @property
    def deaths(self) -> Mapping[str, Iterable[str]]:
        """Fingerprint -> engines that died with it inside, in this order."""

    @property
    def trials(self) -> Mapping[str, tuple[str, float]]:
        """Engine -> who was on trial there when it died, and for how many seconds."""

    @property
    def suspects(self) -> Iterable[str]:
        """Fingerprints of those that had no answer yet."""


class Deaths(msgspec.Struct, frozen=True):
    deaths: dict[str, tuple[str, ...]] = {}
    trials: dict[str, tuple[str, float]] = {}
    suspects: tuple[str, ...] = ()


class Fuse:
    """The deaths of engines by the fingerprints of those inside, as this gateway saw them and as the others tell. While nobody
    is remembered, which is nearly always, nothing is computed. Engines are told apart by their endpoint's id: one that cuts
    every answer and lives on is sick, and no request's fault; two gateways that lose theirs at once have seen one death."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own: dict[str, tuple[frozenset[str], float]] = {}  # engines, and until when; the oldest first
        self._own_suspects: set[str] = set()  # those of them that had no answer yet
        self._own_trials: list[tuple[str, str, float]] = []  # engine, who was on trial there, for how many seconds
        self._others: dict[str, frozenset[str]] = {}
        self._others_suspects: frozenset[str] = frozenset()
        self._others_trials: list[tuple[str, str, float]] = []
        self._acquitted: set[str] = set()  # here, of what the others tell
        self._cleared: set[str] = set()  # likewise, of suspects
        self._guilty: frozenset[str] = frozenset()
        self._ended: dict[str, str] = {}  # engine -> the guilty one that was on trial there
        self._explained: frozenset[str] = (
            frozenset()
        )  # engines whose death the guilty answer for, these and earlier ones
        self._open: frozenset[str] = frozenset()  # those whose death is not judged yet
        self._died_at: dict[str, tuple[int, float]] = {}  # engine -> the order in which it was told of, and when
        self._numbers = itertools.count()
        self._again_at = math.inf  # when a death has taken too long to be judged
        self.on_news: Callable[[], None] = lambda: None
        self.on_suspects: Callable[[], None] = lambda: None  # somebody is under suspicion who was not

    @property
    def armed(self) -> bool:
        return bool(self._own or self._others)

    def suspected(self, print_: str) -> bool:
        """Whether it must be on trial: an engine died with this request inside that had no answer yet. Whoever kills later does
        so when his trial is over. What a guilty one did on trial, he did alone; of an earlier death two may be guilty."""
        return self._unheard(print_) and bool(self._dead(print_))

    def blown(self, print_: str) -> bool:
        """Whether this request is refused."""
        return not self.pending(print_) and self._inside_too_many(print_)  # what is due is judged first

    def pending(self, print_: str) -> bool:
        """Whether it is neither refused nor tried before others were heard: one of them may have ended an engine that died with
        it inside."""
        if not self._inside_too_many(print_):
            return False
        if self._clock() >= self._again_at:
            self._judge()
        if print_ in self._guilty or len(self._all_dead(print_)) >= MOST_DEATHS:
            return False
        dead = self._dead(print_) - self._explained
        return len(dead) >= DEATHS > len({e for e in dead if e not in self._open and not self._newcomers(e, print_)})

    def _inside_too_many(self, print_: str) -> bool:
        return (
            print_ in self._guilty
            or len(self._dead(print_) - self._explained) >= DEATHS
            or len(self._all_dead(print_)) >= MOST_DEATHS
        )

    def excused(self, print_: str) -> int:
        """How many engines died with it inside for which somebody else answers."""
        return len(self._all_dead(print_) & self._explained) if print_ not in self._guilty else 0

    def died(self, print_: str, engine: str, trial_s: float = 0.0, *, begun: bool = False) -> int:
        """That engine died with this request inside, which was on trial there for so long, or not (0), and whose answer had
        `begun` or not; how many have by now."""
        self._notice(engine)
        known = self._known(print_)
        self._own.pop(print_, None)
        known = known if engine in known or len(known) >= ENGINES_KEPT else known | {engine}
        self._own[print_] = known, self._clock() + REMEMBERED_S
        if not begun:
            self._own_suspects.add(print_)
        if trial_s:
            self._own_trials.append((engine, print_, trial_s))
        while len(self._own) > MOST:
            del self._own[next(iter(self._own))]
        self._judge()
        self.on_news()
        if not begun:
            self.on_suspects()
        return len(self._dead(print_))

    def passed(self, print_: str) -> None:
        """Its trial is over, and its engine lives. What ends engines later counts all the same."""
        if not self._unheard(print_):
            return
        self._own_suspects.discard(print_)
        if print_ in self._others_suspects:
            self._cleared.add(print_)
        self._judge()

    def survived(self, print_: str) -> None:
        """It was answered to its end: whatever ended engines, it is not this."""
        known = self._own.pop(print_, None) is not None
        if print_ in self._others and print_ not in self._acquitted:
            self._acquitted.add(print_)
            known = True
        if known:
            self._judge()

    def told(self) -> Deaths:
        """Of its own, for the other gateways."""
        now = self._clock()
        late = [p for p, (_, until) in self._own.items() if until <= now]
        for print_ in late:
            del self._own[print_]
        if late:
            self._judge()
        told = dict.fromkeys(list(self._own)[-TOLD:])
        trials = {e: (p, s) for e, p, s in sorted(self._own_trials, key=lambda one: one[2]) if p in told}
        suspects = tuple(p for p in told if p in self._own_suspects)
        return Deaths({p: tuple(sorted(self._own[p][0], key=self._order)) for p in told}, trials, suspects)

    def hear(self, told: Iterable[Told]) -> None:
        """What all the others tell now."""
        others: dict[str, frozenset[str]] = {}
        suspects: set[str] = set()
        trials = []
        for one in told:
            for print_, engines in one.deaths.items():
                others[print_] = others.get(print_, frozenset()).union(engines)
                for engine in engines:
                    self._notice(engine)
            suspects.update(one.suspects)
            trials += [(engine, print_, trial_s) for engine, (print_, trial_s) in one.trials.items()]
        if others or self._others:
            new = suspects - self._others_suspects
            self._cleared &= suspects
            self._others, self._others_suspects, self._others_trials = others, frozenset(suspects), trials
            self._acquitted &= others.keys()
            self._judge()
            if new:
                self.on_suspects()

    def _judge(self) -> None:
        """Doors let one in on trial at a time, so one of those who say so of one engine came when it was dead already, or in
        that instant: whoever was there for longest was there before it."""
        self._own_trials = [one for one in self._own_trials if one[1] in self._own]
        self._own_suspects &= self._own.keys()
        longest = {e: p for e, p, _ in sorted((*self._own_trials, *self._others_trials), key=lambda one: one[2])}
        accused = {e: p for e, p in longest.items() if len(self._all_dead(p)) >= DEATHS}
        self._again_at = math.inf
        before = [e for e, p in self._ended.items() if accused.get(e) == p]
        self._guilty, self._ended, self._explained = frozenset(), {}, frozenset()
        for engine in before:  # what was found stays so, unless some come to light who were not heard
            if not self._newcomers(engine, accused[engine]):
                self._find(engine, accused.pop(engine))
        while ready := next((e for e, p in accused.items() if not self._waits(e, p, accused)), None):
            self._find(ready, accused.pop(ready))
        self._open = frozenset[str]().union(*map(self._all_dead, accused.values()))

    def _find(self, engine: str, print_: str) -> None:
        """Whether who was on trial there is guilty. Not where a guilty one was inside as a newcomer: it was his doing."""
        if any(engine in self._all_dead(p) for p in self._guilty - {print_}):
            return
        dead = {e for e in self._all_dead(print_) if self._ended.get(e, print_) == print_}
        if len(dead) >= DEATHS:
            self._ended[engine] = print_
            self._guilty |= {print_}
            self._explained |= self._all_dead(print_)

    def _waits(self, engine: str, print_: str, accused: Mapping[str, str]) -> bool:
        """Whether others may have ended that engine, in which this one was on trial, who are still to be heard: newcomers, and
        those who were newcomers and were then on trial in another one that died, which is not judged yet."""
        later = (p for e, p in accused.items() if p != print_ and self._order(e) > self._order(engine))
        return self._newcomers(engine, print_) or (
            any(engine in self._all_dead(p) for p in later) and not self._late(engine)
        )

    def _newcomers(self, engine: str, but: str) -> bool:
        """Whether others for whom it was the first are still to have their trial. Not for ever: a client may have left."""
        others = (p for p in self._own_suspects | self._others_suspects if p != but and self._unheard(p))
        return any(self._all_dead(p) - self._explained == {engine} for p in others) and not self._late(engine)

    def _late(self, engine: str) -> bool:
        """Whether it has been too long since its death."""
        late_at = self._died_at[engine][1] + HEARD_S if engine in self._died_at else 0.0
        if self._clock() >= late_at:
            return True
        self._again_at = min(self._again_at, late_at)
        return False

    def _notice(self, engine: str) -> None:
        if engine not in self._died_at:
            self._died_at[engine] = next(self._numbers), self._clock()
            if len(self._died_at) > MOST:
                del self._died_at[next(iter(self._died_at))]

    def _order(self, engine: str) -> int:
        return self._died_at[engine][0] if engine in self._died_at else -1

    def _unheard(self, print_: str) -> bool:
        return print_ in self._own_suspects or (print_ in self._others_suspects and print_ not in self._cleared)

    def _known(self, print_: str) -> frozenset[str]:
        engines, until = self._own.get(print_, (frozenset[str](), 0.0))
        return engines if self._clock() < until else frozenset()

    def _dead(self, print_: str) -> frozenset[str]:
        return frozenset(e for e in self._all_dead(print_) if self._ended.get(e, print_) == print_)

    def _all_dead(self, print_: str) -> frozenset[str]:
        known = self._known(print_)
        return known if print_ in self._acquitted else known | self._others.get(print_, frozenset())


class Charge:
    """One request before the fuse. Its fingerprint is made when it is first needed."""

    __slots__ = ("_fuse", "_of", "_print")

    def __init__(self, fuse: Fuse, version_id: str, path: str, adapter: str | None, fields: Mapping[str, Any]) -> None:
        self._fuse = fuse
        self._of = version_id, path, adapter, fields
        self._print = ""

    @property
    def blown(self) -> bool:
        return self._fuse.armed and self._fuse.blown(self.print)

    @property
    def pending(self) -> bool:
        return self._fuse.armed and self._fuse.pending(self.print)

    @property
    def suspicion(self) -> int | None:
        """While it must be on trial: what is the same for all copies of it, everywhere."""
        if not self._fuse.armed or not self._fuse.suspected(self.print):
            return None
        return stable_hash(self.print.encode())

    @property
    def print(self) -> str:
        self._print = self._print or fingerprint(*self._of)
        return self._print

    @property
    def excused(self) -> int:
        return self._fuse.excused(self.print) if self._fuse.armed else 0

    def died(self, engine: str, trial_s: float = 0.0, *, begun: bool = False) -> int:
        return self._fuse.died(self.print, engine, trial_s, begun=begun)

    def passed(self) -> None:
        self._fuse.passed(self.print)

    def survived(self) -> None:
        if self._print or self._fuse.armed:  # it may have come before anybody was remembered
            self._fuse.survived(self.print)
