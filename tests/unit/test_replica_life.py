"""A replica's life in any order of events: what its engine does, what the watch says of it, what Serve asks of it. The directory
is the real table, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import aiohttp
import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving import replica
from serving.engine.command import EngineSpec
from serving.engine.health import Judgement, Memory
from serving.errors import EngineError
from serving.fleet.directory import Table, unpack
from serving.fleet.endpoint import Endpoint, State

NOWHERE = "http://127.0.0.1:1"
UP = (State.READY, State.SUSPECT, State.DRAINING)


class Process:
    """The engine's process, as far as a replica asks."""

    def __init__(self) -> None:
        self.alive = True
        self.stopped = 0

    def stop(self, grace_s: float = 5.0) -> None:
        self.alive = False
        self.stopped += 1

    def telling_lines(self, limit: int = 3) -> str:
        return "it ran out of memory"


class Directory:
    """What a replica tells, in a real table; away at times."""

    def __init__(self) -> None:
        self.table = Table(0)
        self.away = False
        self.states: list[State] = []

    async def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        if self.away:
            raise TimeoutError
        assert method == "announce"
        endpoint = unpack(args[0], Endpoint)
        if not self.states or self.states[-1] is not endpoint.state:
            self.states.append(endpoint.state)
        return self.table.announce(endpoint, 0)


class Replica(replica.EngineReplica):
    """Serve awaits the shutdown hook; the garbage collector must not find one."""

    stop = replica.EngineReplica.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.process, self.directory = Process(), Directory()
        self.ended = False

    @initialize()
    def is_made(self) -> None:
        spec = EngineSpec(model="m", version="v", kind="simulator", weights="m", served_names=["m"])

        async def make() -> Replica:
            made = Replica(msgspec.to_builtins(spec))
            made._http = aiohttp.ClientSession()
            return made

        self.replica = self.loop.run_until_complete(make())
        self.replica._directory = self.directory  # type: ignore[assignment]

    @property
    def state(self) -> State:
        return self.replica._endpoint.state

    @precondition(lambda self: self.state is State.STARTING and not self.ended)
    @rule()
    def generates_its_first_token(self) -> None:
        self.replica._engine = self.process  # type: ignore[assignment]
        self.replica._set(state=State.READY, url=NOWHERE, ready_after_s=1.0)

    @precondition(lambda self: self.state in UP and not self.ended)
    @rule(
        verdict=st.sampled_from(["ok", "suspect", "suspect", "failed"]),
        cause=st.sampled_from(["stuck", "silent", "refuses", "health", "process"]),
    )
    def is_judged(self, verdict: Any, cause: Any) -> None:
        if not self.process.alive:
            verdict, cause = "failed", "process"
        elif cause == "process":
            cause = "stuck"
        judged = Judgement(verdict, Memory(proved_at=0.0), "" if verdict == "ok" else cause, "no step for 9.9 s")
        before = self.state
        self.loop.run_until_complete(self.replica._follow(judged))
        if verdict == "failed":
            assert self.state is State.FAILED and not self.process.alive
        elif before is State.DRAINING:
            assert self.state is before
        else:
            assert self.state is (State.READY if verdict == "ok" else State.SUSPECT)

    @precondition(lambda self: not self.ended)
    @rule()
    def its_engine_dies(self) -> None:
        self.process.alive = False
        self.replica._on_engine_exit("the engine's server ended")

    @rule()
    def it_reports(self) -> None:
        self.loop.run_until_complete(self.replica._announce())

    @rule(away=st.booleans())
    def the_directory_goes_or_comes(self, away: bool) -> None:
        self.directory.away = away

    @rule()
    def serve_asks_for_its_health(self) -> None:
        failed = self.state is State.FAILED
        with pytest.raises(EngineError, match="m@v") if failed else contextlib.nullcontext():
            self.loop.run_until_complete(self.replica.check_health())

    @precondition(lambda self: not self.ended)
    @rule()
    def serve_stops_it(self) -> None:
        self.loop.run_until_complete(self.replica.stop())
        self.ended = True
        assert self.state is State.STOPPED

    @invariant()
    def trouble_has_a_reason_and_health_has_none(self) -> None:
        e = getattr(self, "replica", None) and self.replica._endpoint
        if e and e.state in (State.SUSPECT, State.FAILED):
            assert e.reason and e.fault
        elif e and e.state is State.READY:
            assert not e.reason and not e.fault

    @invariant()
    def no_engine_outlives_its_end(self) -> None:
        if self.ended:
            assert not self.process.alive or self.replica._engine is None

    @invariant()
    def what_others_heard_is_a_life_that_goes_forward(self) -> None:
        states = self.directory.states
        for gone in (State.FAILED, State.STOPPED):
            if gone in states:
                after = states[states.index(gone) + 1 :]
                assert all(s in (State.FAILED, State.STOPPED) for s in after)

    def teardown(self) -> None:
        if not self.ended:
            self.loop.run_until_complete(self.replica.stop())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEELYARD_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("STEELYARD_CLUSTER_SECRET", "between-engines-and-gateways")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")


@pytest.mark.usefixtures("node")
async def test_a_start_that_fails_for_whatever_reason_is_counted_as_one() -> None:
    made = Replica(msgspec.to_builtins(EngineSpec("m", "v", "simulator", "m", ["m"])))
    made._directory = table = Directory()  # type: ignore[assignment]
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(made, "_start_once", side_effect=full),
        pytest.raises(EngineError, match=r"OSError: .*No space left") as told,
    ):
        await made.reconfigure({})
    assert made._endpoint.state is State.FAILED and made._endpoint.fault == "start"
    assert table.table.facts("m@v").failures == 1
    assert told.value.__suppress_context__
    await made.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("node")
class TestLife(Life.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
