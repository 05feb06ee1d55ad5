"""Two processes at once (`make test`): what starts Ray, engines or machines runs in one, one after the other; the rest beside
it, whole files at a time. Two engines at once on two cores would make each other late."""

from __future__ import annotations

from typing import Any

import pytest

LIGHT = ("tests/unit/", "tests/gateway/", "tests/k8s/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not xdist's own groups: they are marked on a name that pytest 9.2 no longer reads.
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("::")[0] if nodeid.startswith(LIGHT) else "machine"

    return Scheduling(config, log)
