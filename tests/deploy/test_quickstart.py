"""The commands of docs/bare-metal.md and docs/docker.md as they stand there, up to the point where they reach for machines or
for Docker. Beyond it: tests/deploy/test_rack.py does the same to hosts of its own."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from serving.cli.main import app
from tests.stack import ROOT

RACK, DOCKER = ((ROOT / "docs" / name).read_text() for name in ("bare-metal.md", "docker.md"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMPOSE_FILE = ROOT / "deploy" / "docker" / "compose.yaml"
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("STEELYARD_", "MAKE"))} | {"PYTHONPATH": str(ROOT)}


def commands(page: str) -> list[str]:
    """Lines of its fenced commands, without their comments."""
    lines = [x for block in re.findall(r"(?ms)^```sh\n(.*?)^```", page) for x in block.splitlines()]
    return [x.partition(" #")[0].rstrip() for x in lines]


def shell(line: str, cwd: Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env=ENV,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@functools.cache
def helped(*program: str) -> str:
    done = shell(shlex.join([sys.executable, *program, "--help"]), ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a checkout that may be written to, after the page's first line."""
    here = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") or entry.name == ".venv":
            (here / entry.name).symlink_to(entry)
    (copy,) = [x for x in commands(RACK) if x.startswith("cp ")]
    assert shell(copy, here).returncode == 0 and (here / "rack.py").is_file()
    return here


def test_the_example_is_an_inventory_that_loads(checkout: Path) -> None:
    from deploy import inventory
    from deploy.deploy import load_catalog

    found = inventory.load(checkout / "rack.py")
    assert len(found.machines) == 4 and load_catalog(found).models


@pytest.mark.parametrize("line", [x for x in commands(RACK) + commands(DOCKER) if x.startswith("make ")])
def test_make_knows_the_line(checkout: Path, line: str) -> None:
    """What it would run starts a file of ours with options that this file has."""
    told = shell(f"make -n {line.removeprefix('make ')}", checkout)
    assert told.returncode == 0 and told.stderr == "", told.stderr
    if "images" in line:
        assert "docker build -f deploy/docker/Dockerfile" in told.stdout and "sha256:..." in told.stdout
        return
    (ours,) = [x for x in told.stdout.splitlines() if "-m deploy" in x or "tools/install.py" in x]
    words = shlex.split(ours.split("&&")[-1])
    program = words[1 : 3 if words[1] == "-m" else 2]
    assert all(option in helped(*program) for option in words if option.startswith("--"))
    assert all(verb in helped(*program) for verb in words[3:4] if program[0] == "-m")


def test_a_deploy_goes_as_far_as_the_machines(checkout: Path) -> None:
    """With the inventory that an editor leaves there, whose one machine is away."""
    with socket.socket() as taken:  # bound and not listening: refused, by nobody else
        taken.bind(("127.0.0.1", 0))
        head = {"host": "127.0.0.1", "port": taken.getsockname()[1], "address": "10.20.0.10"}
        (checkout / "rack.py").unlink()
        (checkout / "rack.py").write_text(f"head = {head}\nserve = {{'profile': 'cpu'}}\n")
        (line,) = [x for x in commands(RACK) if x.startswith("make deploy ") and "DRY_RUN" in x]
        done = shell(line, checkout)
    assert done.returncode != 0
    assert "error: no ssh to 1 of 1 machines" in done.stderr and "nothing was changed" in done.stderr, done.stderr


def test_the_installer_takes_the_line_of_the_page() -> None:
    (line,) = [x for x in commands(RACK) if "tools/install.py" in x]
    assert all(word in helped("tools/install.py") for word in shlex.split(line) if word.startswith("--"))


def test_the_doctor_examines_a_bare_machine_through_stdin() -> None:
    (line,) = [x for x in commands(RACK) if x.startswith("ssh ")]
    _, _, there = line.split(" ", 2)
    done = shell(there, ROOT, timeout_s=90)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"(?m)^\S+ +os ", done.stdout) or " os " in done.stdout, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_steelyard_command_of_the_page_is_one(page: Path) -> None:
    found = re.findall(r"`(?:\.venv/bin/)?steelyard ([a-z][^`]*)`", page.read_text())
    found += [x.split("steelyard ", 1)[1] for x in commands(page.read_text()) if re.match(r"(\S*/)?steelyard ", x)]
    for text in found:
        for alternative in text.split(" > ")[0].split("|"):  # `up|down`
            known(alternative.strip(), text)


def known(text: str, whole: str) -> None:
    """The command with its options; whatever it is given besides."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(text)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name in ("...", "VERB"):
            return
        assert name in command.commands, f"steelyard {whole}"
        command = command.commands[name]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    if command.name != "doctor":  # its file knows its own
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options, f"steelyard {whole}"


def test_the_compose_lines_name_what_the_file_has() -> None:
    compose = yaml.safe_load(COMPOSE_FILE.read_text())
    lines = [x for x in commands(DOCKER) if "docker compose" in x]
    lines += re.findall(r"`(docker compose [^`]*)`", DOCKER)
    verbs = set()
    for line in lines:
        before, _, after = line.partition("docker compose ")
        assert all(f"${{{name}:-" in COMPOSE_FILE.read_text() for name in re.findall(r"([A-Z]+)=", before)), line
        words = shlex.split(after)
        assert (words[0], ROOT / words[1]) == ("-f", COMPOSE_FILE), line
        verbs |= {verb for verb in ("up", "exec", "down") if verb in words}
        words = words[2 + 2 * (words[2] == "--profile") :]
        named = next((w for w in words[1:] if not w.startswith("-")), "")
        assert words[0] == "down" or named in compose["services"], line
    assert verbs == {"up", "exec", "down"}
    assert all(f"`{name}=" in DOCKER or f"{name}=" in DOCKER for name in ("IMAGE", "MODELS", "WEIGHTS", "HOST_ADDRESS"))


def compose() -> list[str]:
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and subprocess.run([*words, "version"], capture_output=True).returncode == 0:
            return words
    return []


@pytest.mark.skipif(not compose(), reason="Docker Compose is not installed: the file is read without it")
def test_compose_takes_the_file() -> None:
    (line,) = [x for x in commands(DOCKER) if " up " in x]
    before, _, _ = line.partition("docker compose ")
    done = shell(f"{before}{shlex.join(compose())} -f {COMPOSE_FILE} --profile cpu config --quiet", ROOT)
    assert (done.returncode, done.stderr) == (0, "")
