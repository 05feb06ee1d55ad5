"""`make observe` before it starts anything: what it refuses, and the configuration that it writes."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path

import pytest
import yaml

from serving.errors import OperatorError, PortTaken
from serving.settings import Settings
from tools import observe


def test_without_a_stack_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/usr/bin/prometheus")
    with pytest.raises(OperatorError, match=r"no stack runs from .*Start one with `make serve`"):
        observe.run(Settings(state_dir=tmp_path), 9090, 3000, "5s")


def test_without_prometheus_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(OperatorError, match="apt-get install prometheus"):
        observe.run(Settings(state_dir=tmp_path), 9090, 3000, "5s")


@pytest.mark.parametrize("interval", ["", "5", "0s", "1s; rm"])
def test_an_interval_is_a_duration(tmp_path: Path, interval: str) -> None:
    with pytest.raises(OperatorError, match="no duration"):
        observe.run(Settings(state_dir=tmp_path), 9090, 3000, interval)


def test_a_port_that_answers_already_is_not_taken_for_ours() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(PortTaken, match=url):
            observe._free(observe.Server("Prometheus", [], url, url, {}))
        other.shutdown()


def test_the_configuration_is_the_shipped_one_for_this_gateway_and_key() -> None:
    made = yaml.safe_load(observe.configuration("http://127.0.0.1:8123", Path("/s/api-key"), "2s"))
    shipped = yaml.safe_load((observe.FOLDER / "prometheus.yml").read_text())
    (job,), (like,) = made["scrape_configs"], shipped["scrape_configs"]
    assert (job["job_name"], made["rule_files"]) == (like["job_name"], shipped["rule_files"])
    assert job["http_sd_configs"][0]["url"] == "http://127.0.0.1:8123/metrics/targets"
    assert (
        job["authorization"]
        == job["http_sd_configs"][0]["authorization"]
        == {
            "type": "Bearer",
            "credentials_file": "/s/api-key",
        }
    )
    assert made["global"]["scrape_timeout"] == made["global"]["scrape_interval"] == "2s"
