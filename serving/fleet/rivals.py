"""What `steelyard scale simulate` compares with: static provisioning, Ray Serve's own policy, an HPA.

Each gets our queue, our drain and our target; they differ in the number of replicas alone.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from serving.fleet.scaling import Limits, Load
from serving.fleet.simulate import Fleet


class Static:
    """So many, always."""

    name = "static peak"

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int:
        return self.replicas


class RayServe:
    """The default policy of the installed Ray Serve, with its documented delays: metrics of the last 30 s, reported
    every 10 s; up after 30 s, down after 600 s. Raises ImportError where Ray is missing."""

    name = "ray serve"
    DOWN_S = 600.0

    def __init__(self, limits: Limits, down_s: float = DOWN_S) -> None:
        # The decorator that Serve's controller applies reads the wall clock; its parts take the time as an argument.
        from ray.serve import autoscaling_policy
        from ray.serve.config import AutoscalingConfig, AutoscalingContext

        self._ray: Any = autoscaling_policy
        self._context: Any = AutoscalingContext
        self.config: Any = AutoscalingConfig(
            min_replicas=limits.min,
            max_replicas=limits.max,
            target_ongoing_requests=limits.target_ongoing,
            downscale_delay_s=down_s,
        )
        self.limits = limits
        self.state: dict[str, Any] = {}
        self.seen = 0.0
        self.reported_at = -math.inf

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int:
        if now - self.reported_at >= self.config.metrics_interval_s:
            self.reported_at, self.seen = now, fleet.mean_ongoing(self.config.look_back_period_s)
        context = self._context(
            deployment_id=None,
            deployment_name="",
            app_name=None,
            current_num_replicas=load.ready,
            target_num_replicas=load.replicas,
            running_replicas=[],
            total_num_requests=self.seen,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self.limits.min,
            capacity_adjusted_max_replicas=self.limits.max,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )
        desired, _ = self._ray.replica_queue_length_autoscaling_policy(context)
        if load.ready:
            desired = self._ray._apply_scaling_factors(desired, load.ready, self.config)
            desired, self.state = self._ray._apply_delay_logic(
                max(0, desired), load.replicas, self.config, self.state, _now=now
            )
        wanted: int = math.ceil(desired)
        return min(max(wanted, self.limits.min), self.limits.max)


class Hpa:
    """Kubernetes' HorizontalPodAutoscaler v2 on the ongoing requests (an external metric with an average value): every
    15 s, 10 % tolerance, up by at most 4 pods or 100 % in 15 s, down to the maximum of the last 300 s."""

    name = "hpa"
    PERIOD_S, TOLERANCE, DOWN_S, PODS = 15.0, 0.10, 300.0, 4

    def __init__(self, limits: Limits, down_s: float = DOWN_S) -> None:
        self.limits, self.down_s = limits, down_s
        self.next = 0.0
        self.wanted: deque[tuple[float, int]] = deque()

    def __call__(self, load: Load, fleet: Fleet, now: float) -> int:
        if now < self.next:
            return load.replicas
        self.next = now + self.PERIOD_S
        if not self.wanted:
            self.wanted.append((now, load.replicas))  # as Kubernetes does: a new HPA begins with what is there
        ongoing = load.held + load.running
        ratio = ongoing / (self.limits.target_ongoing * max(1, load.replicas))
        desired = load.replicas if abs(ratio - 1) <= self.TOLERANCE else math.ceil(ongoing / self.limits.target_ongoing)
        low, high = max(1, self.limits.min), self.limits.max
        desired = min(max(desired, low), high)
        while self.wanted and now - self.wanted[0][0] > self.down_s:
            self.wanted.popleft()
        self.wanted.append((now, desired))
        if desired < load.replicas:
            return min(load.replicas, max(n for _, n in self.wanted))
        return min(desired, max(load.replicas + self.PODS, 2 * load.replicas))
