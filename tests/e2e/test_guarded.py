"""What is open and what is not, on the running real stack."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.stack import ROOT, Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def replicas(real: Stack) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(real.cli("status", "--json").stdout)["replicas"]
    return found


def test_engines_answer_nobody_without_the_secret(real: Stack) -> None:
    for replica in replicas(real):
        for path in ("/health", "/metrics", "/v1/models", "/docs", "/-/door"):
            assert httpx.get(replica["url"] + path).status_code == 401, path


def test_every_route_of_the_engine_is_served_or_refused_with_a_reason(real: Stack) -> None:
    from serving.gateway import routes

    told = httpx.get(replicas(real)[0]["url"] + "/openapi.json", headers={"x-steelyard-secret": real.secret}).json()
    unlisted = [p for p in told["paths"] if p not in routes.SERVED and p not in routes.OWN and p not in routes.REFUSED]
    assert not unlisted


def test_every_listening_port_stands_in_the_security_page(real: Stack) -> None:
    """The table's first column holds a pattern for the process name and its address."""
    table = (ROOT / "docs" / "security.md").read_text().partition("## Several nodes")[0]
    found = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", table, re.M)
    rows = [(who.replace(r"\|", "|"), where) for who, where in found]  # a pipe is escaped inside a table
    assert rows
    ours = {p for p in real.processes()} | {real.main.pid if real.main else 0}
    out = subprocess.run(["ss", "-lntpxH"], capture_output=True, text=True, check=True).stdout
    unknown = []
    for line in out.splitlines():
        users = re.findall(r'\("([^"]+)",pid=(\d+)', line)
        if not any(int(pid) in ours for _, pid in users):
            continue
        address = line.split()[4]
        name = users[0][0]
        if not any(re.fullmatch(who, name) and re.fullmatch(where, address) for who, where in rows):
            unknown.append(line)
    assert not unknown


def test_no_secret_on_a_command_line(real: Stack) -> None:
    secrets = [real.secret, real.key, (real.state_dir / "ray-token").read_text().strip()]
    for pid in real.processes():
        with contextlib.suppress(OSError):  # it ended since
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            assert not any(s in command for s in secrets)


def test_secrets_are_for_their_owner_only(real: Stack) -> None:
    for name in ("api-key", "cluster-secret", "ray-token", "keys.json"):
        assert (real.state_dir / name).stat().st_mode & 0o077 == 0, name


def test_prompt_and_key_are_in_no_log(real: Stack) -> None:
    real.chat("tiny", "xyzzy-unique-prompt-text")
    files = [f for f in (real.state_dir / "logs").rglob("*") if f.is_file()]
    until(lambda: any('"event":"request"' in f.read_text(errors="replace") for f in files), "a request line is written")
    for f in files:
        text = f.read_text(errors="replace")
        assert "xyzzy" not in text and real.key not in text and real.secret not in text, f


def test_disconnect_frees_the_slot(real: Stack) -> None:
    replica = next(r for r in replicas(real) if r["version"] == "v1")
    # Sixteen answers of 1,900 tokens: long enough to leave in the middle of.
    body = {
        "model": "tiny",
        "prompt": "a",
        "n": 16,
        "temperature": 1,
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.Client(headers={"x-steelyard-secret": real.secret}) as engine:

        def in_flight() -> int:
            return int(engine.get(replica["url"] + "/-/door").json()["in_flight"])

        assert in_flight() == 0
        with httpx.stream("POST", f"{real.url}/v1/completions", headers=real.headers, json=body, timeout=30) as r:
            assert r.status_code == 200
            events = r.iter_bytes()  # named: a generator that nobody holds is closed at once, and the connection with it
            next(events)
            assert in_flight() == 1
        until(lambda: in_flight() == 0, "the slot is free", 1.0)


def test_metrics_are_merged_and_need_their_scope(real: Stack) -> None:
    assert httpx.get(real.url + "/metrics").status_code == 401
    real.chat("tiny", "What is Steelyard?")
    text = real.get("/metrics").text
    assert re.search(r'^steelyard_requests_total\{.*model="tiny".*status="200".*\} [1-9]', text, re.M)
    assert re.search(r'^vllm:generation_tokens_total\{.*replica="tiny@v1#', text, re.M)
    targets = real.get("/metrics/targets").json()
    assert {t["labels"].get("model", "gateway") for t in targets} == {"gateway", "tiny"}
