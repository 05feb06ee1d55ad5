"""The commands of docs/kubernetes.md that need no cluster, run as they stand there; those that do are marked there."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import chart
from tests.k8s.chart import CHART, NAMESPACE, ROOT, helm

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()


def blocks(kind: str) -> list[str]:
    return [re.sub(r"(?m)^ {2,3}", "", b) for b in re.findall(rf"(?ms)^ *```{kind}\n(.*?)^ *```", PAGE)]


def values(path: Path) -> dict[str, Any]:
    return dict(helm.values_from_yaml(path.read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: the values files made by the page's own lines."""
    here = tmp_path_factory.mktemp("quickstart")
    (line,) = [x for b in blocks("sh") for x in b.splitlines() if "chart-values" in x]
    command, target = line.split(" > ")
    args = [sys.executable, "-m", "serving.cli.main", *shlex.split(command)[1:]]
    env = {k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    (here / target).write_text(done.stdout)
    return here


@pytest.mark.parametrize("verb", ["template", "lint", "install"])
def test_the_helm_lines_render(folder: Path, verb: str) -> None:
    """Each with the first of the page's values; `install` up to the point where it would send."""
    (folder / "my-values.yaml").write_text(blocks("yaml")[0])
    (line,) = [x for b in blocks("sh") for x in b.splitlines() if x.startswith(f"helm {verb}") and "k8s/steelyard" in x]
    words = shlex.split(line)
    given: dict[str, Any] = {}
    for flag, file in itertools.pairwise(words):
        if flag == "-f":
            given |= values(folder / file)
    assert ROOT / words[words.index("k8s/steelyard")] == CHART and ("-n" not in words or NAMESPACE in words)
    report = helm.lint(CHART, given, strict=True)
    assert report["errors"] == []
    served = chart.serve_config(chart.objects(given))["applications"]
    assert {"tiny@v1", "tiny@v2"} < {a["name"] for a in served}


def test_the_gpu_values_of_the_page_render() -> None:
    given = chart.values("one-h100") | yaml.safe_load(blocks("yaml")[1])
    assert chart.rayservice(chart.objects(given))


def test_the_monitoring_values_of_the_page_render() -> None:
    given = chart.values("one-h100") | yaml.safe_load(blocks("yaml")[2])
    (config,) = chart.kind(chart.objects(given), "ScrapeConfig")
    assert config["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_a_key_is_added_to_a_copy_as_the_page_says(tmp_path: Path) -> None:
    from serving.gateway.keys import list_keys
    from tests.k8s.test_upgrade import decoded

    (line,) = [x for b in blocks("sh") for x in b.splitlines() if x.startswith("steelyard keys")]
    file = tmp_path / "keys.json"
    file.write_text(decoded(chart.of("one-h100"))["keys.json"])
    file.chmod(0o600)
    args = [sys.executable, "-m", "serving.cli.main", *shlex.split(line)[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, timeout=60, check=True)
    assert [k.name for k in list_keys(file)] == ["first", "team-a"]


def test_every_line_that_needs_a_cluster_stands_under_the_mark() -> None:
    for found in re.finditer(r"(?ms)^ *```sh\n(.*?)^ *```", PAGE):
        if re.search(r"(?m)^ *(kubectl|helm (install|upgrade|repo|-n))", found[1]):
            before = PAGE[: found.start()].rstrip().rsplit("\n\n", 1)[-1]
            assert "**(cluster)**" in before, found[1]


def test_values_named_in_the_text_exist() -> None:
    known = set(re.findall(r"^\| `([A-Za-z0-9.]+)` \|", (CHART / "README.md").read_text(), re.M))
    tops = {name.split(".")[0] for name in known}
    for name in re.findall(r"`([a-z][A-Za-z]+(?:\.[A-Za-z]+)+)(?::[^`]*)?`", PAGE):
        if name.split(".")[0] in tops:
            assert name in known or any(k.startswith(f"{name}.") for k in known), name
