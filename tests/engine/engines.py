"""Start an engine as a process, talk to it over plain HTTP, and leave nothing of it behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serving.catalog.weights import resolve
from serving.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
NAMES = ("tiny", "tiny@v1")
CONTEXT = 2048


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream, parsed; b"[DONE]" stays bytes. Fails on anything vLLM would not write."""
        assert self.body.endswith(b"\n\n"), self.body[-100:]
        found: list[Any] = []
        for event in self.body[:-2].split(b"\n\n"):
            assert event.startswith(b"data: "), event
            assert b"\n" not in event, event
            data = event.removeprefix(b"data: ")
            found.append(data if data == b"[DONE]" else json.loads(data))
        return found


class Stream:
    """An open streamed request; `close` hangs up."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self.response = connection.getresponse()

    def event(self) -> bytes:
        """The next event, without its blank line; b"" when the stream is over."""
        line = self.response.readline()
        if line:
            assert self.response.readline() == b"\n"
        return line.removesuffix(b"\n")

    def rest(self) -> bytes:
        """All that still comes. Raises http.client.IncompleteRead when the engine cuts the stream."""
        return self.response.read()

    def close(self) -> None:
        # The response holds the socket too; both must go before the engine sees a hang-up.
        self.response.close()
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Engine:
    """A running engine."""

    port: int
    process: subprocess.Popen[bytes]
    kind: str
    log: Path | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, method: str = "GET") -> Answer:
        return self._whole(method, path, None, {})

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        """`body` as JSON, or as it is when it is bytes."""
        return self._whole("POST", path, body, headers or {})

    def stream(self, path: str, body: Any, timeout_s: float = 30) -> Stream:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        _send(connection, "POST", path, body, {})
        return Stream(connection)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, by the full name it has on the page."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no sample {name} {labels}")

    def load(self) -> tuple[int, int]:
        """(running, waiting) as the engine's gauges have it."""
        return int(self.metric("vllm:num_requests_running")), int(self.metric("vllm:num_requests_waiting"))

    def _whole(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            _send(connection, method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()


def _send(connection: http.client.HTTPConnection, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} | headers)


def eventually(what: str, holds: Callable[[], bool], deadline_s: float = 10) -> None:
    """Poll until `holds()`; fail naming `what` at the deadline."""
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


@contextmanager
def simulator(*flags: str, env: dict[str, str] | None = None) -> Iterator[Engine]:
    """A simulator on a free port, ready; fast unless the flags say otherwise."""
    defaults = ("--port", "0", "--sim-start-s", "0", "--sim-ttft-ms", "1", "--sim-itl-ms", "1")
    process = start_simulator(*defaults, *flags, env=env)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().decode()
        found = re.search(rf"http://{re.escape(HOST)}:(\d+)", ready)
        assert found, f"no ready line but {ready!r}"
        yield Engine(int(found[1]), process, "simulator")
    finally:
        process.kill()
        process.communicate()


def start_simulator(*flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    paths = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.Popen(
        [sys.executable, "-m", "serving.engine.simulator", *flags],
        env=os.environ | {"PYTHONPATH": paths} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@contextmanager
def vllm(log: Path) -> Iterator[Engine]:
    """A real vLLM with the tiny model (half a minute to start), or a skip that says what is missing."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    weights = resolve("build:tiny/v1", base=ROOT / "models", cache=load_settings().cache_dir)
    port = _free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    argv += [
        "--served-model-name",
        *NAMES,
        "--enforce-eager",
        "--enable-request-id-headers",
        "--enable-prompt-tokens-details",
    ]
    argv += ["--host", HOST, "--port", str(port), "--max-model-len", str(CONTEXT)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": HOST, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            argv, env=os.environ | env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
    engine = Engine(port, process, "vllm", log)
    try:
        eventually("vLLM answers /health", lambda: _healthy(engine), deadline_s=300)
        yield engine
    finally:
        # The session is ours: server, core and worker go together.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(engine: Engine) -> bool:
    assert engine.log is not None
    assert engine.process.poll() is None, f"vLLM ended: {engine.log.read_text()[-3000:]}"
    try:
        return engine.get("/health").status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port
