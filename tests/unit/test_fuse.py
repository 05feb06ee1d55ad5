"""Whoever ends engines ends two at most, and nobody else is refused for it, in whatever order things happen."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from serving.gateway.fuse import DEATHS, MOST_DEATHS, Fuse

ENGINES = 3


@dataclass(eq=False)
class Request:
    name: str
    guilty: bool  # it ends engines, before it has an answer, and while it is on trial there if it is
    gateway: int
    on_trial: bool = False
    begun: bool = False
    deaths: int = 0
    ended: int = 0


class Fleet(RuleBasedStateMachine):
    """Engines and two gateways, which hear of each other before anybody is tried again, as they do after `retry.news_s`. No
    two guilty ones have no answer yet in the same engine: nobody can tell which of them ended it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.fuses = [Fuse(lambda: self.now), Fuse(lambda: self.now)]
        self.engines: dict[str, list[Request]] = {}
        self.waiting: list[Request] = []
        self.count = 0
        for _ in range(ENGINES):
            self.start()

    def start(self) -> None:
        self.count += 1
        self.engines[f"engine-{self.count}"] = []

    def inside(self, *, guilty: bool | None = None) -> list[tuple[str, Request]]:
        everybody = [(e, r) for e, inside in self.engines.items() for r in inside]
        return [(e, r) for e, r in everybody if guilty in (None, r.guilty)]

    def enter(self, engine: str, request: Request, *, on_trial: bool = False) -> None:
        request.on_trial = on_trial
        self.engines[engine].append(request)

    def room(self, request: Request, *, on_trial: bool) -> list[str]:
        return [
            e
            for e, inside in self.engines.items()
            if not (request.guilty and any(r.guilty for r in inside))
            and not (on_trial and any(r.on_trial for r in inside))
        ]

    def fuse(self, request: Request) -> Fuse:
        return self.fuses[request.gateway]

    def news(self) -> None:
        told = [fuse.told() for fuse in self.fuses]
        self.fuses[0].hear([told[1]])
        self.fuses[1].hear([told[0]])

    @rule(guilty=st.booleans(), gateway=st.integers(0, 1), at=st.integers(0, ENGINES - 1))
    def comes(self, guilty: bool, gateway: int, at: int) -> None:
        self.count += 1
        request = Request(f"{'guilty' if guilty else 'innocent'}-{self.count}", guilty, gateway)
        room = self.room(request, on_trial=False)
        if room:
            self.enter(room[at % len(room)], request)

    @precondition(lambda self: self.inside(guilty=False))
    @rule(which=st.integers(0), whole=st.booleans())
    def is_answered(self, which: int, whole: bool) -> None:
        inside = self.inside(guilty=False)
        engine, request = inside[which % len(inside)]
        self.passes(request)
        if whole or request.begun:
            self.engines[engine].remove(request)
            self.fuse(request).survived(request.name)
        request.begun = True
        self.news()

    @precondition(lambda self: any(r.on_trial for _, r in self.inside(guilty=False)))
    @rule(which=st.integers(0))
    def is_slow(self, which: int) -> None:
        """Its trial is over before it has an answer."""
        on_trial = [r for _, r in self.inside(guilty=False) if r.on_trial]
        self.passes(on_trial[which % len(on_trial)])
        self.news()

    def passes(self, request: Request) -> None:
        if request.on_trial:
            request.on_trial = False
            self.fuse(request).passed(request.name)

    @precondition(lambda self: self.inside(guilty=True))
    @rule(which=st.integers(0))
    def dies(self, which: int) -> None:
        inside = self.inside(guilty=True)
        engine, guilty = inside[which % len(inside)]
        guilty.ended += 1
        assert guilty.ended <= DEATHS, guilty
        for request in self.engines.pop(engine):
            request.deaths += 1
            on_trial_s = 0.2 if request.on_trial else 0.0
            self.fuse(request).died(request.name, engine, on_trial_s, begun=request.begun)
            if not request.begun:
                self.waiting.append(request)
        self.start()
        self.news()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0), at=st.integers(0, ENGINES - 1))
    def is_tried_again(self, which: int, at: int) -> None:
        request = self.waiting[which % len(self.waiting)]
        fuse = self.fuse(request)
        if fuse.blown(request.name):
            assert request.guilty or request.deaths >= MOST_DEATHS, f"{request} is refused"
            self.waiting.remove(request)
        elif not fuse.pending(request.name):
            on_trial = fuse.suspected(request.name)
            room = self.room(request, on_trial=on_trial)
            if room:
                self.waiting.remove(request)
                self.enter(room[at % len(room)], request, on_trial=on_trial)

    def teardown(self) -> None:
        """Everybody who waits is answered or refused in the end."""
        for _ in range(12 * (1 + len(self.waiting) + len(self.inside()))):
            if not self.waiting and not self.inside():
                return
            while self.inside(guilty=True):
                self.dies(0)
            while self.inside(guilty=False):
                self.is_answered(0, whole=True)
            for i in range(len(self.waiting)):
                self.is_tried_again(-1 - i if i < len(self.waiting) else 0, i % ENGINES)
            self.now += 2.0  # nobody is waited for longer than `HEARD_S`
        raise AssertionError(f"{self.waiting} wait for ever")


def test_whoever_ends_engines_ends_two_and_nobody_else_is_refused() -> None:
    run_state_machine_as_test(Fleet, settings=settings(max_examples=20, stateful_step_count=40, deadline=None))
