"""A bad inventory or catalog is one error naming file and key, before any machine is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy import inventory
from deploy.deploy import _require_known, load_catalog
from serving.errors import OperatorError
from tests.stack import ROOT

SIM = "name: a\nversions: [{version: v1, engine: {kind: simulator}}]\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "rack.py"
    file.write_text(text)
    return file


def test_the_example_is_an_inventory():
    found = inventory.load(ROOT / "deploy" / "inventory.example.py")
    assert [m.address for m in found.machines] == ["10.20.0.10", "10.20.0.11", "10.20.0.12", "10.20.0.13"]
    assert found.workers[0].labels == {"region": "eu"}
    assert found.serve.gateways == 2 and found.ssh.host_keys == "strict"


def test_a_head_is_enough_and_its_defaults_are_safe(tmp_path: Path):
    found = inventory.load(written(tmp_path, 'head = "10.0.0.1"'))
    assert found.machines == (found.head,)
    assert (found.serve.listen, found.serve.profile, found.ssh.host_keys) == ("node", "gpu", "strict")


def test_relative_paths_start_at_the_inventory(tmp_path: Path):
    (tmp_path / "id").touch()
    found = inventory.load(written(tmp_path, 'head = "10.0.0.1"\nssh = {"key": "id"}\nserve = {"models": "catalog"}'))
    assert (found.ssh.key, found.serve.models) == (tmp_path / "id", tmp_path / "catalog")
    assert inventory.load(written(tmp_path, 'head = "10.0.0.1"')).serve.models == tmp_path / "models"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no `head`"),
        ("head = ", "line 1"),
        ('head = "10.0.0.1"\nssh = {"key": "nowhere"}', "no such file"),
        ("head = nowhere", "NameError"),
        ('head = "gpu-01"', "head: 'gpu-01' is a name: give the machine's IP address"),
        ('head = "127.0.0.1"', "not an address that other machines can reach"),
        ('head = {"host": "a", "adress": "10.0.0.1"}', "head"),
        ('head = "10.0.0.1"\nworker = ["10.0.0.2"]', "unknown name worker"),
        ('head = "10.0.0.1"\nworkers = ["10.0.0.1"]', "host 10.0.0.1 stands there twice"),
        ('head = "10.0.0.1"\nworkers = [{"host": "a", "address": "10.0.0.1"}]', "address 10.0.0.1 stands there twice"),
        ('head = {"host": "10.0.0.1", "labels": {"a b": "c"}}', "label 'a b'"),
        ('head = "10.0.0.1"\nserve = {"port": "http"}', "serve.port"),
        ('head = "10.0.0.1"\nserve = {"port": 6379}', "serve.port and serve.ray_port are both 6379"),
        ('head = "10.0.0.1"\nserve = {"gateway": 1}', "serve.gateway"),
        ('head = "10.0.0.1"\nserve = {"listen": "eth0"}', "serve.listen"),
        ('head = "10.0.0.1"\nserve = {"environment": {"STEELYARD_PORT": "1"}}', "STEELYARD_PORT is set by the deploy"),
        ('head = "10.0.0.1"\nserve = {"environment": {"HF_TOKEN": "hf_x"}}', "HF_TOKEN looks like a secret"),
        ('head = "10.0.0.1"\nserve = {"environment": {"A": "$(id)"}}', "without quotes"),
        ('head = "10.0.0.1"\nserve = {"redis": "nowhere"}', "no HOST:PORT"),
        ('head = "10.0.0.1"\nserve = {"redis_password": "p"}', "need `redis`"),
        ('head = "10.0.0.1"\nserve = {"cluster_name": "rack-7"}', "need `redis`"),
        ('head = "10.0.0.1"\nserve = {"otlp_endpoint": "otel:4317"}', "no URL of a collector"),
        ('head = "10.0.0.1"\nserve = {"otlp_endpoint": "http://a:b@otel"}', "no user or password in it"),
        ('head = "10.0.0.1"\nserve = {"otlp_headers": "h"}', "otlp_headers needs `otlp_endpoint`"),
        ('head = "10.0.0.1"\nserve = {"otlp_endpoint": "http://o", "otlp_headers": "h"}', "no such file"),
        ('head = "10.0.0.1"\nserve = {"redis": "10.0.0.5:6379", "cluster_name": "a b"}', "cluster_name 'a b'"),
        ('head = "10.0.0.1"\nruntime = {"venv": "/home/me/venv"}', "which the units cannot see"),
        ('head = "10.0.0.1"\nruntime = {"venv": "relative"}', "an absolute path"),
        ('head = "10.0.0.1"\nruntime = {"wheelhouse": "none"}', "has no wheel"),
        ('head = "10.0.0.1"\nruntime = {"python": "python; rm"}', "without spaces"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str):
    file = written(tmp_path, text)
    with pytest.raises(OperatorError) as error:
        inventory.load(file)
    assert told in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["deploy"], "error: no inventory. copy deploy/inventory.example.py"),
        (["deploy", "nowhere.py"], "error: nowhere.py: no such file"),
        (["remove", "{file}"], "error: remove asks first, and there is nobody to ask. give YES=1"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path: Path, arguments: list[str], told: str):
    file = written(tmp_path, 'head = "10.0.0.1"')
    words = [a.format(file=file) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "deploy", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.startswith(told) and done.stderr.count("\n") == 1


def test_a_bad_catalog_stops_it_first(tmp_path: Path):
    file = written(tmp_path, 'head = "10.0.0.1"\nserve = {"profile": "cpu"}')
    with pytest.raises(OperatorError, match="no such folder of model files"):
        load_catalog(inventory.load(file))
    models = tmp_path / "models"
    models.mkdir()
    (models / "a.yaml").write_text(SIM.replace("kind: simulator", "kind: other"))
    with pytest.raises(OperatorError, match=r"a\.yaml"):
        load_catalog(inventory.load(file))
    (models / "a.yaml").write_text(SIM)
    assert [m.name for m in load_catalog(inventory.load(file)).models] == ["a"]


def test_weights_that_the_units_cannot_see_or_that_lie_in_the_catalog_are_refused(tmp_path: Path):
    file = written(tmp_path, 'head = "10.0.0.1"\nserve = {"profile": "cpu"}')
    models = tmp_path / "models"
    models.mkdir()
    (models / "a.yaml").write_text("name: a\nversions: [{version: v1, weights: {source: /home/me/weights}}]\n")
    with pytest.raises(OperatorError, match="units cannot see"):
        load_catalog(inventory.load(file))
    with open(models / "model.safetensors", "wb") as big:
        big.truncate(17 * 1024 * 1024)
    with pytest.raises(OperatorError, match="weights belong elsewhere"):
        load_catalog(inventory.load(file))


def test_only_machines_of_the_inventory_are_removed_and_the_head_not_alone(tmp_path: Path):
    found = inventory.load(written(tmp_path, 'head = "10.0.0.1"\nworkers = ["10.0.0.2"]'))
    _require_known(found, ["10.0.0.2"])
    _require_known(found, ["10.0.0.1", "10.0.0.2"])
    for limit, told in ((["10.0.0.3"], "not in the inventory"), (["10.0.0.1"], "is the head")):
        with pytest.raises(OperatorError, match=told):
            _require_known(found, limit)
