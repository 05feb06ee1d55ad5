"""The Grafana dashboards of deploy/observability/dashboards, as code: what each asks, and how it is shown.

`python -m tools.dashboards` writes them; `--check` exits 1 naming the ones that are stale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "observability" / "dashboards"
SCHEMA_VERSION = 39  # Grafana 10.4 and later
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

JOB = 'job="$job"'
MODEL = f'{JOB},model=~"$model"'
VERSION = f'{MODEL},version=~"$version"'
REPLICA = f'{VERSION},replica=~"$replica"'
GPU = f'{JOB},node=~"$node"'
WINDOW = "[$__rate_interval]"
GOOD = ',verdict="good"'
MADE = ',kind="completion"'
COMPLETED = ',outcome="completed"'
OK = ',reason="ok"'
FAULTS = "sum (increase(steelyard_replica_faults_total{{{}}}[1d]))"
BROKEN = ',status="200",reason="engine_error"'
READY = 'steelyard_replicas{{{},state="READY"}}'


@dataclass(frozen=True)
class Panel:
    """`queries`: legend -> PromQL. `kind` is Grafana's name of the panel. `unit` is one of Grafana's units."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    stacked: bool = False
    top: float | None = None  # of the axis


@dataclass(frozen=True)
class Row:
    """A heading."""

    title: str


@dataclass(frozen=True)
class Dashboard:
    name: str  # of the file, and of its uid after `steelyard-`
    title: str
    about: str
    variables: tuple[dict[str, Any], ...]
    parts: tuple[Panel | Row, ...]


def rate(series: str, labels: str, by: str = "") -> str:
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} (rate({series}{{{labels}}}{WINDOW}))"


def quantile(q: float, series: str, labels: str, by: str = "") -> str:
    grouped = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({grouped}) (rate({series}_bucket{{{labels}}}{WINDOW})))"


def quantiles(series: str, labels: str) -> dict[str, str]:
    return {f"p{round(q * 100)}": quantile(q, series, labels) for q in (0.5, 0.95, 0.99)}


def stat(title: str, unit: str, query: str, about: str = "") -> Panel:
    return Panel(title, unit, {"": query}, about, kind="stat", width=4, height=4)


def by_gpu(title: str, unit: str, series: str, *more: str, about: str = "", top: float | None = None) -> Panel:
    """A line per GPU and label of `more`."""
    legend = " ".join(f"{{{{{label}}}}}" for label in ("node", "index", *more))
    return Panel(title, unit, {legend: f"max by ({', '.join(('node', 'index', *more))}) ({series})"}, about, top=top)


def by_replica(title: str, unit: str, query: str, about: str = "", top: float | None = None) -> Panel:
    """A line per replica."""
    return Panel(title, unit, {"{{replica}}": query}, about, top=top)


def by_version(title: str, unit: str, query: str, about: str = "", *, stacked: bool = False) -> Panel:
    """A line per version."""
    return Panel(title, unit, {"{{model}}@{{version}}": query}, about, stacked=stacked)


def stack(title: str, unit: str, series: str, labels: str, *by: str, about: str = "", seldom: bool = False) -> Panel:
    """A counter's rate, a layer per label of `by`. `seldom`: what it counts may not have happened yet."""
    query = rate(series, labels, ", ".join(by))
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return Panel(title, unit, {legend: or_zero(query) if seldom else query}, about, stacked=True)


def share(series: str, labels: str, part: str, by: str = "") -> str:
    """Of a counter's rate, how much `part` (more label matchers) is."""
    return f"{rate(series, labels + part, by)} / {rate(series, labels, by)}"


def or_zero(query: str) -> str:
    """For what did not happen yet, and so has no series."""
    return f"({query}) or vector(0)"


def datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def choice(name: str, query: str, *, many: bool = True) -> dict[str, Any]:
    """A variable whose values Prometheus lists."""
    made: dict[str, Any] = {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": many,
        "includeAll": many,
    }
    if many:
        made |= {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return made


def text(name: str, label: str, value: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "textbox",
        "query": value,
        "current": {"text": value, "value": value},
        "options": [{"text": value, "value": value, "selected": True}],
    }


_JOB = (datasource(), choice("job", "label_values(steelyard_build_info, job)", many=False))
_MODEL = (*_JOB, choice("model", 'label_values(steelyard_replicas_required{job="$job"}, model)'))
_VERSION = (
    *_MODEL,
    choice("version", 'label_values(steelyard_replicas_required{job="$job",model=~"$model"}, version)'),
)
_REPLICA = (
    *_VERSION,
    choice("replica", f"label_values(vllm:num_requests_running{{{VERSION}}}, replica)"),
)
_NODE = (
    *_JOB,
    choice("node", 'label_values(steelyard_gpu_up{job="$job"}, node)'),
    text("price", "price of a GPU hour", "3.00"),
)


OVERVIEW = Dashboard(
    "overview",
    "Steelyard / Overview",
    "Is it well, and for whom not?",
    _MODEL,
    (
        stat(
            "Good answers",
            "percentunit",
            share("steelyard_slo_requests_total", MODEL, GOOD),
            "Right status, first token in time, no error in the stream.",
        ),
        stat("Requests", "reqps", rate("steelyard_requests_total", MODEL)),
        stat("First token, p95", "s", quantile(0.95, "steelyard_ttft_seconds", MODEL)),
        stat("Tokens made", "short", rate("steelyard_tokens_total", MODEL + MADE), "Each second."),
        stat("Waiting", "short", f"sum (steelyard_requests_waiting{{{MODEL}}})"),
        stat(
            "Alerts firing", "short", or_zero(f'count (ALERTS{{{JOB},alertname=~"Steelyard.+",alertstate="firing"}})')
        ),
        Panel(
            "Requests by status",
            "reqps",
            {"{{status}}": rate("steelyard_requests_total", MODEL, "status")},
            stacked=True,
        ),
        Panel("Time to the first token", "s", quantiles("steelyard_ttft_seconds", MODEL)),
        Panel(
            "Error budget burn",
            "short",
            {f"{{{{model}}}} {w}": f"model:steelyard_slo_burn:rate{w}{{{MODEL}}}" for w in ("5m", "1h")},
            "1 spends the budget exactly within its period. 14.4 over an hour wakes somebody.",
        ),
        Panel(
            "Tokens",
            "short",
            {"{{kind}}": rate("steelyard_tokens_total", MODEL, "kind")},
            "Each second. Cached ones are part of the prompt's.",
        ),
        Panel(
            "Requests waiting and running",
            "short",
            {
                f"{{{{model}}}} {s}": f"sum by (model) (steelyard_requests_{s}{{{MODEL}}})"
                for s in ("waiting", "running")
            },
        ),
        by_version("Ready replicas", "short", f"max by (model, version) ({READY.format(MODEL)})"),
        Panel(
            "Models",
            "short",
            {
                "requests/s": rate("steelyard_requests_total", MODEL, "model"),
                "good": share("steelyard_slo_requests_total", MODEL, GOOD, "model"),
                "first token p95, s": quantile(0.95, "steelyard_ttft_seconds", MODEL, "model"),
                "tokens/s": rate("steelyard_tokens_total", MODEL + MADE, "model"),
                "ready replicas": f"sum by (model) (max by (model, version) ({READY.format(MODEL)}))",
            },
            kind="table",
            width=24,
        ),
    ),
)

MODELS = Dashboard(
    "model",
    "Steelyard / Model",
    "What do the clients of a model see, and why is it slow: waiting, first token, or the tokens after it?",
    _VERSION,
    (
        Row("What clients see"),
        Panel("Time to the first token", "s", quantiles("steelyard_ttft_seconds", VERSION)),
        Panel("Time between tokens", "s", quantiles("steelyard_itl_seconds", VERSION)),
        Panel("Whole answer", "s", quantiles("steelyard_e2e_seconds", VERSION)),
        Panel(
            "Wait for a slot",
            "s",
            quantiles("steelyard_queue_wait_seconds", VERSION),
            "Part of the time to the first token.",
        ),
        stack("Requests by reason", "reqps", "steelyard_requests_total", VERSION, "reason"),
        stack("Requests by adapter", "reqps", "steelyard_requests_total", VERSION, "model", "adapter"),
        Row("Objective"),
        stack("Verdicts", "reqps", "steelyard_slo_requests_total", VERSION, "verdict"),
        Panel(
            "Error budget burn",
            "short",
            {f"{{{{model}}}} {w}": f"model:steelyard_slo_burn:rate{w}{{{MODEL}}}" for w in ("5m", "1h", "6h", "3d")},
        ),
        stack(
            *("Rejections", "reqps", "steelyard_rejections_total", VERSION, "reason"),
            about="Refused before an engine.",
            seldom=True,
        ),
        Row("Work"),
        Panel(
            "Waiting and running",
            "short",
            {s: f"sum (steelyard_requests_{s}{{{VERSION}}})" for s in ("waiting", "running")},
            stacked=True,
        ),
        stack(
            *("Tokens", "short", "steelyard_tokens_total", VERSION, "kind", "outcome"),
            about="Each second. Aborted: given to clients who left, or lost to a broken stream.",
        ),
        Panel(
            "Tokens a request",
            "short",
            {
                "{{kind}}": rate("steelyard_tokens_total", VERSION + COMPLETED, "kind")
                + " / ignoring (kind) group_left "
                + rate("steelyard_requests_total", VERSION + OK)
            },
        ),
        Panel(
            "Replicas by state",
            "short",
            {"{{version}} {{state}}": f"max by (version, state) (steelyard_replicas{{{VERSION}}})"},
            stacked=True,
        ),
        stack("Requests by version", "reqps", "steelyard_requests_total", VERSION, "version"),
        Panel(
            "First token by version, p95",
            "s",
            {"{{version}}": quantile(0.95, "steelyard_ttft_seconds", VERSION, "version")},
        ),
    ),
)

ENGINES = Dashboard(
    "engine",
    "Steelyard / Replica and engine",
    "Which replica is slow or full, and what is its engine doing?",
    _REPLICA,
    (
        Row("Load"),
        by_replica("Running", "short", f"sum by (replica) (vllm:num_requests_running{{{REPLICA}}})"),
        by_replica(
            "Waiting in the engine",
            "short",
            f"sum by (replica) (vllm:num_requests_waiting{{{REPLICA}}})",
            "Near zero: requests wait in the gateways.",
        ),
        by_replica("KV cache", "percentunit", f"max by (replica) (vllm:kv_cache_usage_perc{{{REPLICA}}})", top=1),
        by_replica("Tokens made", "short", rate("vllm:generation_tokens_total", REPLICA, "replica"), "Each second."),
        by_replica("Prompt tokens", "short", rate("vllm:prompt_tokens_total", REPLICA, "replica"), "Each second."),
        by_replica(
            "Prefix cache hits",
            "percentunit",
            rate("vllm:prefix_cache_hits_total", REPLICA, "replica")
            + " / "
            + rate("vllm:prefix_cache_queries_total", REPLICA, "replica"),
            top=1,
        ),
        Row("Times inside the engine"),
        by_replica("First token, p95", "s", quantile(0.95, "vllm:time_to_first_token_seconds", REPLICA, "replica")),
        by_replica("Between tokens, p95", "s", quantile(0.95, "vllm:inter_token_latency_seconds", REPLICA, "replica")),
        by_replica("Waiting, p95", "s", quantile(0.95, "vllm:request_queue_time_seconds", REPLICA, "replica")),
        by_replica(
            "Tokens a step",
            "short",
            quantile(0.5, "vllm:iteration_tokens_total", REPLICA, "replica"),
            "Median: how full the batches are.",
        ),
        by_replica(
            "Preemptions",
            "short",
            rate("vllm:num_preemptions_total", REPLICA, "replica"),
            "Each second: requests thrown out of the KV cache and computed again.",
        ),
        stack("Answers by their end", "reqps", "vllm:request_success_total", REPLICA, "finished_reason"),
        Row("Process"),
        by_replica("Memory of the server", "bytes", f"sum by (replica) (process_resident_memory_bytes{{{REPLICA}}})"),
        by_replica(
            "CPU of the server", "percentunit", rate("process_cpu_seconds_total", REPLICA, "replica"), "1 is one core."
        ),
        by_replica("Answers Prometheus", "short", f"min by (replica) (up{{{REPLICA}}})", top=1),
    ),
)

# Tokens are counted in gateways, whatever node made them: what is divided by them is of all nodes too.
_RESERVED = rate("steelyard_gpu_seconds_total", JOB + ',state="reserved"', "model, version")
_IDLE = rate("steelyard_gpu_seconds_total", GPU + ',state="idle"', "model, version")
_MADE = rate("steelyard_tokens_total", JOB + MADE, "model, version")

GPUS = Dashboard(
    "gpu",
    "Steelyard / GPUs and cost",
    "What do the GPUs really do, for which model, and what does it cost?",
    _NODE,
    (
        Row("Money"),
        stack(
            *("GPUs by what they do", "short", "steelyard_gpu_seconds_total", GPU + ',state!="reserved"', "state"),
            about="Computing, idle or loading weights for the replicas that hold them, or free.",
        ),
        by_version("Idle GPUs", "short", _IDLE, stacked=True),
        by_version("Cost of idleness, an hour", "currencyUSD", f"$price * {_IDLE}", stacked=True),
        by_version(
            "Cost of a million tokens",
            "currencyUSD",
            f"1e6 * $price / 3600 * {_RESERVED} / {_MADE}",
            "Completion tokens, over all reserved GPU time of all nodes.",
        ),
        by_version("Tokens a GPU-second", "short", f"{_MADE} / {_RESERVED}", "Of all nodes."),
        by_gpu("Power", "watt", f"steelyard_gpu_power_watts{{{GPU}}}"),
        Row("What they do"),
        by_gpu(
            *("SM active", "percentunit", f"steelyard_gpu_sm_active_ratio{{{GPU}}}", "model"),
            about="Share of the multiprocessors that had work.",
            top=1,
        ),
        by_gpu("Tensor cores active", "percentunit", f"steelyard_gpu_tensor_active_ratio{{{GPU}}}", "model", top=1),
        by_gpu("Memory bandwidth used", "percentunit", f"steelyard_gpu_dram_active_ratio{{{GPU}}}", "model", top=1),
        by_gpu(
            *("A kernel ran", "percentunit", f"steelyard_gpu_kernel_active_ratio{{{GPU}}}", "model"),
            about="NVML's utilisation: near 100 % in any decode loop, however little is computed.",
            top=1,
        ),
        by_gpu(
            "Memory used",
            "percentunit",
            f"steelyard_gpu_memory_used_bytes{{{GPU}}} / steelyard_gpu_memory_total_bytes{{{GPU}}}",
            "model",
            top=1,
        ),
        by_gpu("Temperature", "celsius", f"steelyard_gpu_temperature_celsius{{{GPU}}}", "sensor"),
        Row("What is wrong with them"),
        Panel("Up", "short", {"{{node}} {{index}}": f"min by (node, index) (steelyard_gpu_up{{{GPU}}})"}, top=1),
        Panel(
            "XID errors",
            "short",
            {
                "{{node}} {{index}} {{xid}}": or_zero(
                    f"max by (node, index, xid) (steelyard_gpu_xid_errors_total{{{GPU}}})"
                )
            },
            "Since the exporters started.",
        ),
        by_gpu(
            "Uncorrected ECC errors",
            "short",
            f'steelyard_gpu_ecc_errors_total{{{GPU},severity="uncorrected",scope="volatile"}}',
        ),
        by_gpu("Throttled", "short", f"steelyard_gpu_throttled{{{GPU}}}", "reason", top=1),
        by_gpu("Clocks", "hertz", f"steelyard_gpu_clock_hertz{{{GPU}}}", "clock"),
        by_gpu("PCIe", "Bps", f"steelyard_gpu_pcie_bytes_per_second{{{GPU}}}", "direction"),
    ),
)

FAILURES = Dashboard(
    "failures",
    "Steelyard / Failure and scaling",
    "What failed, who was spared it, and what did scaling do about it?",
    _VERSION,
    (
        Row("Scaling"),
        by_version("Ready replicas", "short", f"max by (model, version) ({READY.format(VERSION)})"),
        Panel(
            "Scale decisions",
            "short",
            {
                "{{model}} {{direction}} {{reason}}": "sum by (model, direction, reason) "
                f"(increase(steelyard_scale_decisions_total{{{VERSION}}}[5m]))"
            },
            "Within five minutes.",
            stacked=True,
        ),
        Panel(
            "Replicas that start or drain",
            "short",
            {
                "{{model}}@{{version}} {{state}}": "max by (model, version, state) "
                f'(steelyard_replicas{{{VERSION},state=~"STARTING|DRAINING"}})'
            },
        ),
        by_version(
            "Starts",
            "short",
            f"sum by (model, version) (increase(steelyard_cold_starts_total{{{VERSION}}}[15m]))",
            "Replicas that became ready within fifteen minutes.",
        ),
        Panel(
            "Phases of a start, mean",
            "s",
            {
                "{{model}} {{phase}}": f"sum by (model, phase) (steelyard_cold_start_seconds_sum{{{VERSION}}})"
                f" / sum by (model, phase) (steelyard_cold_start_seconds_count{{{VERSION}}})"
            },
            "Since the directory started.",
            stacked=True,
        ),
        by_version("Requests waiting", "short", f"sum by (model, version) (steelyard_requests_waiting{{{VERSION}}})"),
        Row("Failures"),
        Panel(
            "Suspect and failed replicas",
            "short",
            {
                "{{model}} {{state}} {{cause}}": "sum by (model, state, cause) "
                f"(increase(steelyard_replica_faults_total{{{VERSION}}}[15m]))"
            },
            "Within fifteen minutes. SUSPECT ones get no new work until they prove to be well, FAILED ones are replaced.",
        ),
        by_replica("Health", "short", f"min by (replica) (steelyard_replica_health{{{VERSION}}})", top=1),
        stack("Tries at engines", "reqps", "steelyard_upstream_attempts_total", VERSION, "outcome"),
        stack(
            *("Retries", "reqps", "steelyard_retries_total", VERSION, "outcome"),
            about="Failed tries that clients did not see, by how they failed.",
            seldom=True,
        ),
        stack("Rejections", "reqps", "steelyard_rejections_total", VERSION, "reason", seldom=True),
        stack(
            *("Streams that broke", "reqps", "steelyard_requests_total", VERSION + BROKEN, "model"),
            about="Clients saw a part of an answer and an error.",
            seldom=True,
        ),
        stat("Suspicions, a day", "short", or_zero(FAULTS.format(VERSION + ',state="SUSPECT"'))),
        stat("Failed replicas, a day", "short", or_zero(FAULTS.format(VERSION + ',state="FAILED"'))),
        stat(
            "Quarantined nodes",
            "short",
            or_zero(f"count (steelyard_quarantined_seconds{{{VERSION}}})"),
            "Where a version failed again and again, and stays away for a while.",
        ),
        stat("Processes without metrics", "short", or_zero(f"count (up{{{JOB}}} == 0)")),
        stat("Processes", "short", f"count (up{{{JOB}}})"),
        stat(
            "Next key expiry",
            "s",
            or_zero(f"min (steelyard_key_expiry_timestamp_seconds{{{JOB}}}) - time()"),
            "0: no key expires.",
        ),
        Row("The stack itself"),
        Panel(
            "CPU of gateways and directory",
            "percentunit",
            {"{{instance}}": rate("steelyard_process_cpu_seconds_total", JOB, "instance")},
            "1 is one core.",
        ),
        Panel(
            "Memory of gateways and directory",
            "bytes",
            {"{{instance}}": f"steelyard_process_resident_memory_bytes{{{JOB}}}"},
        ),
        Panel("Open files and sockets", "short", {"{{instance}}": f"steelyard_process_open_fds{{{JOB}}}"}),
        Panel(
            "Versions that run",
            "short",
            {"processes": f"count by (version, ray, python, component) (steelyard_build_info{{{JOB}}})"},
            kind="table",
            width=24,
            height=5,
        ),
    ),
)

ALL = (OVERVIEW, MODELS, ENGINES, GPUS, FAILURES)


def build(dashboard: Dashboard) -> dict[str, Any]:
    """Grafana's JSON."""
    others = {"type": "dashboards", "tags": ["steelyard"], "title": "Steelyard", "asDropdown": True}
    return {
        "uid": f"steelyard-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["steelyard"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [others | {"keepTime": True, "includeVars": True}],
        "annotations": {"list": []},
        "templating": {"list": list(dashboard.variables)},
        "panels": list(_placed(dashboard.parts)),
    }


def _placed(parts: Iterable[Panel | Row]) -> Iterable[dict[str, Any]]:
    """From left to right; a part that does not fit begins a line."""
    x = y = line = 0
    for number, part in enumerate(parts, 1):
        width, height = (COLUMNS, 1) if isinstance(part, Row) else (part.width, part.height)
        if x + width > COLUMNS:
            x, y, line = 0, y + line, 0
        at = {"x": x, "y": y, "w": width, "h": height}
        x, line = x + width, max(line, height)
        if isinstance(part, Row):
            yield {"id": number, "type": "row", "title": part.title, "collapsed": False, "gridPos": at, "panels": []}
        else:
            yield {"id": number, "gridPos": at, **_panel(part)}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {"colorMode": "none", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
    table = panel.kind == "table"
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend or panel.title,
                **({"format": "table", "instant": True} if table else {"range": True}),
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }
    if table:
        names = {f"Value #{chr(ord('A') + i)}": legend for i, legend in enumerate(panel.queries)}
        made["transformations"] = [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
        ]
    return made


def texts() -> dict[str, str]:
    """File name -> content."""
    return {f"{d.name}.json": json.dumps(build(d), indent=1) + "\n" for d in ALL}


def main() -> int:
    stale = {n: t for n, t in texts().items() if not (FOLDER / n).exists() or (FOLDER / n).read_text() != t}
    if "--check" in sys.argv:
        for name in stale:
            print(f"{FOLDER / name} is stale: run `make dashboards`")
        return bool(stale)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in stale.items():
        (FOLDER / name).write_text(content)
        print(f"wrote {FOLDER / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
