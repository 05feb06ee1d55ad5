"""What is installed where: machines and images get what serving needs, test machines what tests need beside it."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement

from tests.stack import ROOT
from tools.install import normal, read_lock

LOCKS = {f.stem: f for f in sorted((ROOT / "requirements").glob("*.lock"))}
VERSIONS = {name: {e[0]: e[1] for e in read_lock(file)} for name, file in LOCKS.items()}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def needed(texts: list[str]) -> set[str]:
    """Normalised names of these requirements and of all that they require, as the packages installed here say."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(normal(r.name), frozenset(r.extras)) for r in map(Requirement, texts)]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            requires = distribution(one[0]).requires or []
        except PackageNotFoundError:
            continue  # left out on purpose, or for another kind of machine
        for r in map(Requirement, requires):
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in (*one[1], "")):
                todo.append((normal(r.name), frozenset(r.extras)))
    return {name for name, _ in seen}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_holds_names_versions_and_hashes_alone(lock: str) -> None:
    line = re.compile(
        r"[A-Za-z0-9._-]+(\[[a-z,-]+\])?==[A-Za-z0-9.+!_-]+( ; [^\\]+)?( \\)?|    --hash=sha256:[0-9a-f]{64}( \\)?"
    )
    wrong = [x for x in LOCKS[lock].read_text().splitlines() if not line.fullmatch(x)]
    assert not wrong
    assert all("--hash=sha256:" in block for _, _, block in read_lock(LOCKS[lock]))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_machines_that_serve_get_no_tool_of_tests(kind: str) -> None:
    serving = needed(
        [*DEPENDENCIES, *EXTRAS["cpu"]]
    )  # vLLM asks for the same tools everywhere; here its CPU build lies
    tools = {normal(Requirement(text).name) for text in EXTRAS["dev"]} - serving
    assert {"pytest", "ruff", "mypy", "hypothesis", "pyinfra"} <= tools
    assert not tools & set(VERSIONS[kind])
    assert {"ray", "uvicorn", "uvloop", "httptools", "pydantic", "grpcio", "aiohttp-cors"} <= set(VERSIONS[kind])


def test_test_machines_get_the_rest_and_nothing_twice() -> None:
    assert not set(VERSIONS["dev"]) & set(VERSIONS["cpu"])
    tools = {normal(Requirement(text).name) for text in EXTRAS["dev"]}
    assert tools <= set(VERSIONS["dev"]) | set(VERSIONS["cpu"])
    assert tools <= set(VERSIONS["dev"]) | set(VERSIONS["gpu"])


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_requirement_of_a_tool_is_met_beside_either_runtime(kind: str) -> None:
    """As the packages installed here state them."""
    locked = VERSIONS["dev"] | VERSIONS[kind]
    wrong = []
    for name in VERSIONS["dev"]:
        for r in map(Requirement, distribution(name).requires or []):
            if r.marker is not None and not r.marker.evaluate({"extra": ""}):
                continue
            version = locked.get(normal(r.name))
            if version is None or not r.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} wants {r}, locked is {version}")
    assert not wrong
