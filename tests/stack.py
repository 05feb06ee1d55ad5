"""A whole stack, started as a person would start it: `steelyard up` in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from serving.engine.process import ENGINE_MARK, STACK_MARK

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
READY_S = 300  # two engines on two busy cores


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(probe: Callable[[], T], what: str, within_s: float = 30.0, every_s: float = 0.05) -> T:
    """The first true answer of `probe`; fails the test after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)


class Stack:
    """One running stack with its own port and state folder."""

    def __init__(
        self, state_dir: Path, *, profile: str, models: Path | str = ROOT / "models", port: int | None = None
    ) -> None:
        self.state_dir = state_dir
        self.port = port or free_port()
        self.log = state_dir.parent / f"{state_dir.name}.log"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")},
            "STEELYARD_STATE_DIR": str(state_dir),
            "STEELYARD_PORT": str(self.port),
            "STEELYARD_PROFILE": profile,
            "STEELYARD_MODELS": str(models),
        }
        self.main: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.state_dir / "api-key").read_text().strip()

    @property
    def secret(self) -> str:
        return (self.state_dir / "cluster-secret").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def cli(self, *args: str, check: bool = True, timeout_s: float = READY_S) -> subprocess.CompletedProcess[str]:
        """One command of `steelyard` against this stack."""
        command = [sys.executable, "-m", "serving.cli.main", *args]
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def start(self) -> Stack:
        self.spawn()
        assert self.main is not None
        main = self.main
        until(
            lambda: "Ctrl-C stops everything" in self.output() or main.poll() is not None,
            f"ready; it printed:\n{self.output()}",
            READY_S,
        )
        assert main.poll() is None, self.output()
        return self

    def spawn(self) -> None:
        """Starts without waiting."""
        with open(self.log, "wb") as out:
            self.main = subprocess.Popen(
                [sys.executable, "-m", "serving.cli.main", "up"],
                env=self.env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def processes(self) -> list[int]:
        """Pids of everything of this stack but its main process, found by the marks in their environments."""
        wanted = tuple(f"{name}={self.state_dir}:".encode() for name in (ENGINE_MARK, STACK_MARK))
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parts = (entry / "environ").read_bytes().split(b"\0")
                    # A zombie has an empty environment: it holds nothing any more.
                    if any(p.startswith(wanted) for p in parts):
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        if self.main is not None and self.main.poll() is None:
            self.main.send_signal(signal.SIGTERM)
            try:
                self.main.wait(30)
            except subprocess.TimeoutExpired:
                self.main.kill()
                self.main.wait()
        until(lambda: not self.processes(), "no process of the stack is left", 15)
        if (self.state_dir / "cluster.json").exists():  # it was killed: its folder of sockets is still there
            self.cli("down")

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=30, **kwargs)

    def chat(self, model: str, text: str, **body: Any) -> httpx.Response:
        payload = {"model": model, "messages": [{"role": "user", "content": text}], **body}
        return httpx.post(f"{self.url}/v1/chat/completions", headers=self.headers, json=payload, timeout=120)


@contextlib.contextmanager
def stack(state_dir: Path, **options: Any) -> Iterator[Stack]:
    running = Stack(state_dir, **options)
    try:
        yield running.start()
    finally:
        running.stop()
