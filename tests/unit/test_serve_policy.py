"""The policy as Serve calls it: Ray's own wrapper around ours, with the directory's table laid beside its context."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from serving.catalog.spec import Catalog, ModelSpec, Scaling
from serving.fleet import manifest, serve_policy
from serving.fleet.endpoint import Endpoint, GatewayInfo, Snapshot, State
from serving.fleet.scaling import STALE_S
from serving.fleet.serve_policy import Policy, Table

ID = "m@v"


class Fleet:
    """One version under Serve: its policy as Serve wraps it, and a world whose clock is set by hand."""

    def __init__(self, target: int = 1, **scaling: Any) -> None:
        self.now = 1_000_000.0
        self.table = Table(clock=lambda: self.now)
        self.policy = Policy(self.table)
        self.scaling = {"min": 1, "max": 8, "target_ongoing": 4, "scale_down_after_s": 60, **scaling}
        self.target = target
        self.state: dict[str, Any] = {}
        self._number = 0
        self.tell()

    def tell(
        self,
        *,
        held: int = 0,
        running: int = 0,
        complete: bool = True,
        state: State = State.READY,
        arrived: int = 0,
        finished: int = 0,
    ) -> None:
        """The directory's table comes in: as many replicas as Serve wants are ready, and share what runs."""
        self._number += 1
        endpoints = tuple(
            Endpoint(
                id=f"e{i}", model="m", version="v", url="x", state=state, slots=8,
                in_flight=running // self.target + (i < running % self.target),
            )
            for i in range(self.target)
        )  # fmt: skip
        counts = {"arrived": {ID: arrived}, "finished": {ID: finished}}
        gateways = (GatewayInfo(id="g", url="x", held={ID: held} if held else {}, **counts),)
        self.table.put(
            Snapshot(epoch="e", number=self._number, complete=complete, endpoints=endpoints, gateways=gateways)
        )

    def tick(self, passes_s: float = 0.1) -> int:
        """One round of Serve's controller; what it steers to afterwards."""
        self.now += passes_s
        config = AutoscalingConfig(**manifest.autoscaling_config(Scaling(**self.scaling), 8))
        ctx = SimpleNamespace(
            app_name=ID,
            config=config,
            target_num_replicas=self.target,
            current_num_replicas=self.target,
            total_num_requests=0,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state=self.state.copy(),
        )
        decided, self.state = _apply_autoscaling_config(lambda c: self.policy.replicas(c, self.now))(ctx)
        self.target = max(config.min_replicas, min(config.max_replicas, int(decided)))
        return self.target

    def ticks(self, seconds: float, **load: Any) -> int:
        """So long under one load, with a table twice a second."""
        for _ in range(round(seconds * 2)):
            self.tell(**load)
            self.tick(0.5)
        return self.target


def test_a_version_that_keeps_a_replica_does_not_go_to_zero_when_idle() -> None:
    config = manifest.autoscaling_config(Scaling(min=0, max=2, idle_to_zero_s=2), 8) | {"min_replicas": 1}
    ctx = SimpleNamespace(
        app_name=ID,
        config=AutoscalingConfig(**config),
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=2,
    )
    assert serve_policy.limits_of(ctx, {}).idle_to_zero_s is None  # type: ignore[arg-type]


def test_a_schedule_reaches_the_policy_through_the_served_config() -> None:
    spec = {
        "name": "m",
        "versions": [
            {
                "version": "v",
                "engine": {"kind": "simulator"},
                "scaling": {"max": 8, "schedule": [{"start": "0 8 * * *", "end": "0 9 * * *", "min": 4}]},
            }
        ],
    }
    catalog = Catalog((ModelSpec.model_validate(spec),), {"m": Path("/")})
    _, engine = manifest.serve_config(catalog, gateways=1, locate=lambda source, base: Path(source))["applications"]
    fleet = Fleet(min=0)
    fleet.table.floors = {ID: serve_policy.floors_of(engine["deployments"][0]["user_config"])}
    fleet.now = 7.99 * 3600
    assert fleet.ticks(1) == 1
    fleet.now = 8 * 3600
    assert fleet.ticks(1) == 4
    assert "the schedule keeps 4" in fleet.policy.changes[-1].reason
    assert fleet.ticks(600) == 4
    fleet.now = 9 * 3600
    assert fleet.ticks(61) == 0


