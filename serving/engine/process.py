"""One engine process: start, watch, stop, and above all: never leave one behind.

The engine is a tree (server -> EngineCore -> Worker) in its own process group. It ends when
  * its supervisor dies, however: each process of the tree has a parent-death signal armed (`guard/`), which is why the
    spawning thread must live as long as the engine: the kernel ties the signal to the parent *thread*;
  * any of its main processes dies: the watcher kills the group, a server without its EngineCore answers nothing;
  * `stop()` is called: SIGTERM, then SIGKILL, then a sweep by environment mark for what left the group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from serving.engine.command import Command
from serving.errors import EngineError

log = logging.getLogger(__name__)

ENGINE_MARK = "STEELYARD_ENGINE_MARK"  # on every process of an engine: `<state folder>:<replica id>`
STACK_MARK = "STEELYARD_STACK_MARK"  # on every process of Ray's: `<state folder>:ray`
LOG_BYTES = 64 * 1024 * 1024
KILL_WAIT_S = 15.0  # for the end of processes that were killed: gigabytes and GPUs are given back first
LOGS_KEPT = 100  # starts of one version on this node whose logs stay
_TELLING = ("Error", "error:", "Exception", "CUDA out of memory", "Killed", "No space left", "ValidationError")
_NOISE = ("RuntimeError: Engine core initialization failed", "Traceback (most recent", "EngineDeadError", "raise ")


class EngineProcess:
    """A running engine. `on_exit(sentence)` is called once, from the watcher thread, when one of its main processes ends unasked;
    what is left of the others may take seconds more to end, until `exited`."""

    def __init__(self, command: Command, log_path: Path, on_exit: Callable[[str], None] | None = None) -> None:
        self.command = command
        self.log_path = log_path
        self.exited = threading.Event()  # nothing of it is left
        self._broken = threading.Event()  # one of its main processes ended
        self.returncode: int | None = None
        self.pid = 0
        self._on_exit = on_exit
        self._stopping = False
        self._spawned = threading.Event()
        self._spawn_error: OSError | None = None
        self._thread = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    def start(self) -> None:
        """Spawns the process and returns at once; raises EngineError when it cannot even be spawned."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        forget_old_logs(self.log_path.parent)
        self._thread.start()
        self._spawned.wait()
        if self._spawn_error is not None:
            raise EngineError(f"cannot start {self.command.argv[0]}: {self._spawn_error}") from None

    @property
    def alive(self) -> bool:
        """All of its main processes run."""
        return self.pid != 0 and not self._broken.is_set()

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends the tree: SIGTERM, after `grace_s` SIGKILL, then the sweep. Nothing is left then, but for what takes longer than
        `KILL_WAIT_S` to end."""
        self._stopping = True
        if self.pid and not self.exited.is_set():
            _signal_group(self.pid, signal.SIGTERM)
            self.exited.wait(grace_s)
        if self.pid and not self.exited.is_set():  # else its number may be another's by now
            _signal_group(self.pid, signal.SIGKILL)
            self.exited.wait(KILL_WAIT_S)
        sweep(self.command.env[ENGINE_MARK])

    def telling_lines(self, limit: int = 3) -> str:
        """The last lines of the log that say why it died, joined by ` | `; else its last line."""
        return telling_lines(self.log_path, limit)

    def _supervise(self) -> None:
        # Spawn and wait in one thread: it lives exactly as long as the engine.
        try:
            with open(self.log_path, "ab", opener=_private) as out:
                child = subprocess.Popen(
                    self.command.argv,
                    env=self.command.env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as e:
            self._spawn_error = e
            self._spawned.set()
            return
        self.pid = child.pid
        self._spawned.set()
        watched: dict[int, str] = {}
        died = self._watch(child, watched)
        code = child.poll()  # None: it is another one that ended
        _signal_group(child.pid, signal.SIGKILL)
        self._broken.set()
        if not self._stopping and self._on_exit is not None:
            self._on_exit(died if code is None else f"{died} (exit code {code})")
        self.returncode = child.wait()
        _all_ended(watched, KILL_WAIT_S)
        sweep(self.command.env[ENGINE_MARK])
        self.exited.set()

    def _watch(self, child: subprocess.Popen[bytes], watched: dict[int, str]) -> str:
        """Blocks until one of the tree's main processes ends; how. `watched`: their pidfds, for the caller to close. Children are
        looked up once a second only while the tree still grows or could, by pidfd otherwise: no polling of /proc under load."""
        poller = select.poll()
        pids: set[int] = set()
        pause_ms = 500
        while True:
            before = len(pids)
            # Without a descriptor to spare it goes on by what it has: that is no reason to end an engine.
            with contextlib.suppress(OSError):
                for pid, name in ((child.pid, "server"), *_main_children(child.pid)):
                    if pid not in pids:
                        fd = os.pidfd_open(pid)
                        watched[fd] = f"the engine's {name} ended"
                        pids.add(pid)
                        poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll(pause_ms):
                return watched[fd]
            if child.poll() is not None:
                return "the engine's server ended"
            rotate(self.log_path)
            pause_ms = 1000 if len(pids) < 2 or len(pids) != before else 10_000


def _all_ended(pidfds: Iterable[int], within_s: float) -> None:
    """Waits for them, and closes them. A process that was killed holds its memory and its GPU until it has ended, and shows no
    mark any more."""
    deadline = time.monotonic() + within_s
    for fd in pidfds:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.poll(max(0.0, deadline - time.monotonic()) * 1e3)
        os.close(fd)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _main_children(pid: int) -> list[tuple[int, str]]:
    """EngineCore and Worker processes below `pid`; others (compile helpers, trackers) may come and go. So does what one of these
    forks: it has its title until it is another program."""
    found: list[tuple[int, str]] = []
    titled: dict[int, str] = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):  # parents first
            with contextlib.suppress(psutil.Error):
                title = " ".join(child.cmdline()) or child.name()
                for name in ("EngineCore", "Worker"):
                    if f"VLLM::{name}" in title:
                        titled[child.pid] = name
                        if titled.get(child.ppid()) != name:
                            found.append((child.pid, name))
                        break
    return found


def _signal_group(pgid: int, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, sig)


def sweep(mark: str, *, prefix: bool = False, wait_s: float = 5.0) -> int:
    """SIGKILLs every process of this user whose environment carries the mark (or a mark that starts with it); the
    count. The last line of defence: it needs no parent, group or pid file to be right."""
    killed = 0
    deadline = time.monotonic() + wait_s
    while pids := _marked(mark, prefix):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)  # SIGKILL is not waited for otherwise: these are not our children
    return killed


def _marked(mark: str, prefix: bool) -> list[int]:
    entries = tuple(f"{name}={mark}".encode() for name in (ENGINE_MARK, STACK_MARK))
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as f:
                for part in f.read().split(b"\0"):
                    if part in entries or (prefix and part.startswith(entries)):
                        found.append(int(name))
    return found


def rotate(path: Path) -> None:
    """A log over `LOG_BYTES` becomes `<path>.1` and begins anew. The engine holds the file and cannot be asked to open
    another, so it is copied and cut; it appends, and what it writes between the two is lost."""
    with contextlib.suppress(OSError):  # a full disk must not end the supervision
        if path.stat().st_size > LOG_BYTES:
            with open(path, "rb") as log, open(f"{path}.1", "wb", opener=_private) as old:
                shutil.copyfileobj(log, old, 1 << 20)
            os.truncate(path, 0)


def forget_old_logs(folder: Path) -> None:
    """Leaves the `LOGS_KEPT` logs that were written last: every start makes one."""
    with contextlib.suppress(OSError):  # another replica forgets at the same time
        logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-LOGS_KEPT]:
            for old in (path, path.with_name(path.name + ".1")):
                old.unlink(missing_ok=True)


def telling_lines(path: Path, limit: int = 3) -> str:
    """See `EngineProcess.telling_lines`; reads at most the last 256 KiB."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 256 * 1024))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return "no log was written"
    clean = [_strip(line) for line in lines if line.strip()]
    telling: list[str] = []
    for line in clean:
        if any(t in line for t in _TELLING) and not any(n in line for n in _NOISE) and line not in telling:
            telling.append(line)
    chosen = telling[-limit:] or clean[-1:] or ["its log is empty"]
    return " | ".join(line[:400] for line in chosen)


def _strip(line: str) -> str:
    """Without vLLM's prefixes: `(EngineCore pid=1) ERROR 11-01 10:00:00 [core.py:1] text` -> `text`."""
    text = line.strip()
    if text.startswith("(") and ") " in text:
        text = text.split(") ", 1)[1]
    head, bracket, rest = text.partition("] ")
    return rest.strip() if bracket and "[" in head and len(head) < 80 else text
