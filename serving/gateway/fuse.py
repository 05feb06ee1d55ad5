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
from typing import Any

import msgspec

from serving.fleet.endpoint import DEATHS_REMEMBERED_S, Deaths
from serving.gateway.prefix import stable_hash

DEATHS = 2  # of engines, that one request may cost
MOST_DEATHS = 4  # with it inside, whoever else answers for them: he may be a scapegoat
HEARD_S = 15.0  # for so long nobody is refused because of a death of which newcomers may be guilty
REMEMBERED_S = DEATHS_REMEMBERED_S  # since the last of them
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


class Fuse:
    """The deaths of engines by the fingerprints of those inside, as this gateway saw them and as the others tell. While nobody
    is remembered, which is nearly always, nothing is computed. Engines are told apart by their endpoint's id: one that cuts
    every answer and lives on is sick, and no request's fault; two gateways that lose theirs at once have seen one death.

    An engine takes hundreds with it at once, so verdicts are made anew only where something changed on which they may depend,
    and look at nobody but who was on trial and at the engines where that was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own: dict[str, tuple[frozenset[str], float]] = {}  # engines, and until when; the oldest first
        self._own_suspects: set[str] = set()  # those of them that had no answer yet
        self._own_trials: dict[
            str, dict[str, float]
        ] = {}  # who was on trial, and in which engines, for how many seconds
        self._told: Deaths | None = None  # of its own, while nothing changed
        self._heard: list[_Tale] = []  # as the others told last
        self._others: dict[str, frozenset[str]] = {}
        self._others_suspects: frozenset[str] = frozenset()
        self._others_trials: list[tuple[str, str, float]] = []  # engine, who was on trial there, for how many seconds
        self._others_tried: frozenset[str] = frozenset()  # who was on trial in any
        self._acquitted: set[str] = set()  # here, of what the others tell
        self._cleared: set[str] = set()  # likewise, of suspects
        # Suspects who were inside the same deaths, and no others, stand together; and which such deaths an engine is among.
        self._together: dict[frozenset[str], set[str]] = {}
        self._stands: dict[str, frozenset[str]] = {}
        self._among: dict[str, set[frozenset[str]]] = {}
        self._stale = False  # something changed on which a verdict may depend
        self._again_at = math.inf  # when a death has taken too long to be judged
        self._guilty: set[str] = set()
        self._ended: dict[str, str] = {}  # engine -> the guilty one that was on trial there
        # Engines whose death the guilty answer for, these and earlier ones -> the guilty who were inside.
        self._explained: dict[str, set[str]] = {}
        self._open: frozenset[str] = frozenset()  # those whose death is not judged yet
        self._died_at: dict[str, tuple[float, int]] = {}  # engine -> when, and the order in which it was told of
        self._numbers = itertools.count()
        self.on_news: Callable[[], None] = lambda: None
        self.on_suspects: Callable[[], None] = lambda: None  # somebody is under suspicion who was not

    @property
    def armed(self) -> bool:
        return bool(self._own or self._others)

    # -- what is asked -------------------------------------------------------------------------------------------

    def suspected(self, print_: str) -> bool:
        """Whether it must be on trial: an engine died with this request inside that had no answer yet. Whoever kills later does
        so when his trial is over. What a guilty one did on trial, he did alone; of an earlier death two may be guilty."""
        self._settle()
        return self._unheard(print_) and bool(self._dead(print_))

    def blown(self, print_: str) -> bool:
        """Whether this request is refused."""
        return not self.pending(print_) and self._inside_too_many(print_)  # what is due is judged first

    def pending(self, print_: str) -> bool:
        """Whether it is neither refused nor tried before others were heard: one of them may have ended an engine that died with
        it inside."""
        self._settle()
        if not self._inside_too_many(print_) or print_ in self._guilty or len(self._all_dead(print_)) >= MOST_DEATHS:
            return False
        heard = [e for e in self._unexplained(print_) if e not in self._open and not self._waits(e, print_)]
        return len(heard) < DEATHS

    def excused(self, print_: str) -> int:
        """How many engines died with it inside for which somebody else answers."""
        self._settle()
        return sum(e in self._explained for e in self._all_dead(print_)) if print_ not in self._guilty else 0

    # -- what happens --------------------------------------------------------------------------------------------

    def died(self, print_: str, engine: str, trial_s: float = 0.0, *, begun: bool = False) -> int:
        """That engine died with this request inside, which was on trial there for so long, or not (0), and whose answer had
        `begun` or not; how many have by now."""
        self._forget_late()
        self._notice(engine)
        known, _ = self._own.pop(print_, (_NONE, 0.0))
        known = known if engine in known or len(known) >= ENGINES_KEPT else known | {engine}
        self._own[print_] = known, self._clock() + REMEMBERED_S
        if not begun:
            self._own_suspects.add(print_)
        if trial_s:
            trials = self._own_trials.setdefault(print_, {})
            trials[engine] = max(trial_s, trials.get(engine, 0.0))
        self._own_changed(print_)
        while len(self._own) > MOST:
            self._forget(next(iter(self._own)))
        self._settle()
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
        self._own_changed(print_)
        self._settle()

    def survived(self, print_: str) -> None:
        """It was answered to its end: whatever ended engines, it is not this."""
        if print_ in self._others and print_ not in self._acquitted:
            self._acquitted.add(print_)
            self._changed(print_)
        if print_ in self._own:
            self._forget(print_)
        self._settle()

    # -- between gateways ----------------------------------------------------------------------------------------

    def told(self) -> Deaths:
        """Of its own, for the other gateways: the same object while nothing changed."""
        self._forget_late()
        if self._told is None:
            told = [*itertools.islice(reversed(self._own), TOLD)][::-1]
            trials = ((e, p, s) for p in told for e, s in self._own_trials.get(p, {}).items())
            self._told = Deaths(
                {p: tuple(sorted(self._own[p][0], key=self._order)) for p in told},
                {e: (p, s) for e, p, s in sorted(trials, key=_seconds)},
                tuple(p for p in told if p in self._own_suspects),
            )
        return self._told

    def ages(self) -> dict[str, float]:
        """Seconds since the deaths of the engines that are told of."""
        now, told = self._clock(), {e for engines in self.told().deaths.values() for e in engines}
        return {e: round(now - self._died_at[e][0], 3) for e in told & self._died_at.keys()}

    def hear(self, told: Iterable[Deaths], ages: Mapping[str, float] | None = None) -> None:
        """What all the others tell now, those that left included, and how many seconds ago the engines died; now, of which
        nobody says when."""
        heard: list[_Tale] = [(one.deaths, one.trials, one.suspects) for one in told]
        if heard == self._heard:
            return
        changed: set[str] = set()
        for before, now in itertools.zip_longest(self._heard, heard, fillvalue=_NOTHING):
            if before[0] != now[0]:
                changed |= {print_ for print_, _ in before[0].items() ^ now[0].items()}
        self._heard = heard
        self._notice_all((e for deaths, _, _ in heard for p in deaths if p in changed for e in deaths[p]), ages or {})
        for print_ in changed:
            engines = _NONE.union(*(deaths[print_] for deaths, _, _ in heard if print_ in deaths))
            if engines:
                self._others[print_] = engines
            else:
                self._others.pop(print_, None)
        suspects = frozenset[str]().union(*(those for _, _, those in heard))
        changed |= suspects ^ self._others_suspects
        new = suspects - self._others_suspects
        trials = [(engine, print_, trial_s) for _, those, _ in heard for engine, (print_, trial_s) in those.items()]
        self._stale |= trials != self._others_trials
        self._others_suspects, self._others_trials = suspects, trials
        self._others_tried = frozenset(print_ for _, print_, _ in trials)
        self._cleared &= suspects
        self._acquitted &= self._others.keys()
        for print_ in changed:
            self._changed(print_)
        self._settle()
        if new:
            self.on_suspects()

    # -- verdicts ------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Before anything is answered: what is too old is forgotten, what is due is judged."""
        self._forget_late()
        if self._stale or self._clock() >= self._again_at:
            self._judge()

    def _judge(self) -> None:
        """Doors let one in on trial at a time, so one of those who say so of one engine came when it was dead already, or in
        that instant: whoever was there for longest was there before it."""
        self._stale, self._again_at = False, math.inf
        own = ((e, p, s) for p, trials in self._own_trials.items() for e, s in trials.items())
        longest = {e: p for e, p, _ in sorted((*own, *self._others_trials), key=_seconds)}
        accused = {e: p for e, p in longest.items() if len(self._all_dead(p)) >= DEATHS}
        before = [e for e, p in self._ended.items() if accused.get(e) == p]
        self._guilty, self._ended, self._explained = set(), {}, {}
        for engine in before:  # what was found stays so, unless some come to light who were not heard
            if not self._waits(engine, accused[engine]):
                self._find(engine, accused.pop(engine))
        inside = {p: self._all_dead(p) for p in accused.values()}

        def later(engine: str, print_: str) -> Iterable[frozenset[str]]:
            order = self._order(engine)
            return (inside[p] for e, p in accused.items() if p != print_ and self._order(e) > order)

        while ready := next((e for e, p in accused.items() if not self._waits(e, p, later(e, p))), None):
            self._find(ready, accused.pop(ready))
        self._open = _NONE.union(*(inside[p] for p in accused.values()))

    def _find(self, engine: str, print_: str) -> None:
        """Whether who was on trial there is guilty. Not where a guilty one was inside as a newcomer: it was his doing."""
        if self._explained.get(engine, set()) - {print_}:
            return
        if len(self._dead(print_)) >= DEATHS:
            self._ended[engine] = print_
            self._guilty.add(print_)
            for earlier in self._all_dead(print_):
                self._explained.setdefault(earlier, set()).add(print_)

    def _waits(self, engine: str, print_: str, later: Iterable[frozenset[str]] = ()) -> bool:
        """Whether others may have ended that engine, which died with this one inside, who are still to be heard: newcomers, and
        those who were newcomers and were then on trial in a `later` one that died, which is not judged yet: given are the
        deaths with them inside. Not for ever: a client may have left."""
        late_at = self._died_at[engine][0] + HEARD_S if engine in self._died_at else 0.0
        if self._clock() >= late_at:
            return False
        if not self._newcomers(engine, print_) and not any(engine in dead for dead in later):
            return False
        self._again_at = min(self._again_at, late_at)
        return True

    def _newcomers(self, engine: str, but: str) -> bool:
        """Whether others for whom it was the first are still to have their trial."""
        for dead in self._among.get(engine, ()):
            if engine not in self._explained and all(e == engine or e in self._explained for e in dead):
                those = self._together[dead]
                if len(those) > 1 or but not in those:
                    return True
        return False

    def _inside_too_many(self, print_: str) -> bool:
        return (
            print_ in self._guilty
            or len(self._unexplained(print_)) >= DEATHS
            or len(self._all_dead(print_)) >= MOST_DEATHS
        )

    def _unexplained(self, print_: str) -> list[str]:
        return [e for e in self._dead(print_) if e not in self._explained]

    def _dead(self, print_: str) -> list[str]:
        return [e for e in self._all_dead(print_) if self._ended.get(e, print_) == print_]

    def _all_dead(self, print_: str) -> frozenset[str]:
        known = self._own[print_][0] if print_ in self._own else _NONE
        heard = self._others.get(print_)
        return known if heard is None or print_ in self._acquitted else known | heard

    def _unheard(self, print_: str) -> bool:
        return print_ in self._own_suspects or (print_ in self._others_suspects and print_ not in self._cleared)

    # -- what is remembered --------------------------------------------------------------------------------------

    def _own_changed(self, print_: str) -> None:
        self._told = None
        self._changed(print_)

    def _changed(self, print_: str) -> None:
        """Something is known of it that was not, or no longer. Puts it where it stands, and has the verdicts made anew if they
        may be others: it was on trial somewhere, or there is a newcomer, or the only one but one, where there was none."""
        self._stale |= print_ in self._own_trials or print_ in self._others_tried
        dead = self._all_dead(print_) if self._unheard(print_) else _NONE
        before = self._stands.pop(print_, _NONE)
        if dead:
            self._stands[print_] = dead
        if dead == before:
            return
        if before:
            left = self._together[before]
            left.discard(print_)
            self._stale |= len(left) < 2
            if not left:
                del self._together[before]
                for engine in before:
                    self._among[engine].discard(before)
                    if not self._among[engine]:
                        del self._among[engine]
        if dead:
            joined = self._together.setdefault(dead, set())
            joined.add(print_)
            self._stale |= len(joined) <= 2
            if len(joined) == 1:
                for engine in dead:
                    self._among.setdefault(engine, set()).add(dead)

    def _forget_late(self) -> None:
        now = self._clock()
        while self._own and self._own[print_ := next(iter(self._own))][1] <= now:
            self._forget(print_)

    def _forget(self, print_: str) -> None:
        del self._own[print_]
        self._own_suspects.discard(print_)
        self._stale |= self._own_trials.pop(print_, None) is not None
        self._own_changed(print_)

    def _notice(self, engine: str, age_s: float = 0.0) -> None:
        if engine not in self._died_at:
            self._died_at[engine] = self._clock() - age_s, next(self._numbers)
            if len(self._died_at) > MOST:
                del self._died_at[next(iter(self._died_at))]

    def _notice_all(self, engines: Iterable[str], ages: Mapping[str, float]) -> None:
        new = dict.fromkeys(e for e in engines if e not in self._died_at)
        for engine in sorted(new, key=lambda e: -ages.get(e, 0.0)):
            self._notice(engine, ages.get(engine, 0.0))

    def _order(self, engine: str) -> tuple[float, int]:
        return self._died_at.get(engine, (-math.inf, -1))


_Tale = tuple[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, float]], tuple[str, ...]]
_NOTHING: _Tale = ({}, {}, ())
_NONE: frozenset[str] = frozenset()


def _seconds(trial: tuple[str, str, float]) -> float:
    return trial[2]


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
