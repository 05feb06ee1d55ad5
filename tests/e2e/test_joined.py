"""One trace from the client through the gateway into vLLM. (Before `test_killed`, after which there is no stack.)"""

from __future__ import annotations

import httpx
import pytest

from tests.otlp import SERVER, Collector
from tests.stack import Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_gateway_and_engine_are_under_one_trace(real: Stack, collector: Collector) -> None:
    headers = {**real.headers, "traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "one-trace"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is Steelyard?"}], "stream": True}
    answer = httpx.post(f"{real.url}/v1/chat/completions", headers=headers, json=body, timeout=120)
    assert answer.status_code == 200
    until(
        lambda: {s.service for s in collector.of(TRACE)} >= {"steelyard-gateway", "steelyard-engine"}, "both are there"
    )
    spans = {s.name: s for s in collector.of(TRACE)}
    root, attempt, engine = spans["POST /v1/chat/completions"], spans["attempt"], spans["llm_request"]
    assert (root.parent, attempt.parent, engine.parent) == (PARENT, root.id, attempt.id)
    assert (engine.kind, engine.service) == (SERVER, "steelyard-engine")
    assert attempt.began <= engine.began <= engine.ended
    assert engine.resource["service.instance.id"] == attempt.about["steelyard.replica"]
    assert (engine.resource["steelyard.model"], engine.resource["steelyard.version"]) == ("tiny", "v1")
    assert engine.about["gen_ai.usage.completion_tokens"] == root.about["gen_ai.usage.output_tokens"]
    assert "one-trace" in real.cli("logs", TRACE).stdout


def test_an_engine_makes_no_trace_of_its_own(real: Stack, collector: Collector) -> None:
    """Not of health probes, and not of its start: nobody asked for those."""
    assert real.chat("tiny", "What is Steelyard?").status_code == 200

    def joined() -> bool:
        spans = collector.spans
        ours, engines = ({s.trace for s in spans if s.service == f"steelyard-{who}"} for who in ("gateway", "engine"))
        return bool(engines) and engines <= ours

    until(joined, "every engine's span is part of a request's trace")
