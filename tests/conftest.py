"""Two at once (`make test`): all that starts Ray, engines or machines runs in one process, one after the other; the rest
beside it, whole files at a time. Two engines at once on two cores would make each other late."""

from __future__ import annotations

from pathlib import Path

import pytest

HEAVY = ("engine", "ray", "gpu", "slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):  # one at a time, and nobody knows the marker: `make gpu-check`
        return
    for item in items:
        heavy = any(item.get_closest_marker(name) for name in HEAVY)
        item.add_marker(pytest.mark.xdist_group("machine" if heavy else str(Path(item.nodeid.split("::")[0]))))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "machine")
