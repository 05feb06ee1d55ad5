"""Last of its folder, for it ends the stack that the others share."""

from __future__ import annotations

import httpx
import pytest

from tests.stack import Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.ray]


def test_a_killed_main_process_takes_its_real_engines_along(real: Stack) -> None:
    """Under load, so that the engines' cores and workers are busy when it happens."""
    assert real.main is not None
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    url = f"{real.url}/v1/chat/completions"
    with httpx.stream("POST", url, headers=real.headers, json=body | {"max_tokens": 1500}, timeout=60) as stream:
        lines = stream.iter_lines()  # held: a generator that is dropped closes the connection, and the engines idle
        assert next(lines).startswith("data: ")
        assert len(real.processes()) > 8  # Ray's, gateway, directory, replicas, and three of each engine
        real.main.kill()
        real.main.wait()
        until(lambda: not real.processes(), "everything is gone", 15)
