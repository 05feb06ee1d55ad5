"""The bench's handle on the load process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from bench.load import Spec, Summary
from bench.recording import Recording

ROOT = Path(__file__).parents[1]


class Client:
    """`python -m bench.load`, kept between phases; a context manager."""

    def __init__(self) -> None:
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
        self._answer(lambda: None, 60.0)

    @property
    def pid(self) -> int:
        return self._child.pid

    def run(
        self, spec: Spec, tick: Callable[[], None] = lambda: None, every_s: float = 1.0
    ) -> tuple[Summary, Recording]:
        """Run one phase; `tick` is called every `every_s` seconds once load runs. Raises RuntimeError when the load process
        dies: what a server does never kills it."""
        assert self._child.stdin is not None
        self._child.stdin.write(spec.json() + "\n")
        self._child.stdin.flush()
        self._answer(lambda: None, 60.0)
        try:
            told = self._answer(tick, every_s)
        except Exception:
            self._answer(lambda: None, every_s)  # the phase goes on: the next one must not take its end for its own
            raise
        summary = Summary(**json.loads(told))
        return summary, Recording.load(Path(summary.out))

    def _answer(self, tick: Callable[[], None], every_s: float) -> str:
        assert self._child.stdout is not None
        while not select.select([self._child.stdout], [], [], every_s)[0]:
            tick()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the load process ended with {self._child.wait()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(10)
