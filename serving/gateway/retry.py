"""Who is tried again, when, and when an engine is taken for silent: bounds that keep one sick engine from making work for all."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

SHARE = 0.2  # of the requests at a version's engines, so many at most may be there because an attempt has just failed
LEAST = 3  # whatever runs
TRIAL_S = 0.25  # without a failure, or an answer sooner, and it is a request like any other
SILENT_LEAST_S = 30.0  # a stream's first event may always take so long
SILENT_TIMES = 10.0  # and so many times as long as the slowest of late
WINDOW_S = 300.0


class Turns:
    """So many at once, in the order in which they came; how many may change."""

    def __init__(self, places: Callable[[], int]) -> None:
        self._places = places
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def free(self) -> int:
        return max(0, self._places() - self._taken - len(self._waiting))

    async def take(self) -> None:
        """The caller must `give` it back."""
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
    have the innocent beside him again, or he would take them with him."""

    def __init__(self, engines: Callable[[], int]) -> None:
        self.on: set[str] = set()  # endpoints
        self.turns = Turns(lambda: max(1, engines()))


class Retry:
    """One request's further attempts."""

    __slots__ = ("_budget", "_suspect", "_timer", "_trials", "_where", "taken")

    def __init__(self, budget: Turns, trials: Trials) -> None:
        self._budget, self._trials = budget, trials
        self.taken = self._suspect = False  # a place in the budget, and one among the trials
        self._where = ""
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self, *, suspect: bool) -> None:
        """Waits until it may be tried. `close` gives the turn back."""
        if suspect:
            await self._trials.turns.take()
            self._suspect = True
        await self._budget.take()
        self.taken = True

    def sent(self, endpoint_id: str) -> None:
        """It is at that engine. From now on it has the turn for a moment only."""
        self._leave()
        if self._suspect:
            self._where = endpoint_id
            self._trials.on.add(endpoint_id)
        self._timer = asyncio.get_running_loop().call_later(TRIAL_S, self.close)

    def close(self) -> None:
        """It has an answer, or will not get one, or has not failed for a moment, as those that have no answer before they have
        all of it."""
        self._leave()
        if self.taken:
            self.taken = False
            self._budget.give()
        if self._suspect:
            self._suspect = False
            self._trials.turns.give()

    def _leave(self) -> None:
        if self._where:
            self._trials.on.discard(self._where)
            self._where = ""
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
