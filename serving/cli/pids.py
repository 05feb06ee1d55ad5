"""Which process a number in a file means. Numbers are given again, in a container from the first one at each start: the
process that reads a file which a killed one left may itself have the number in it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def mark(pid: int) -> str | None:
    """What no other process ever has together with this number: the boot, and the ticks after it at which this one started,
    which a clock that is set does not move. None when no process has the number, or one that ended and that nobody has
    waited for; a thread's number is none of a process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        status = Path(f"/proc/{pid}/status").read_bytes()
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # proc(5), from the third field on
    except OSError:
        return None
    state, started = stat[0], int(stat[19])
    if state in (b"Z", b"X") or b"\nTgid:\t%d\n" % pid not in status:
        return None
    return f"{boot} {started}"


def runs(pid: int, written: str | None) -> bool:
    """Whether the process runs of which `mark` said `written`. None, from a version that wrote no marks: whether this is a
    process of ours, though not the one that asks, which is younger than what it reads."""
    now = mark(pid)
    if now is None or written is not None:
        return now is not None and now == written
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return pid != os.getpid() and ("serving.cli" in command or "steelyard" in command)
