"""On Kubernetes the RayService alone writes what is served: the verbs that would fight it say so. And secrets as files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli.main import app
from serving.settings import load_settings, readable_by_others, worker_environment


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEELYARD_MANAGED_BY", "rayservice")
    monkeypatch.setenv("STEELYARD_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("STEELYARD_API_KEYS_FILE", str(tmp_path / "secrets" / "keys.json"))
    return tmp_path


@pytest.mark.parametrize("verb", [["up"], ["up", "--detach"], ["down"]])
def test_verbs_that_would_fight_the_rayservice_are_refused(managed: Path, verb: list[str]) -> None:
    done = CliRunner().invoke(app, verb)
    assert done.exit_code == 1
    assert "written by its RayService alone" in done.output and "helm upgrade" in done.output
    assert not list(managed.iterdir()), "and nothing was touched"


@pytest.mark.parametrize("verb", [["create", "--name", "n", "--scope", "admin"], ["revoke", "00000000"]])
def test_keys_of_a_secret_are_not_changed_in_the_pod(managed: Path, verb: list[str]) -> None:
    done = CliRunner().invoke(app, ["keys", *verb])
    assert done.exit_code == 1 and "come from a Secret" in done.output


def test_a_copy_of_the_keys_is_changed_anywhere(managed: Path) -> None:
    copy = managed / "copy.json"
    done = CliRunner().invoke(app, ["keys", "create", "--name", "n", "--scope", "admin", "--file", str(copy)])
    assert done.exit_code == 0 and copy.is_file()


def test_replicas_read_the_keys_from_where_they_were_named(managed: Path) -> None:
    settings = load_settings()
    assert settings.keys_file == managed / "secrets" / "keys.json"
    assert worker_environment(settings)["STEELYARD_API_KEYS_FILE"] == str(settings.keys_file)


def status(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 10001, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "owner", "euid", "refused"),
    [
        (0o600, 10001, 10001, False),
        (0o640, 10001, 10001, True),
        (0o604, 10001, 10001, True),
        (0o440, 0, 10001, False),  # a mounted Secret with fsGroup
        (0o400, 0, 10001, False),
        (0o444, 0, 10001, True),
        (0o460, 0, 10001, True),  # the group could write it
        (0o440, 0, 0, True),  # root's own file, open to a group
    ],
)
def test_a_file_of_secrets_is_ours_alone(
    monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, euid: int, refused: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    assert readable_by_others(status(mode, owner)) is refused
