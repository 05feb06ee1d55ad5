"""Who is tried again, when, and when an engine is taken for silent: bounds that keep one sick engine from making work for all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator

SHARE = 0.2  # of the requests at a version's engines, so many at most may be there because an attempt has just failed
LEAST = 3  # whatever runs
MOMENT_S = 0.25  # without a failure, or an answer sooner, and it is a request like any other
# One under suspicion is so for longer: vLLM's server notices half a second later that its core is gone. Where many wait for
# one engine each has less, so that the last has his turn within about `CROWD_S`, as far as the least allows.
TRIAL_S, TRIAL_LEAST_S, CROWD_S = 1.0, 0.25, 15.0
# So much longer nobody else is let in on trial at that engine: its death is noticed late where a gateway is busy.
LAG_S = 0.25
NEWS_S, LAST_NEWS_S = 0.1, 1.0
YOUNG_S = 5.0  # an engine that has a request for longer will hardly die of it
OCCUPIED_S = 0.05  # another gateway's is on trial there: how long until it is asked again
SILENT_LEAST_S = 30.0  # a stream's first event may always take so long
SILENT_TIMES = 10.0  # and so many times as long as the slowest of late
WINDOW_S = 300.0


def news_s(siblings: bool, *, last: bool) -> float:
    """How long to wait after a death, before a request is tried again, or refused (`last`), for what others saw of it: in this
    gateway, which are all told of it in the same moment, and at its siblings."""
    if siblings:
        return LAST_NEWS_S if last else NEWS_S
    return NEWS_S if last else 0.0


class Turns:
    """So many at once, in the order in which they came; how many may change."""

    def __init__(self, places: Callable[[], int]) -> None:
        self._places = places
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def free(self) -> int:
        return max(0, self._places() - self._taken - len(self._waiting))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._taken and not self._waiting

    async def take(self) -> None:
        """The caller must `give` it back."""
        self._let_go()  # there may be more places than when somebody gave one back
        if self.free():
            self._taken += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got its turn in the same instant
                self.give()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def give(self) -> None:
        self._taken -= 1
        self._let_go()

    def _let_go(self) -> None:
        while self._waiting and self._taken < self._places():
            turn = self._waiting.popleft()
            if not turn.done():
                self._taken += 1
                turn.set_result(None)


def budget(running: Callable[[], int]) -> Turns:
    """The retries of one version at one gateway. One that finds no room waits for it, and gives it back as soon as its attempt
    has an answer, or has not failed for a moment: answers that take long keep nobody waiting, and nobody is refused for being
    one of many. What waits for another version's replicas takes none of this one's."""
    return Turns(lambda: max(LEAST, int(SHARE * running())))


class Trials:
    """Second chances of those under whom an engine died, one at a time on each engine of a line: whoever killed it must not
    have the innocent beside him again, or he would take them with him. Each has one engine, its home; the other gateways'
    are kept apart by its door."""

    def __init__(self) -> None:
        self.doors_tell = False  # whom they let in; from the first one that did
        self.put_off = 0  # those that wait until others have had their trials
        self._turns: dict[str, Turns] = {}  # by home

    async def take(self, home: Callable[[], str]) -> str:
        """Waits until its home, which may change meanwhile, has nobody on trial, and returns it. The caller must `give` it
        back."""
        while True:
            at = home()
            turns = self._turns.setdefault(at, Turns(lambda: 1))
            try:
                await turns.take()
            finally:
                self._tidy(at)
            if home() == at:
                return at
            self.give(at)

    def give(self, at: str) -> None:
        self._turns[at].give()
        self._tidy(at)

    @contextlib.contextmanager
    def others_first(self) -> Iterator[None]:
        self.put_off += 1
        try:
            yield
        finally:
            self.put_off -= 1

    @property
    def waiting(self) -> int:
        """For their own trial."""
        return sum(turns.waiting for turns in self._turns.values())

    @property
    def homes(self) -> Collection[str]:
        """The engines where somebody is on trial."""
        return self._turns.keys()

    def taken(self, at: str) -> bool:
        return at in self._turns

    def free(self, engines: int) -> int:
        """How many of so many engines have nobody on trial."""
        return max(0, engines - len(self._turns))

    def length_s(self, at: str) -> float:
        """Of the trial that is due there."""
        return max(min(TRIAL_LEAST_S, TRIAL_S), min(TRIAL_S, CROWD_S / (1 + self._turns[at].waiting) - LAG_S))

    def _tidy(self, at: str) -> None:
        turns = self._turns.get(at)
        if turns is not None and turns.idle:
            del self._turns[at]


class Retry:
    """One request's further attempts, and the first one of a request that is under suspicion."""

    __slots__ = (
        *("_alone_s", "_at", "_budget", "_inside", "_occupied", "_passed", "_since", "_timer", "_trials"),
        *("taken", "unreached"),
    )

    def __init__(self, budget: Turns, trials: Trials, passed: Callable[[], None] = lambda: None) -> None:
        self._budget, self._trials = budget, trials
        self._passed = passed  # called when its engine has lived for the whole of a trial, at most once for each
        self.taken = False  # a place in the budget
        self.unreached = 0  # attempts that no engine had: they cost none anything
        self._at: str | None = None  # where it has the turn to be on trial
        self._occupied = False  # where it is to be on trial, another gateway's is
        self._inside = False  # the door where it is on trial has let it in
        self._since, self._alone_s = 0.0, 0.0  # and nobody else meanwhile
        self._timer: asyncio.TimerHandle | None = None

    @property
    def trial_s(self) -> float:
        """For how long it has been on trial at its engine now, and nobody else can have been; 0 when that is not sure."""
        passed_s = time.monotonic() - self._since
        return passed_s if self._inside and passed_s <= self._alone_s else 0.0

    @property
    def outside(self) -> bool:
        """It was to be on trial, and the door, which would have told, has not let it in."""
        return self._alone_s > 0 and not self._inside and self._trials.doors_tell

    async def turn(self, home: Callable[[], str] | None, *, first: bool = False) -> None:
        """Waits until it may be tried: one under suspicion until nobody else is on trial at its `home`, and whoever was tried
        before, which is all but the `first` time, for a place among the retries. `close` gives the turn back."""
        self._untimed()
        if home is None and self._at is not None:  # cleared while it kept its turn
            at, self._at, self._occupied = self._at, None, False
            self._trials.give(at)
        if self._occupied:
            self._occupied = False
            await asyncio.sleep(OCCUPIED_S)
        if home is not None and self._at is None:
            # First the trial, then the place: whoever is on trial may be waiting for this one.
            self._give_place()
            self._at = await self._trials.take(home)
        if not (first or self.taken):
            await self._budget.take()
            self.taken = True

    def sent(self) -> float:
        """It is on its way to an engine. From now on it has the turn for a moment only. For so many seconds nobody else may be
        on trial there, when it is, else 0 is returned."""
        self._untimed()
        trial_s = 0.0 if self._at is None else self._trials.length_s(self._at)
        self._inside, self._since = False, time.monotonic()
        self._alone_s = trial_s and trial_s + LAG_S
        self._timer = asyncio.get_running_loop().call_later(trial_s or MOMENT_S, self._moment_over, trial_s)
        return self._alone_s

    def let_in(self) -> None:
        """By the door where it is on trial: from now on."""
        self._inside = self._trials.doors_tell = True
        self._since = time.monotonic()
        if self._timer is None and self._alone_s:  # late, by an engine that had no time for it
            self._timer = asyncio.get_running_loop().call_later(TRIAL_S, self._passed)

    def occupied(self) -> None:
        """It keeps its turn, and is not to be sent again at once."""
        self._occupied = True

    def close(self) -> None:
        """It has an answer, or will not get one."""
        self._give_turn()
        self._occupied, self._alone_s = False, 0.0

    def _moment_over(self, trial_s: float) -> None:
        """It has not failed, as those that have no answer before they have all of it."""
        self._give_turn()
        if trial_s and not self.outside:
            left_s = self._since + TRIAL_S - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, left_s), self._passed)

    def _give_turn(self) -> None:
        self._untimed()
        self._give_place()
        if self._at is not None:
            at, self._at = self._at, None
            self._trials.give(at)

    def _give_place(self) -> None:
        if self.taken:
            self.taken = False
            self._budget.give()

    def _untimed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Patience:
    """How long the first event of a stream may take, by how long it took of late. Times are monotonic seconds."""

    __slots__ = ("_before", "_slowest", "_until")

    def __init__(self) -> None:
        self._before = self._slowest = self._until = 0.0

    def took(self, seconds: float, now: float) -> None:
        if now >= self._until:
            self._before = self._slowest if now < self._until + WINDOW_S else 0.0
            self._slowest, self._until = 0.0, now + WINDOW_S
        if seconds > self._slowest:
            self._slowest = seconds

    def bound_s(self) -> float:
        return max(SILENT_LEAST_S, SILENT_TIMES * max(self._slowest, self._before))
