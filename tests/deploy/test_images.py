"""What the images and the compose file promise, read from them: there is no Docker on a test machine. The commands inside
are the ones that other tests run (`steelyard up`, the recipes)."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


def stages() -> dict[str, tuple[str, list[str]]]:
    """Stage -> (what it is made from, its instructions)."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(x for x in DOCKERFILE.splitlines() if not x.strip().startswith("#")))
    found: dict[str, tuple[str, list[str]]] = {}
    name = ""
    for line in joined.splitlines():
        if begin := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = begin[2]
            found[name] = (begin[1], [])
        elif line.strip() and name:
            found[name][1].append(line)
    return found


def lineage(stage: str) -> list[str]:
    """Every instruction that ends up in an image of that target."""
    made_from, own = stages()[stage]
    return (lineage(made_from) if made_from in stages() else []) + own


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_as_nobody_special_with_no_build_left_in_it(target: str) -> None:
    lines = lineage(target)
    assert [x for x in lines if x.startswith("USER")][-1] == "USER 10001:10001"
    installed = " ".join(x for x in lines if "apt-get install" in x)
    assert not re.search(r"\b(make|g\+\+|build-essential|cmake|git|curl|wget)\b", installed)
    assert ("gcc" in installed) == (target == "cuda"), "Triton alone needs a compiler at run time"
    assert not [x for x in lines if x.startswith("RUN pip") or "COPY requirements" in x]
    assert {x.split()[1] for x in lines if x.startswith("COPY")} == {f"--from=build-{target}"}


def test_the_base_is_named_by_digest_and_packages_by_hash() -> None:
    bases = [made_from for made_from, _ in stages().values() if made_from not in stages()]
    assert bases == ["${BASE}@${BASE_DIGEST}"]
    assert re.search(r"^ARG BASE_DIGEST$", DOCKERFILE, re.M), "no default: a build says what it stands on"
    for flavour, lock in (("cpu", "cpu.lock"), ("cuda", "gpu.lock")):
        (install,) = [x for x in stages()[f"build-{flavour}"][1] if lock in x and "pip install" in x]
        assert "--require-hashes" in install and "--no-deps" in install


def test_the_lock_files_are_for_the_python_of_the_base() -> None:
    assert "python:3.11-" in DOCKERFILE


def test_labels_are_oci_s() -> None:
    (label,) = [x for x in lineage("cpu") if x.startswith("LABEL")]
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in label


def test_what_the_build_copies_reaches_it() -> None:
    """.dockerignore lets everything through that COPY names, and no secret or cache."""
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]

    def sent(path: str) -> bool:
        inside = False
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = [path, Path(path).name, *map(str, Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern) for part in parts):
                inside = rule.startswith("!")
        return inside

    for _, lines in stages().values():
        for line in lines:
            if line.startswith("COPY") and "--from" not in line:
                for source in shlex.split(line)[1:-1]:
                    assert (ROOT / source).exists() and sent(source), source
    assert sent("models/tiny/build.py") and sent("models/tiny/README.md"), "the recipe, whole"
    for path in (".steelyard/api-key", ".git/config", ".venv/bin/python", "serving/__pycache__/x.pyc"):
        assert not sent(path), path


def test_the_health_check_asks_the_gateway_and_fails_with_it() -> None:
    (check,) = [x for x in lineage("cpu") if x.startswith("HEALTHCHECK")]
    command = yaml.safe_load(check.split("CMD ", 1)[1])
    assert command[0] == "python" and "/healthz" in command[2]
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"STEELYARD_PORT": "1"}, capture_output=True, timeout=30, check=False
    )
    assert done.returncode != 0, "nobody listens there"


def test_environment_of_image_and_compose_is_read_by_someone() -> None:
    known = {f"STEELYARD_{name.upper()}" for name in Settings.model_fields}
    used = set(re.findall(r"STEELYARD_[A-Z_]+(?==)", DOCKERFILE))
    for service in COMPOSE["services"].values():
        used |= {name for name in service["environment"] if name.startswith("STEELYARD_")}
    assert used and used <= known


@pytest.mark.parametrize("service", ["gpu", "cpu"])
def test_a_service_is_hardened_and_keeps_its_state(service: str) -> None:
    one = COMPOSE["services"][service]
    assert one["read_only"] is True and one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "user"} & set(one)
    (port,) = one["ports"]
    assert port.startswith("${HOST_ADDRESS:-127.0.0.1}:"), "not open to the network unless asked"
    targets = {v["target"]: v for v in one["volumes"]}
    assert targets["/var/lib/steelyard"]["type"] == targets["/var/cache/steelyard"]["type"] == "volume"
    assert {v["source"] for v in targets.values() if v["type"] == "volume"} == set(COMPOSE["volumes"])
    assert all(v["read_only"] for v in targets.values() if v["type"] == "bind")
    assert all("exec" in t for t in one["tmpfs"]), "Triton loads what it wrote there"
    assert one["build"]["target"] in stages()


def test_the_gpu_service_asks_for_gpus_and_the_cpu_one_only_by_profile() -> None:
    (device,) = COMPOSE["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert COMPOSE["services"]["cpu"]["profiles"] == ["cpu"] and "profiles" not in COMPOSE["services"]["gpu"]
    assert "deploy" not in COMPOSE["services"]["cpu"]
