"""Two processes at once (`make test`): what deploys and clusters machines runs in one, what starts engines in the other, each one
after the other, and then the rest, whole files at a time. Two engines at once on two cores would make each other late."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: no test's time says anything of what it tests.
settings.register_profile("steelyard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fast", settings.get_profile("steelyard"), max_examples=20)  # `make test-fast`
settings.load_profile("steelyard")

MACHINES = ("tests/deploy/", "tests/fleet/")
LIGHT = ("tests/unit/", "tests/gateway/", "tests/k8s/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not xdist's own groups: they are marked on a name that pytest 9.2 no longer reads.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(LIGHT):
                return nodeid.split("::")[0]
            return "machines" if nodeid.startswith(MACHINES) else "engines"

    return Scheduling(config, log)
