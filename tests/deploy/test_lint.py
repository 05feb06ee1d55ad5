"""Shell scripts, YAML and Dockerfiles of the repository pass their linters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def linter(name: str) -> str:
    """Of the environment, else of the machine; skips without."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def files(*patterns: str) -> list[str]:
    """What git knows or would add, so that a new script is found before it is committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return sorted(f for f in set(listed) if f and (ROOT / f).is_file() and not (ROOT / f).is_symlink())


def is_shell(file: str) -> bool:
    with (ROOT / file).open("rb") as opened:
        first = opened.readline(200)
    return first.startswith(b"#!") and any(f in first for f in (b"/sh", b"bash", b" sh"))


def passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_shell_script_passes_shellcheck() -> None:
    found = [f for f in files() if f.endswith(".sh") or is_shell(f)]
    assert ".ci/run" in found
    passes(linter("shellcheck"), "--severity=style", *found)


def test_every_plain_yaml_passes_yamllint() -> None:
    found = [f for f in files("*.yaml", "*.yml") if "/templates/" not in f]
    assert {"models/tiny.yaml", "deploy/docker/compose.yaml", "k8s/steelyard/values.yaml"} <= set(found)
    passes(linter("yamllint"), "--strict", *found)


def test_every_dockerfile_passes_hadolint() -> None:
    found = files("*Dockerfile*")
    assert found
    passes(linter("hadolint"), *found)
