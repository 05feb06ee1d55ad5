"""Ties every Python process of the stack to its parent: no parent, no child, no orphan that holds a GPU.

This folder is first on the PYTHONPATH of engines and of Ray's processes, so each interpreter runs this before anything
else. A parent-death signal on an engine's server alone leaves its EngineCore and Worker alive with their GPU memory, and
Ray's agents outlive a killed raylet by minutes. The signal is not inherited over fork, so it is armed again there.
Standard library only.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PARENT = "STEELYARD_PARENT"  # pid of the process that made this one, handed down by exec


def _arm(expected: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the signal was armed. A living intermediary (a shell) is fine.
    if expected and os.getppid() != expected and not _lives(expected):
        os._exit(1)
    os.environ[_PARENT] = str(os.getpid())


def _lives(pid: int) -> bool:
    """Not one that has ended and was not waited for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def _after_fork() -> None:
    _arm(int(os.environ.get(_PARENT, "0")))


if sys.platform == "linux" and _PARENT in os.environ:
    _arm(int(os.environ.get(_PARENT, "0")))
    os.register_at_fork(after_in_child=_after_fork)
