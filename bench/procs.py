"""Processes under measurement: start and stop them, pin them, and read what they cost (CPU seconds, PSS)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

_ENGINE_MARK = b"STEELYARD_ENGINE_MARK="
_ENGINE_TITLES = ("VLLM::", "vllm.entrypoints", "serving.engine.simulator")
_BACKEND_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
_GATEWAY_TITLE = "ServeReplica:gateway"


class StartFailed(RuntimeError):
    """A process under measurement ended or did not answer in time; the message holds the end of its log."""


def exit_on_sigterm() -> None:
    """Turn the first SIGTERM into SystemExit, so that context managers stop what they started; a second one must not
    interrupt them at that."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


class Service:
    """A child process with its log; a context manager that leaves nothing of it behind.

    `stop` asks with SIGTERM, waits `grace_s` seconds, then kills its session and every process ever seen below it
    (Ray's and vLLM's children open sessions of their own).
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path, grace_s: float = 30.0) -> None:
        self.env = dict(env)
        self.log, self._grace_s = log, grace_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                argv, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def pid(self) -> int:
        return self._child.pid

    def tree(self) -> list[psutil.Process]:
        """The process and everything below it, now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            found = [root, *root.children(recursive=True)]
            self._seen.update((p.pid, p) for p in found)
            return found
        return []

    def wait_until(self, url: str, timeout_s: float, look: Callable[[], None] = lambda: None) -> float:
        """Seconds until `url` answered 200; `look` is called after each try. Raises StartFailed when the process ends
        or the time does."""
        began = time.monotonic()
        while not answers(url):
            look()
            if self._child.poll() is not None:
                raise StartFailed(f"ended with {self._child.returncode} before it was ready:\n{self.log_end()}")
            if time.monotonic() - began > timeout_s:
                raise StartFailed(f"not ready after {timeout_s:.0f} s:\n{self.log_end()}")
            time.sleep(0.2)
        look()
        return time.monotonic() - began

    def log_end(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        self.tree()
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(self._grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in self._seen.values():
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil checks the start time, so a reused pid is safe
        self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of `url` gives 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """A TCP port of the loopback address that nothing listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def title(process: psutil.Process) -> str:
    """The process's title as `ps` shows it; empty when it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def short_title(process: psutil.Process) -> str:
    """The title's first words, without folders."""
    return " ".join(word.rsplit("/", 1)[-1] for word in title(process).split()[:3])[:48]


def engine_pids(processes: Iterable[psutil.Process]) -> set[int]:
    """Those that are engines or live below one. Recognised by the environment mark, and by title for processes whose
    title was rewritten (which overwrites the environment that /proc shows)."""
    found: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.pid in found or not (_marked(process.pid) or any(t in title(process) for t in _ENGINE_TITLES)):
                continue
            found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return found


def gateway_pids(processes: Iterable[psutil.Process]) -> set[int]:
    """Those that are gateway replicas."""
    return {p.pid for p in processes if _GATEWAY_TITLE in title(p)}


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, that these processes have used so far, all threads included."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def pss_mib(pids: Iterable[int]) -> float:
    """Proportional set size in MiB: memory shared by n processes counts 1/n for each."""
    kib = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as f:
            kib += sum(int(line.split()[1]) for line in f if line.startswith("Pss:"))
    return kib / 1024


def pin_engines(processes: Iterable[psutil.Process]) -> str:
    """Put engine backends (EngineCore, Worker) on the last core and everything else given, their API servers, on the
    first; what was done, for the report.

    On two cores the first token of an unpinned engine is bimodal: EngineCore polls, and the server waits for its core.
    With more than four cores the scheduler has room and nothing is pinned.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 2 <= len(cores) <= 4:
        return "none"
    listed = list(processes)
    for process in listed:
        is_backend = any(t in title(process) for t in _BACKEND_TITLES)
        pin(process.pid, {cores[-1]} if is_backend else {cores[0]})
    return f"engine cores on {cores[-1]}; API servers and the client on {cores[0]}; gateways free"


def pin(pid: int, cores: set[int]) -> None:
    """Pin every thread of a process (affinity is per thread; new threads inherit their creator's)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(tid), cores)


def _marked(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as f:
        return _ENGINE_MARK in f.read()
    return False
