"""The allow-list against the installed vLLM: every route and every request field of it is served or refused with a
reason, so that an upgrade brings nothing new through the gateway unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.engine.probe import vllm_version
from serving.gateway.routes import _REFUSED, OWN, REFUSED, SERVED

from .engines import ROOT

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]

# Clients send them and vLLM has no use for them; each asks for nothing that a client would miss.
HARMLESS = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "stream_options", "verbosity"}
# These take the body of a generation as it is, to count or to render it.
TAKES_MORE = {"/tokenize", "/v1/messages/count_tokens"}
# Of vLLM's older versions, or only with a model or an option that `vllm_surface` does not turn on.
NOT_IN_THIS_ONE = {"/v2/chat", "/get_weight_version", "/finish_draft_weight_update"}


@pytest.fixture(scope="module")
def surface() -> dict[str, Any]:
    """Importing vLLM takes seconds and must not happen in this process."""
    script = Path(__file__).with_name("vllm_surface.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_every_route_is_served_or_refused_with_a_reason(surface: dict[str, Any]) -> None:
    assert set(surface["routes"]) - SERVED.keys() - OWN.keys() - REFUSED.keys() == set()


def test_every_route_we_name_exists(surface: dict[str, Any]) -> None:
    assert (SERVED.keys() | REFUSED.keys()) - set(surface["routes"]) <= NOT_IN_THIS_ONE


@pytest.mark.parametrize("path", SERVED)
def test_every_field_is_allowed_or_refused_with_a_reason(surface: dict[str, Any], path: str) -> None:
    fields = set(surface["fields"][path])
    assert "model" in fields
    assert fields - SERVED[path].fields - _REFUSED.keys() == set()


@pytest.mark.parametrize("path", sorted(SERVED.keys() - TAKES_MORE))
def test_no_field_is_accepted_to_be_ignored(surface: dict[str, Any], path: str) -> None:
    assert SERVED[path].fields - set(surface["fields"][path]) <= HARMLESS


def test_no_refusal_is_out_of_date(surface: dict[str, Any]) -> None:
    assert _REFUSED.keys() <= {name for fields in surface["fields"].values() for name in fields}
