"""How many replicas a version should have: pure. No clock, no I/O, no Ray; times are seconds.

`serve_policy` feeds it from the directory's table, `steelyard scale simulate` from a trace.
"""

from __future__ import annotations

import math

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One version at one moment, summed over its replicas and all gateways."""

    replicas: int  # asked for now: what the fleet is steering to
    ready: int  # of them, so many serve
    held: int = 0  # requests waiting in gateways
    running: int = 0  # generations inside doors
    waiting: int = 0  # of those, waiting in the engines' own queues
    slots: int = 1  # generations that one replica's door lets in
    kv_usage: float = 0.0  # share of KV cache blocks in use, 0..1, of the fullest replica
    finished_per_s: float | None = None  # requests finished per second, all replicas together; None: not known
    gpu_busy: float | None = None  # share of time the GPUs worked, 0..1; tells idle from busy, nothing else
    age_s: float = 0.0  # of the oldest part of this observation


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator set for one version (`scaling:` of the model file)."""

    min: int
    max: int
    target_ongoing: float  # requests per replica that are as many as it should have
    scale_down_after_s: float = 300.0
    idle_to_zero_s: float | None = None  # None: the last replica goes as any other does


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision must know of earlier ones; the caller hands it back unread."""

    needs: tuple[tuple[float, int], ...] = ()  # (when, replicas needed then), within the down window
    busy_at: float | None = None  # when anything was last held or running


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """`replicas` is within bounds; `reason` is one sentence for an operator."""

    replicas: int
    reason: str
    memory: Memory


STALE_S = 5.0  # an older observation decides nothing: the count stays


def decide(load: Load, limits: Limits, memory: Memory, now: float) -> Decision:
    """Replicas for the load: up at once and proportional, down when the whole window agrees."""
    if load.age_s > STALE_S:
        kept = min(max(load.replicas, limits.min), limits.max)
        return Decision(replicas=kept, reason=f"holds: the load was last seen {load.age_s:.0f} s ago", memory=memory)
    ongoing = load.held + load.running
    need = math.ceil(ongoing / limits.target_ongoing)
    busy_at = now if ongoing or memory.busy_at is None else memory.busy_at
    needs = (*((t, n) for t, n in memory.needs if now - t < limits.scale_down_after_s), (now, need))
    wanted = max(need, min(max(n for _, n in needs), load.replicas))
    if wanted == 0 and limits.idle_to_zero_s is not None and now - busy_at < limits.idle_to_zero_s:
        wanted = min(1, load.replicas)
    replicas = min(max(wanted, limits.min), limits.max)
    reason = f"held {load.held} + running {load.running} at {limits.target_ongoing:g} per replica needs {need}"
    return Decision(replicas=replicas, reason=reason, memory=Memory(needs=needs, busy_at=busy_at))
