"""An engine never outlives its supervisor, and a tree that lost a member is no engine."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from serving.engine import command
from serving.engine.command import EngineSpec
from serving.engine.process import EngineProcess, _main_children, sweep, telling_lines
from serving.gateway.relay import StreamScan
from serving.gateway.routes import SERVED
from tests.stack import free_port, until

SECRET = "test-secret"


def simulated(**args: object) -> EngineSpec:
    return EngineSpec(model="m", version="a", kind="simulator", weights="m", served_names=["m", "m@a"], args=args)


def tiny(source: str = "build:tiny/v1", context: int = 512) -> EngineSpec:
    from serving.catalog import weights
    from serving.settings import load_settings
    from tests.stack import ROOT

    path = weights.resolve(source, base=ROOT / "models", cache=load_settings().cache_dir)
    return EngineSpec(
        model="tiny",
        version="v1",
        kind="vllm",
        weights=str(path),
        served_names=["tiny"],
        args={"max-model-len": context, "max-num-seqs": 4, "enforce-eager": True},
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def built(spec: EngineSpec, port: int, mark: str) -> command.Command:
    return command.build(
        spec, host="127.0.0.1", port=port, secret=SECRET, mark=mark, parent_pid=os.getpid(), environ=os.environ
    )


def healthy(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"x-steelyard-secret": SECRET})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def marked(mark: str) -> list[int]:
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get("STEELYARD_ENGINE_MARK") == mark:
                found.append(p.pid)
        except psutil.Error:
            continue
    return found


Start = Callable[..., tuple[EngineProcess, int, str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an engine under this test's process and waits until it is healthy."""
    engines: list[EngineProcess] = []

    def go(spec: EngineSpec, on_exit: Callable[[str], None] | None = None) -> tuple[EngineProcess, int, str]:
        port, mark = free_port(), f"{tmp_path}:{len(engines)}"
        engine = EngineProcess(built(spec, port, mark), tmp_path / "engine.log", on_exit)
        engines.append(engine)
        engine.start()
        until(lambda: healthy(port) or not engine.alive, "healthy", 240)
        assert engine.alive, engine.telling_lines()
        return engine, port, mark

    yield go
    for engine in engines:
        engine.stop(1.0)


def test_stop_leaves_nothing(start: Start) -> None:
    engine, _, mark = start(simulated())
    engine.stop()
    assert not engine.alive and not marked(mark)


def test_an_unasked_end_is_told_once(start: Start) -> None:
    told: list[str] = []
    heard = threading.Event()
    engine, _, _ = start(simulated(), lambda how: (told.append(how), heard.set()))
    os.kill(engine.pid, signal.SIGKILL)
    assert heard.wait(10)
    assert len(told) == 1 and "server ended" in told[0]


def test_an_unasked_end_is_told_before_all_of_it_has_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with gigabytes takes seconds to end where there is no time: nobody is to be sent there meanwhile."""
    gone, heard = threading.Event(), threading.Event()
    monkeypatch.setattr("serving.engine.process.sweep", lambda mark: gone.wait(30))
    engine, _, _ = start(simulated(), lambda how: heard.set())
    os.kill(engine.pid, signal.SIGKILL)
    assert heard.wait(10)
    assert not engine.alive and not engine.exited.is_set()
    gone.set()
    assert engine.exited.wait(10)


def test_a_supervisor_without_a_descriptor_to_spare_ends_no_engine(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)

    def none_left(pid: int) -> int:
        asked.release()
        raise OSError(errno.EMFILE, "Too many open files")

    told: list[str] = []
    monkeypatch.setattr(os, "pidfd_open", none_left)
    engine, _, _ = start(simulated(), told.append)
    assert asked.acquire(timeout=10) and asked.acquire(timeout=10), "it tries again"
    assert engine.alive and not told
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.exited.wait(10)
    assert len(told) == 1 and not engine.alive


def test_what_has_ended_is_not_signalled_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another engine's by then."""
    engine, _, _ = start(simulated())
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.exited.wait(10)
    monkeypatch.setattr(os, "killpg", lambda pgid, sig: pytest.fail(f"{sig} to {pgid}"))
    engine.stop(0.1)


def test_an_asked_end_is_not_told(start: Start) -> None:
    told: list[str] = []
    engine, _, _ = start(simulated(), told.append)
    engine.stop()
    assert not told


def test_the_secret_is_not_in_argv_and_ours_are_not_in_the_engines_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEELYARD_CLUSTER_SECRET", "other-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ray-secret")
    engine, _, _ = start(simulated())
    process = psutil.Process(engine.pid)
    assert SECRET not in " ".join(process.cmdline())
    assert "STEELYARD_CLUSTER_SECRET" not in process.environ() and "RAY_AUTH_TOKEN" not in process.environ()


