"""`scaling.decide` inside Ray Serve: the function that every version's `AutoscalingPolicy` names.

Serve's controller calls it for each version in every round of its loop, ten times a second, and everything else waits
meanwhile. So it never asks anybody: a daemon thread of the controller's process follows the directory and keeps the last
table with its age; the function joins that with what Serve says of the deployment and calls `decide`.

* Serve clips the answer to `min_replicas` and `max_replicas`. A directory that is away holds the count.
* Serve's own delays would come on top of those of `decide`: the context handed back has none. The fields
  `downscale_delay_s` and `downscale_to_zero_delay_s` are how `scaling:` of a model file gets here: they are no part of
  the application's code version, so a change of them rolls nothing. Arguments of the policy would be. Schedules fit
  into no such field: the thread reads them from the `user_config` of the config that is served.
* A controller that restarts, and one that takes another config, has no memory: it goes on from Serve's own count, and
  nothing goes down before a whole window was seen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from serving.fleet import directory, keeper
from serving.fleet.endpoint import GATEWAY_APP, GatewayInfo, Snapshot, State
from serving.fleet.history import Cause, Change
from serving.fleet.scaling import Floor, Limits, Load, Memory, decide

log = logging.getLogger(__name__)

POLL_S = 2.0  # an answer at least so often: a table without news is as fresh as one with
CALL_S = 5.0
SCHEDULES_EVERY_S = 5.0  # Serve's controller is asked for its own config so often
AGAIN_S = 0.25  # a table without news is decided on this often: delays pass all the same
RATE_WINDOW_S, RATE_STEP_S = 10.0, 1.0
STEP_S = 2.0  # arrivals of so little time count when they are more: a mean of ten seconds learns of a step too late
AWAY_S = 1e9  # age of a table that never came
REPORTS_KEPT = 1000
_NO_DELAYS = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}


class Context(Protocol):
    """Of `ray.serve.config.AutoscalingContext`, what is read here. `config` is an `AutoscalingConfig`."""

    app_name: str | None
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]
    config: Any


def policy(ctx: Any) -> tuple[int, dict[str, Any]]:
    """What Serve calls. Serve pickles this function by value, so it imports all it needs, itself included."""
    from serving.fleet import serve_policy

    return serve_policy.here().replicas(ctx)


class Rates(NamedTuple):
    """Requests per second over the last `RATE_WINDOW_S`, through all gateways; of arrivals, those of the last `STEP_S` when
    they came faster."""

    arrived: float
    finished: float


class Table:
    """The directory's last table as this process knows it; filled by `Follower`, by hand in tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.snapshot: Snapshot | None = None
        self.floors: dict[str, tuple[Floor, ...]] = {}  # version id -> its schedule; whoever has none is not there
        self._clock = clock
        self._at = -AWAY_S
        # Per gateway, its counts at times of the window, the oldest first: differences of one gateway alone mean something.
        self._counts: dict[str, deque[tuple[float, GatewayInfo]]] = {}

    def put(self, snapshot: Snapshot) -> None:
        now = self._clock()
        counts = {g.id: self._counts.get(g.id) or deque[tuple[float, GatewayInfo]]() for g in snapshot.gateways}
        for gateway in snapshot.gateways:
            known = counts[gateway.id]
            if len(known) > 1 and now - known[-2][0] < RATE_STEP_S:
                known.pop()
            known.append((now, gateway))  # the newest always, and those before it in steps
            while len(known) > 1 and now - known[1][0] >= RATE_WINDOW_S:
                known.popleft()
        self._counts = counts
        self.snapshot, self._at = snapshot, now

    def age_s(self) -> float:
        return self._clock() - self._at

    def rates(self, version_id: str) -> Rates | None:
        """None until a gateway was watched for half a window."""
        arrived = lately = finished = 0.0
        watched = False
        for known in self._counts.values():
            (began, first), (ended, last) = known[0], known[-1]
            if ended - began >= RATE_WINDOW_S / 2:
                watched = True
                before, earlier = next((at, g) for at, g in reversed(known) if ended - at >= STEP_S)
                arrived += (last.arrived.get(version_id, 0) - first.arrived.get(version_id, 0)) / (ended - began)
                lately += (last.arrived.get(version_id, 0) - earlier.arrived.get(version_id, 0)) / (ended - before)
                finished += (last.finished.get(version_id, 0) - first.finished.get(version_id, 0)) / (ended - began)
        return Rates(max(arrived, lately), finished) if watched else None


