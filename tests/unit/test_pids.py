"""A number in a file is only the process that it was written of, whoever has it now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cli import cluster, pids, up
from serving.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state_dir=tmp_path)


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that is none of ours."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


def left_behind(settings: Settings, pid: int, process: str | None) -> None:
    """What a main process that was killed leaves, of which `pid` was the number."""
    found = {"address": "127.0.0.1:1", "pid": pid, "temp_dir": "", "profile": "sim", "process": process}
    (settings.state_dir / "cluster.json").write_text(json.dumps(found))
    settings.pid_file.write_text(f"{pid}\n")


def at_another_time(pid: int) -> list[str | None]:
    """Marks of who had the number earlier in this boot, and at the same time of another."""
    boot, started = str(pids.mark(pid)).split()
    return [f"{boot} {int(started) - 1}", f"0-{boot} {started}"]


def test_who_starts_with_the_number_of_a_killed_one_does_not_take_itself_for_it(settings: Settings) -> None:
    for process in [*at_another_time(os.getpid()), None]:
        left_behind(settings, os.getpid(), process)
        assert cluster.read_cluster_file(settings) is None


def test_down_ends_nobody_who_has_the_number_by_now(settings: Settings, stranger: int) -> None:
    for process in [*at_another_time(stranger), None]:
        left_behind(settings, stranger, process)
        said: list[str] = []
        up.down(settings, said.append)
        assert said == ["nothing runs"]
    assert pids.mark(stranger) is not None


def test_nor_another_of_our_commands(settings: Settings) -> None:
    code = "print(flush=True); input()"
    argv = [sys.executable, "-c", code, "steelyard", "top"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
        assert another.stdout is not None
        another.stdout.readline()
        for process in at_another_time(another.pid):
            left_behind(settings, another.pid, process)
            said: list[str] = []
            up.down(settings, said.append)
            assert said == ["nothing runs"]
        # What an earlier version wrote says no more than the number.
        left_behind(settings, another.pid, None)
        assert cluster.read_cluster_file(settings) is not None
        assert another.poll() is None


def test_the_one_it_was_written_of_is_found(settings: Settings, stranger: int) -> None:
    for pid in (os.getpid(), stranger):
        left_behind(settings, pid, pids.mark(pid))
        assert cluster.read_cluster_file(settings) is not None


def test_a_thread_is_no_process() -> None:
    told = threading.Event()
    thread = threading.Thread(target=told.wait)
    thread.start()
    assert thread.native_id is not None and thread.native_id != os.getpid()
    assert pids.mark(thread.native_id) is None
    told.set()
    thread.join()


def test_before_there_is_a_cluster_file_the_main_process_is_who_holds_the_lock(settings: Settings) -> None:
    with up.only_one(settings, print):
        assert up._pid(settings) == os.getpid() == int(settings.pid_file.read_text())
    assert settings.pid_file.exists()
    assert up._pid(settings) is None


@pytest.mark.parametrize("text", [b'{"address": "\xff\xfe"}', b"\0" * 64, b"", b"[]", b'{"pid": 1}'])
def test_a_file_that_is_damaged_is_of_nobody(settings: Settings, text: bytes) -> None:
    (settings.state_dir / "cluster.json").write_bytes(text)
    assert cluster.read_cluster_file(settings) is None
    assert cluster.clear(settings) == 0