def test_a_log_tells_why(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(
        "INFO 11-01 10:00:00 [a.py:1] starting\n"
        "(EngineCore pid=7) ERROR 11-01 10:00:01 [core.py:9] ValueError: max_model_len is too large\n"
        "Traceback (most recent call last):\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert telling_lines(log) == "ValueError: max_model_len is too large"


_SUPERVISOR = """
import sys, time
from pathlib import Path
from tests.replica.test_process import built, simulated, tiny
from serving.engine.process import EngineProcess
spec = simulated() if sys.argv[1] == "simulator" else tiny()
EngineProcess(built(spec, int(sys.argv[2]), sys.argv[3]), Path(sys.argv[4])).start()
time.sleep(3600)
"""


@pytest.mark.parametrize(
    "kind", ["simulator", pytest.param("vllm", marks=[pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)])]
)
def test_a_killed_supervisor_takes_the_whole_engine_with_it(tmp_path: Path, kind: str) -> None:
    """kill -9 gives nobody a chance to clean up: the kernel's parent-death signal must do it, for every grandchild."""
    port, mark = free_port(), f"{tmp_path}:killed"
    argv = [sys.executable, "-c", _SUPERVISOR, kind, str(port), mark, str(tmp_path / "engine.log")]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2]) as supervisor:
        try:
            until(lambda: healthy(port), "healthy", 300)
            tree = marked(mark)
            assert len(tree) >= (1 if kind == "simulator" else 3)
            supervisor.kill()
            until(lambda: not marked(mark), "the whole tree is gone", 5)
        finally:
            supervisor.kill()
            sweep(mark)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_death_of_any_member_ends_the_tree(start: Start) -> None:
    engine, _, mark = start(tiny())
    workers = [p for p in marked(mark) if "VLLM::Worker" in " ".join(psutil.Process(p).cmdline())]
    os.kill(workers[0], signal.SIGKILL)
    assert engine.exited.wait(30)
    until(lambda: not marked(mark), "the whole tree is gone", 5)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stop_ends_no_answer_as_if_it_were_whole(start: Start) -> None:
    """On any route: vLLM would say of what it aborts that it is complete, and on two of them nothing else."""
    engine, port, _ = start(tiny(context=2048))
    endless = {"ignore_eos": True, "stream": True, "model": "tiny"}
    asked = {
        "/v1/completions": {"prompt": "a", "max_tokens": 1900, **endless},
        "/v1/responses": {"input": "a", "max_output_tokens": 1900, **endless},
        # It cannot be told to go on, so it says what it will.
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1900, "temperature": 5.0}
        | {"stream": True, "model": "tiny"},
    }
    # What the end of an answer says that came to it: where it was aborted, the last two would give no reason and fewer tokens.
    own_end = {
        "/v1/completions": rb'"finish_reason":"length"',
        "/v1/responses": rb'"output_tokens":1900\b|event: response.failed',
        "/v1/messages": rb'"stop_reason":"',
    }
    begun = threading.Semaphore(0)

    def ask(path: str) -> tuple[bytes, bool]:
        """All that came, and whether it broke; one that comes to its own end is asked for again."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            json.dumps(asked[path]).encode(),
            {"x-steelyard-secret": SECRET, "content-type": "application/json"},
        )
        while True:
            said = b""
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    said += answer.read(1)
                    begun.release()
                    while more := answer.read1():
                        said += more
            except (OSError, http.client.HTTPException):
                return said, True
            if engine._stopping:
                return said, False

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {path: pool.submit(ask, path) for path in asked}
        for _ in answers:
            assert begun.acquire(timeout=60)
        engine.stop(0.5)
        for path, answer in answers.items():
            said, broke = answer.result(60)
            scan = StreamScan(SERVED[path], withhold_usage=False)
            scan.feed(said)
            whole = scan.complete and not scan.died  # as a gateway sees it
            assert broke or not whole or re.search(own_end[path], said), f"{path}: {said[-2000:]!r}"


def test_what_a_core_forks_is_no_main_process_while_it_has_its_title() -> None:
    """As between the fork and the exec of a compiler: its end is nothing to end an engine for."""
    code = "import os, sys, signal\nfor _ in range(2): pid = os.fork()\nif pid: print(flush=True)\nsignal.pause()"
    titled = ["VLLM::EngineCore", "-c", code]
    with subprocess.Popen(titled, executable=sys.executable, stdout=subprocess.PIPE, start_new_session=True) as core:
        try:
            assert core.stdout is not None and core.stdout.readline()
            until(lambda: len(psutil.Process(core.pid).children(recursive=True)) == 3, "it has forked", 10)
            assert _main_children(os.getpid()) == [(core.pid, "EngineCore")]
        finally:
            os.killpg(core.pid, signal.SIGKILL)