class Policy:
    """One per controller process. Called from its event loop only; never blocks."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.changes: deque[Change] = deque(maxlen=REPORTS_KEPT)  # for the directory; taken out by `Follower`
        self._answers: dict[str, int] = {}
        self._troubled: set[str] = set()

    def replicas(self, ctx: Context, now: float | None = None) -> tuple[int, dict[str, Any]]:
        """How many replicas Serve shall have, and what to hand back next time. `now` is Unix time. Whatever is wrong, it
        raises nothing: an exception here would stop the controller's round for every application."""
        version_id = ctx.app_name or ""
        try:
            answer = self._decide(ctx, version_id, time.time() if now is None else now)
            self._troubled.discard(version_id)
            return answer
        except Exception:
            if version_id not in self._troubled:
                log.exception("%s: its policy failed; the number of replicas stays", version_id)
            self._troubled.add(version_id)
            return ctx.target_num_replicas, ctx.policy_state

    def _decide(self, ctx: Context, version_id: str, now: float) -> tuple[int, dict[str, Any]]:
        limits, target, state = limits_of(ctx, self._table.floors), ctx.target_num_replicas, ctx.policy_state
        ctx.config = ctx.config.model_copy(update=_NO_DELAYS)
        self._notice_bounds(version_id, target)
        snapshot = self._table.snapshot
        seen = state.get("seen")
        if seen == (snapshot and snapshot.number, target, limits) and 0 <= now - state["at"] < AGAIN_S:
            return target, state
        memory = state.get("memory") or Memory()
        load = observe(snapshot, version_id, target, self._table.age_s(), self._table.rates(version_id))
        decision = decide(load, limits, memory, now)
        after = min(max(decision.replicas, ctx.capacity_adjusted_min_replicas), ctx.capacity_adjusted_max_replicas)
        if snapshot is not None and not snapshot.complete:
            after = max(after, target)  # replicas that have not told a restarted directory of themselves may be busy
        if after < target:
            after = max(after, min(1, target - 1))  # Serve goes to zero from one alone
        if after != target:
            self._report(version_id, target, after, decision.reason, load)
        self._answers[version_id] = after
        return after, {"memory": decision.memory, "seen": (snapshot and snapshot.number, target, limits), "at": now}

    def _notice_bounds(self, version_id: str, target: int) -> None:
        """Serve's count is another than the last answer: somebody gave the version other bounds."""
        before = self._answers.get(version_id, target)
        if before != target:
            self._answers[version_id] = target
            self._report(version_id, before, target, "other bounds were set", None)

    def _report(self, version_id: str, before: int, after: int, reason: str, load: Load | None) -> None:
        self.changes.append(
            Change(
                version_id=version_id,
                at=time.time(),
                before=before,
                after=after,
                cause=cause(before, after) if load is not None else "bounds",
                reason=reason,
                load=load,
            )
        )


def cause(before: int, after: int) -> Cause:
    """The kind of a change that the load asked for."""
    if after == 0:
        return "to_zero"
    return "from_zero" if before == 0 else "load"


def limits_of(ctx: Context, floors: Mapping[str, tuple[Floor, ...]]) -> Limits:
    """`scaling:` of the model file, out of Serve's own fields, and of the schedules of all versions this one's."""
    config = ctx.config
    return Limits(
        min=ctx.capacity_adjusted_min_replicas,
        max=ctx.capacity_adjusted_max_replicas,
        target_ongoing=config.target_ongoing_requests,
        scale_down_after_s=config.downscale_delay_s,
        # Beside a min that was set at run time: one that keeps a replica does not go to zero when idle.
        idle_to_zero_s=None if ctx.capacity_adjusted_min_replicas else config.downscale_to_zero_delay_s,
        floors=floors.get(ctx.app_name or "", ()),
    )


def floors_of(user_config: Mapping[str, Any] | None) -> tuple[Floor, ...]:
    """The schedule of a version, out of its deployment's config as it is served. ValueError when it cannot be."""
    return tuple(
        Floor(start=e["start"], end=e["end"], timezone=e["timezone"], replicas=e["min"])
        for e in (user_config or {}).get("schedule", ())
    )


