"""API keys: hashed at rest, one refusal for every reason, scopes that do not imply each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serving.cli.keys import app, parse_duration
from serving.errors import InvalidKey, OperatorError
from serving.gateway.keys import OPTIONS, KeyRing, as_record, create_key, list_keys, revoke_key

NOW = 1_800_000_000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def make(path: Path, *scopes: str, expires_at: float | None = None) -> tuple[str, str]:
    key, token = create_key(path, name="ci", scopes=scopes or ["infer:*"], now=NOW, expires_at=expires_at)
    return key.id, token


def refusal(ring: KeyRing, token: str | None, now: float = NOW) -> str:
    with pytest.raises(InvalidKey) as caught:
        ring.check(token, now)
    return str(caught.value)


def test_a_token_opens_and_its_secret_is_not_in_the_file(path: Path) -> None:
    key_id, token = make(path)
    assert re.fullmatch(rf"sk-steelyard-{key_id}-[A-Za-z0-9_-]{{43}}", token)
    assert KeyRing(path).check(token, NOW).id == key_id
    assert token.rpartition("-")[2] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_refusal_is_the_same_sentence(path: Path) -> None:
    _, good = make(path)
    revoked_id, revoked = make(path)
    _, expired = make(path, expires_at=NOW + 10)
    revoke_key(path, revoked_id, NOW)
    ring = KeyRing(path)
    unknown = good.replace(good.split("-")[2], "00000000")
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    tokens = [None, "", "x", "\udcff\0é" * 9, unknown, wrong, revoked, good + "x", good.upper(), "x" * 100_000]
    assert len({refusal(ring, token) for token in tokens} | {refusal(ring, expired, NOW + 10)}) == 1
    assert ring.check(expired, NOW + 9).scopes == {"infer:*"}


@given(st.text(max_size=80))
def test_no_text_is_a_key(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-keys.json"
    if not path.exists():
        make(path)
    refusal(KeyRing(path), text)


@pytest.mark.parametrize(
    ("scopes", "asked", "covered"),
    [
        (["infer:*"], "infer:tiny", True),
        (["infer:*"], "infer:tiny@v2", True),
        (["infer:*"], "metrics", False),
        (["infer:*"], "admin", False),
        (["admin"], "infer:tiny", False),
        (["infer:*", "admin"], "trace", False),
        (["trace"], "trace", True),
        (["admin"], "metrics", False),
        (["metrics"], "metrics", True),
        (["infer:tiny"], "infer:tiny", True),
        (["infer:tiny"], "infer:tiny@v2", True),
        (["infer:tiny"], "infer:tiny2", False),
        (["infer:tiny@v2"], "infer:tiny@v2", True),
        (["infer:tiny@v2"], "infer:tiny@v1", False),
        (["infer:tiny@v2"], "infer:tiny", False),
        (["metrics", "infer:a"], "infer:a", True),
    ],
)
def test_scopes(path: Path, scopes: list[str], asked: str, covered: bool) -> None:
    _, token = make(path, *scopes)
    assert KeyRing(path).check(token, NOW).allows(asked) is covered


@pytest.mark.parametrize(
    "scope", ["", "infer", "infer:", "infer:**", "infer:A", "infer:a@", "infer:a@b@c", "Admin", "infer:a\n"]
)
def test_a_misspelt_scope_is_refused(path: Path, scope: str) -> None:
    with pytest.raises(OperatorError, match="is no scope"):
        make(path, scope)
    assert not path.exists()


def test_impossible_keys_are_refused(path: Path) -> None:
    with pytest.raises(OperatorError, match="needs a scope"):
        create_key(path, name="a", scopes=[], now=NOW)
    with pytest.raises(OperatorError, match="cannot name a key"):
        create_key(path, name="a\nb", scopes=["admin"], now=NOW)
    with pytest.raises(OperatorError, match="expired already"):
        create_key(path, name="a", scopes=["admin"], now=NOW, expires_at=NOW)


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    make(path)
    path.chmod(0o640)
    with pytest.raises(OperatorError, match=r"can be read by others\. Run `chmod 600 "):
        KeyRing(path)


def test_a_change_is_seen_at_the_next_reload(path: Path) -> None:
    key_id, token = make(path)
    ring = KeyRing(path)
    assert ring.reload_if_changed() is None
    _, second = make(path)
    refusal(ring, second)
    assert ring.reload_if_changed() is None
    ring.check(second, NOW)
    revoke_key(path, key_id, NOW)
    assert ring.reload_if_changed() is None
    refusal(ring, token)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"keys": [{}]}', b'{"keys": 3}', b"\xff", b'{"keys": [[]]}', None]
)
def test_a_broken_file_keeps_the_last_good_keys_and_is_reported_once(path: Path, content: bytes | None) -> None:
    _, token = make(path)
    ring = KeyRing(path)
    good = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    assert isinstance(ring.reload_if_changed(), OperatorError)
    assert ring.reload_if_changed() is None
    ring.check(token, NOW)
    path.write_bytes(good)
    path.chmod(0o600)
    assert ring.reload_if_changed() is None
    assert len(ring) == 1


@pytest.mark.parametrize("field", ["id", "name", "sha256", "scopes", "created_at", "expires_at", "revoked_at"])
def test_a_record_that_lost_a_field_is_no_key(path: Path, field: str) -> None:
    make(path)
    data = json.loads(path.read_text())
    del data["keys"][0][field]
    path.write_text(json.dumps(data))
    with pytest.raises(OperatorError, match="is damaged"):
        KeyRing(path)


@pytest.mark.slow
def test_concurrent_creates_lose_nothing(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from serving.gateway.keys import create_key\n"
        "for n in range(5): create_key(Path(sys.argv[1]), name='n', scopes=['admin'], now=1.0)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert len(list_keys(path)) == 15
    assert sorted(os.listdir(path.parent)) == ["keys.json", "keys.json.lock"]


def test_times_survive_the_file(path: Path) -> None:
    make(path, expires_at=NOW + 86400.5)
    (key,) = list_keys(path)
    assert (key.created_at, key.expires_at) == (NOW, NOW + 86400.5)
    assert json.loads(path.read_text())["keys"][0]["created_at"] == "2027-01-15T08:00:00Z"


def test_the_module_needs_no_ray() -> None:
    code = "import sys, serving.gateway.keys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_makes_lists_and_revokes(path: Path) -> None:
    run = CliRunner()
    at = ["--file", str(path)]
    made = run.invoke(
        app, ["create", "--name", "team [a]", "--scope", "infer:tiny", "--scope", "metrics", "--expires", "30d", *at]
    )
    assert made.exit_code == 0, made.output
    token = made.stdout.strip()
    assert KeyRing(path).check(token, list_keys(path)[0].created_at).name == "team [a]"
    listed = run.invoke(app, ["list", *at])
    assert "team [a]" in listed.stdout
    assert "infer:tiny metrics" in listed.stdout
    assert token not in listed.stdout
    (record,) = json.loads(run.invoke(app, ["list", "--json", *at]).stdout)
    assert record["state"] == "active"
    assert "sha256" not in record
    assert run.invoke(app, ["revoke", record["id"], *at]).exit_code == 0
    assert json.loads(run.invoke(app, ["list", "--json", *at]).stdout)[0]["state"] == "revoked"
    as_json = json.loads(run.invoke(app, ["create", "--name", "b", "--scope", "admin", "--json", *at]).stdout)
    assert as_json["token"].startswith(f"sk-steelyard-{as_json['id']}-")


def test_the_command_fails_in_one_line_on_stderr(path: Path) -> None:
    run = CliRunner()
    for arguments in (["list"], ["revoke", "00000000"], ["create", "--name", "a", "--scope", "x"]):
        failed = run.invoke(app, [*arguments, "--file", str(path)])
        assert failed.exit_code == 1
        assert failed.stdout == ""
        assert len(failed.stderr.splitlines()) == 1


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90m", "12h", "30d", "8w")] == [5400, 43200, 2592000, 4838400]


@given(st.text(max_size=9) | st.from_regex(r"[0-9]+[mhdwsy]?", fullmatch=True))
def test_any_other_text_is_no_duration(text: str) -> None:
    with contextlib.suppress(OperatorError):
        assert 60 <= parse_duration(text) <= 10 * 366 * 86400


# -- options


def test_options_are_kept_and_shown(path: Path) -> None:
    made, _ = create_key(
        path, name="n", scopes=["infer:*"], now=NOW, class_="batch", weight=3, max_concurrent=7, keep_alive=False
    )
    (found,) = list_keys(path)
    assert found == made
    assert (found.class_, found.weight, found.max_concurrent, found.tokens_per_minute) == ("batch", 3, 7, None)
    assert (as_record(found)["class"], found.keep_alive) == ("batch", False)


def test_a_file_of_an_earlier_version_has_keys_without_options(path: Path) -> None:
    create_key(path, name="n", scopes=["infer:*"], now=NOW)
    records = json.loads(path.read_text())
    for name in ("class", "keep_alive", *OPTIONS):
        del records["keys"][0][name]
    path.write_text(json.dumps(records))
    (found,) = list_keys(path)
    assert (found.class_, found.weight, found.max_body_bytes, found.keep_alive) == ("default", 1, None, True)


@pytest.mark.parametrize(
    "wrong", [{"class_": "urgent"}, {"weight": 0}, {"weight": 1001}, {"max_concurrent": 0}, {"max_body_bytes": 10}]
)
def test_an_option_that_cannot_be_is_refused(path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(OperatorError, match=r"is no class|is a whole number from"):
        create_key(path, name="n", scopes=["infer:*"], now=NOW, **wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [("class", "urgent"), ("weight", -1), ("weight", True), ("max_concurrent", "9"), ("keep_alive", 0)],
)
def test_a_file_with_such_an_option_is_damaged(path: Path, field: str, value: object) -> None:
    create_key(path, name="n", scopes=["infer:*"], now=NOW)
    records = json.loads(path.read_text())
    records["keys"][0][field] = value
    path.write_text(json.dumps(records))
    with pytest.raises(OperatorError, match="damaged"):
        KeyRing(path)


def test_expiries_are_told_of_the_soonest_and_of_those_just_over(path: Path) -> None:
    ends = {at: make(path, expires_at=NOW + at)[0] for at in (30, 10, 20, 40)}
    make(path)  # never ends
    revoke_key(path, ends[10], NOW)
    ring = KeyRing(path)
    assert ring.expiries(2, NOW) == {ends[20]: NOW + 20, ends[30]: NOW + 30}
    assert ring.expiries(9, NOW + 86400 + 25) == {ends[30]: NOW + 30, ends[40]: NOW + 40}, "a day long"


def test_a_file_that_another_command_changes_is_told_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    monkeypatch.setattr("serving.gateway.keys.LOCK_S", 0.05)
    with FileLock(f"{path}.lock", is_singleton=False), pytest.raises(OperatorError, match="is held by another command"):
        revoke_key(path, "00000000", 0)