def test_a_schedule_that_cannot_be_is_named_and_moves_nothing() -> None:
    good = {"start": "0 8 * * *", "end": "0 9 * * *", "timezone": "UTC", "min": 4}
    served = {ID: {"schedule": [good]}, "none@a": None, "plain@a": {"drain_s": 1}}
    known, refused = serve_policy.schedules(served, {})
    assert ([*known], refused) == ([ID], {})
    for bad in ({**good, "start": "at eight"}, {"start": "0 8 * * *"}, {**good, "timezone": "Mars/Olympus"}):
        kept, refused = serve_policy.schedules(served | {ID: {"schedule": [bad]}}, known)
        assert (kept, [*refused]) == (known, [ID])


def test_a_breach_is_answered_within_two_seconds_and_in_full() -> None:
    fleet = Fleet()
    fleet.ticks(10, running=2)
    assert fleet.ticks(2, held=16, running=8) >= 5


def test_a_step_is_no_less_a_breach_where_the_pace_of_arrivals_was_slow() -> None:
    """Requests of two seconds, one at a time; then sixteen at once and for good."""
    fleet = Fleet()
    for half in range(60):
        fleet.ticks(0.5, running=1, arrived=half // 4, finished=half // 4)
    assert fleet.target == 1
    for _ in range(4):
        fleet.ticks(0.5, held=8, running=8, arrived=15 + 16, finished=15)
    assert fleet.target == 4


def test_serve_adds_no_delay_of_its_own_to_ours() -> None:
    fleet = Fleet(target=4, scale_down_after_s=60)
    assert fleet.ticks(50) == 4
    assert fleet.ticks(25) == 1


def test_the_last_replica_goes_by_the_other_delay_and_from_one() -> None:
    fleet = Fleet(target=3, min=0, scale_down_after_s=5, idle_to_zero_s=60)
    fleet.ticks(1, running=1)
    assert fleet.ticks(30) == 1
    assert fleet.ticks(50) == 0
    assert [(c.before, c.after) for c in fleet.policy.changes][-1] == (1, 0)


def test_what_a_gateway_holds_wakes_the_first_replica_in_one_round() -> None:
    fleet = Fleet(target=0, min=0)
    assert fleet.tick() == 0
    fleet.tell(held=1)
    assert fleet.tick() == 1
    assert fleet.policy.changes[-1].cause == "from_zero"


def test_without_a_table_the_count_stays() -> None:
    fleet = Fleet(target=3)
    fleet.table = Table(clock=lambda: fleet.now)
    fleet.policy = Policy(fleet.table)
    for _ in range(1000):
        assert fleet.tick() == 3


def test_a_directory_that_went_away_holds_the_count_whatever_it_said_last() -> None:
    fleet = Fleet(target=3, scale_down_after_s=1)
    fleet.ticks(STALE_S, running=12)
    fleet.tell()  # its last word: nothing runs
    fleet.tick(STALE_S + 1)
    for _ in range(100):
        assert fleet.tick() == 3


def test_a_table_that_may_lack_replicas_takes_none_away_and_still_adds() -> None:
    fleet = Fleet(target=3, scale_down_after_s=1)
    assert fleet.ticks(20, complete=False) == 3
    assert fleet.ticks(3, held=40, complete=False) > 3


def test_a_controller_without_memory_goes_on_from_serves_own_count() -> None:
    fleet = Fleet(target=5, scale_down_after_s=30)
    fleet.ticks(20)
    fleet.state = {}  # it restarted, or took another config
    assert fleet.ticks(20) == 5


def test_between_two_tables_little_is_done() -> None:
    fleet = Fleet()
    fleet.tick()
    before = fleet.state
    assert fleet.tick(0.01) == 1
    assert fleet.state["at"] == before["at"]


def test_other_bounds_are_a_change_with_its_own_cause() -> None:
    fleet = Fleet(target=1)
    fleet.tick()
    fleet.scaling["min"] = fleet.target = 3  # Serve clips its count when it takes the config
    fleet.tick()
    assert [(c.cause, c.before, c.after) for c in fleet.policy.changes][-1] == ("bounds", 1, 3)


def test_each_change_is_told_once_with_its_reason_and_load() -> None:
    fleet = Fleet()
    fleet.ticks(5, running=2)
    fleet.ticks(5, held=10, running=8)
    ups = [c for c in fleet.policy.changes if c.direction == "up"]
    assert len(ups) == 1
    assert "held 10" in ups[0].reason and ups[0].load is not None and ups[0].load.held == 10


def test_a_policy_that_fails_keeps_the_count_and_spares_the_other_applications(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(target=3)
    monkeypatch.setattr(serve_policy, "decide", lambda *args: 1 / 0)
    assert [fleet.tick() for _ in range(5)] == [3] * 5
    assert len(caplog.records) == 1  # ten rounds a second would fill the disk
    monkeypatch.undo()
    assert fleet.tick(1) == 3


def test_whatever_the_load_serve_stays_in_bounds() -> None:
    chance = random.Random(7)
    fleet = Fleet(target=2, min=1, max=6, scale_down_after_s=2)
    for _ in range(500):
        fleet.tell(held=chance.choice([0, 0, 3, 90]), running=chance.randrange(0, 40))
        assert 1 <= fleet.tick(chance.choice([0.1, 1.0, 7.0])) <= 6


def test_what_serve_pickles_runs_the_installed_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve takes the function by value: had it our code inside, an upgrade would go on with the old one for ever."""
    fleet = Fleet(target=0, min=0)
    fleet.tell(held=1)
    monkeypatch.setattr(serve_policy, "_policy", fleet.policy)
    config = AutoscalingConfig(**manifest.autoscaling_config(Scaling(min=0, max=2), 8))
    assert len(config.policy.get_serialized_policy_def() or b"") < 3000
    called = _resolve_policy_callable(config.policy)
    ctx = SimpleNamespace(
        app_name=ID, config=config, target_num_replicas=0, policy_state={},
        capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=2,
    )  # fmt: skip
    assert called(ctx)[0] == 1


def test_only_ready_replicas_count_as_running() -> None:
    def endpoint(name: str, state: State, **load: Any) -> Endpoint:
        return Endpoint(id=name, model="m", version="v", url="x", state=state, slots=4, **load)

    table = Snapshot(
        epoch="e",
        number=1,
        complete=True,
        endpoints=(
            endpoint("a", State.READY, in_flight=3, waiting=1, kv_usage=0.2),
            endpoint("b", State.READY, in_flight=1, kv_usage=0.9),
            endpoint("c", State.DRAINING, in_flight=9),
            endpoint("d", State.STARTING),
        ),
        gateways=(GatewayInfo(id="g", url="", held={ID: 2}), GatewayInfo(id="h", url="", held={ID: 3, "n@v": 7})),
    )
    load = serve_policy.observe(table, ID, 3, 0.5)
    assert (load.replicas, load.ready, load.held, load.running, load.waiting) == (3, 2, 5, 4, 1)
    assert (load.slots, load.kv_usage, load.age_s) == (4, 0.9, 0.5)


def test_rates_are_of_gateways_that_were_watched_and_not_of_one_that_came() -> None:
    clock = [0.0]
    table = Table(clock=lambda: clock[0])

    def tell(at: float, *gateways: tuple[str, int, int]) -> None:
        clock[0] = at
        infos = tuple(GatewayInfo(id=i, url="", arrived={ID: a}, finished={ID: f}) for i, a, f in gateways)
        table.put(Snapshot(epoch="e", number=int(at), complete=True, gateways=infos))

    tell(0, ("g", 1000, 900))
    assert table.rates(ID) is None
    for second in range(1, 31):
        tell(second, ("g", 1000 + 7 * second, 900 + 3 * second))
    tell(31, ("g", 1217, 993), ("new", 5000, 5000))  # its counts are of before it was seen here
    assert table.rates(ID) == (7, 3)
    tell(32, ("new", 5001, 5001))
    assert table.rates(ID) is None
    assert table.rates("other@v") is None


def test_how_the_gpus_of_ready_replicas_worked_is_part_of_the_load() -> None:
    endpoints = tuple(
        Endpoint(id=i, model="m", version="v", url="x", state=s, slots=8)
        for i, s in (("a", State.READY), ("b", State.READY), ("c", State.STARTING), ("unwatched", State.READY))
    )
    snapshot = Snapshot(epoch="e", number=1, complete=True, endpoints=endpoints)
    assert serve_policy.observe(snapshot, ID, 3, 0.0).gpu_busy is None
    seen = msgspec.structs.replace(snapshot, gpu_busy={"a": 0.4, "b": 0.2, "c": 1.0, "gone": 1.0})
    assert serve_policy.observe(seen, ID, 3, 0.0).gpu_busy == pytest.approx(0.3)