def observe(snapshot: Snapshot | None, version_id: str, asked: int, age_s: float, rates: Rates | None = None) -> Load:
    """One version's load, out of the directory's table. `asked`: the replicas that Serve steers to now."""
    if snapshot is None:
        return Load(replicas=asked, ready=0, age_s=AWAY_S)
    ready = [e for e in snapshot.endpoints if e.version_id == version_id and e.state is State.READY]
    busy = [snapshot.gpu_busy[e.id] for e in ready if e.id in snapshot.gpu_busy]
    return Load(
        replicas=asked,
        ready=len(ready),
        held=sum(g.held.get(version_id, 0) for g in snapshot.gateways),
        running=sum(e.in_flight for e in ready),  # what drains ends by itself, on replicas that count no more
        waiting=sum(e.waiting for e in ready),
        slots=min((e.slots for e in ready), default=1),
        kv_usage=max((e.kv_usage for e in ready), default=0.0),
        kv_mean=sum(e.kv_usage for e in ready) / len(ready) if ready else None,
        arrived_per_s=None if rates is None else rates.arrived,
        finished_per_s=None if rates is None else rates.finished,
        gpu_busy=sum(busy) / len(busy) if busy else None,
        age_s=max(0.0, age_s),
    )


def schedules(
    served: Mapping[str, Any], known: Mapping[str, tuple[Floor, ...]]
) -> tuple[dict[str, tuple[Floor, ...]], dict[str, str]]:
    """Version id -> its schedule, from its deployment's `user_config`; and of those that cannot be, what is wrong. `up`
    has checked them, but nobody a chart's values: such a version keeps the one that is known."""
    floors, refused = {}, {}
    for name, user_config in served.items():
        try:
            floors[name] = floors_of(user_config)
        except (ValueError, LookupError, TypeError) as e:
            floors[name] = known.get(name, ())
            refused[name] = str(e)
    return {name: found for name, found in floors.items() if found}, refused


class Follower:
    """The thread: follows the directory, and tells it of the changes. Ray's calls are good from any thread."""

    def __init__(self, table: Table, policy: Policy) -> None:
        self._table = table
        self._policy = policy
        self._actor: Any = None
        self._refused: dict[str, str] = {}  # version id -> what is wrong with its schedule
        threading.Thread(target=self._run, name="directory-follower", daemon=True).start()

    def _run(self) -> None:
        epoch, number, away, read_at = "", -1, False, -AWAY_S
        while True:
            try:
                if time.monotonic() - read_at >= SCHEDULES_EVERY_S:  # first of all: nothing may go for want of it
                    self._read_schedules()
                    read_at = time.monotonic()
                snapshot = directory.unpack(self._call("wait", epoch, number, POLL_S), Snapshot)
                self._table.put(snapshot)
                epoch, number = snapshot.epoch, snapshot.number
                if away:
                    log.info("the directory is back")
                away = False
                self._tell()
            except Exception as e:  # any Ray error: the last table ages, and decides nothing
                if not away:
                    log.warning("the directory is away, replica counts stay: %s", type(e).__name__)
                away = True
                time.sleep(AGAIN_S)

    def _read_schedules(self) -> None:
        import ray

        controller = keeper.serve_controller()
        if controller is None:
            return
        apps = ray.get(controller.get_app_configs.remote(), timeout=CALL_S)
        served = {name: app.deployments[0].user_config for name, app in apps.items() if name != GATEWAY_APP}
        self._table.floors, refused = schedules(served, self._table.floors)
        for name in refused.keys() - self._refused.keys():
            log.error("%s: its schedule is not followed: %s", name, refused[name])
        self._refused = refused

    def _tell(self) -> None:
        while changes := [self._policy.changes[i] for i in range(min(100, len(self._policy.changes)))]:
            self._call("scaled", directory.pack(changes))
            for _ in changes:
                self._policy.changes.popleft()

    def _call(self, method: str, *args: Any) -> Any:
        import ray

        try:
            if self._actor is None:
                self._actor = directory.handle()
            return ray.get(getattr(self._actor, method).remote(*args), timeout=POLL_S + CALL_S)
        except ray.exceptions.ActorDiedError:  # gone for good, not restarting: another is made
            self._actor = None
            raise


_policy: Policy | None = None


def here() -> Policy:
    """This process's policy; the first call starts its thread."""
    global _policy
    if _policy is None:
        table = Table()
        _policy = Policy(table)
        Follower(table, _policy)
    return _policy
