"""The process that waits for the next replica, on real Ray. One version alone: Ray gives a process that waits to whichever
actor comes first, so a replica of another version that starts meanwhile takes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fleet.test_scaling import MODELS, idle_processes, model_file, ready, titled
from tests.stack import Stack, stack, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("models")
    model_file(folder, "zero", **MODELS["zero"])
    with stack(tmp_path_factory.mktemp("sim") / "state", profile="sim", models=folder) as running:
        yield running


def test_the_process_that_waits_is_the_one_the_next_replica_gets(sim: Stack) -> None:
    for _ in range(3):
        until(lambda: ready(sim, "zero") == 0, "nothing serves it", 30)
        waiting = until(lambda: idle_processes(sim), "a process waits for the next replica", 30)
        assert sim.chat("zero", "hello", max_tokens=2).status_code == 200
        (process,) = titled(sim, b"ray::ServeReplica:zero@a")
        assert process in waiting
