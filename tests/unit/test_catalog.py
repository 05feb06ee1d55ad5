"""Model files: what they mean, and the one line said about a bad one."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.catalog.spec import ModelSpec, Served
from serving.catalog.store import Profile, apply_profile, load
from serving.errors import CatalogError

GOOD = """\
name: support-llama
versions:
  - version: "2026-11-01"
    weights: {source: weights/a, sha256: manifest.sha256}
    engine:
      kind: vllm
      args: {max-model-len: 16384, max-num-seqs: 8}
    resources: {gpus: 1, accelerator: H100}
    adapters: [{name: support-llama-de, source: adapters/de}]
    scaling: {min: 1, max: 6, target_ongoing: 48, scale_down_after_s: 300, idle_to_zero_s: null}
  - version: v2
    weights:
      source: weights/b
release: {stable: "2026-11-01"}
limits: {max_queue: 512, max_wait_s: 60, max_input_tokens: 16000, request_timeout_s: 600}
allow: [priority]
placement: {labels: {region: eu}}
"""


SCALING = "scale_down_after_s: 300"


def schedule(**entry: Any) -> str:
    entry = {"start": "0 8 * * 1-5", "end": "0 18 * * 1-5", "timezone": "Europe/Berlin", "min": 4} | entry
    return f"schedule: [{yaml.safe_dump(entry, default_flow_style=True).strip()}]"


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(CatalogError) as caught:
        load(path, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_name_a_client_can_write(tmp_path: Path) -> None:
    catalog = load(write(tmp_path, GOOD), "gpu")
    assert dict(catalog.served_names) == {
        "support-llama": Served("support-llama", "2026-11-01", None),
        "support-llama@2026-11-01": Served("support-llama", "2026-11-01", None),
        "support-llama@v2": Served("support-llama", "v2", None),
        "support-llama-de": Served("support-llama", "2026-11-01", "support-llama-de"),
        "support-llama-de@2026-11-01": Served("support-llama", "2026-11-01", "support-llama-de"),
    }
    assert catalog.resolve("support-llama@v3") is None
    assert catalog.folders["support-llama"] == tmp_path
    assert [version.version for _, version in catalog.versions()] == ["2026-11-01", "v2"]


def test_an_adapter_of_two_versions_means_the_stable_one(tmp_path: Path) -> None:
    more = "    adapters: [{name: support-llama-de, source: x}]\nrelease"
    catalog = load(write(tmp_path, GOOD.replace("release", more)), "gpu")
    assert catalog.resolve("support-llama-de") == Served("support-llama", "2026-11-01", "support-llama-de")
    assert catalog.resolve("support-llama-de@v2") == Served("support-llama", "v2", "support-llama-de")


def test_defaults(tmp_path: Path) -> None:
    spec = load(write(tmp_path, "name: a\nversions: [{version: v1, weights: {source: w}}]\n"), "gpu").model("a")
    version = spec.version("v1")
    assert spec.release.stable == "v1"
    assert (spec.limits.max_queue, spec.limits.max_wait_s, spec.limits.request_timeout_s) == (512, 60, 600)
    assert (spec.limits.max_body_bytes, spec.limits.max_input_tokens) == (16 * 1024 * 1024, None)
    assert (version.drain_s, version.start_timeout_s) == (30, 600)
    assert (version.scaling.min, version.scaling.max, version.resources.gpus) == (1, 1, 1)


def test_an_unquoted_date_is_a_version(tmp_path: Path) -> None:
    catalog = load(write(tmp_path, GOOD.replace('"2026-11-01"', "2026-11-01")), "gpu")
    assert catalog.models[0].release.stable == "2026-11-01"


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("kind: vllm", "kind: vlm", 6, "versions[0].engine.kind = 'vlm': allowed: 'vllm' or 'simulator'"),
        ("engine:", "engin:", 5, "versions[0].engin = {'args': "),
        ("engine:", "engin:", 5, "did you mean engine? allowed: version, weights, engine"),
        ("versions:", "version:", 2, "unknown key; did you mean versions?"),
        ("max: 6", "max: 0", 10, "versions[0].scaling.max = 0: input should be greater than or equal to 1"),
        ("max: 6", "max: 257", 10, "less than or equal to 256"),
        ("min: 1, max: 6", "min: 3, max: 2", 10, "versions[0].scaling.max = 2: max is at least min (3)"),
        (SCALING, f"{SCALING}, {schedule(min=7)}", 10, "versions[0].scaling.schedule[0].min = 7: at most max (6)"),
        (SCALING, f"{SCALING}, {schedule(start='0 25 * * *')}", 10, "schedule[0].start = '0 25 * * *': no cron time"),
        (SCALING, f"{SCALING}, {schedule(end='0 0 30 2 *')}", 10, "schedule[0].end = '0 0 30 2 *': no cron time"),
        (SCALING, f"{SCALING}, {schedule(end='@daily')}", 10, "write five fields, e.g. 0 8 * * 1-5"),
        (SCALING, f"{SCALING}, {schedule(timezone='Mars/X')}", 10, "timezone 'Mars/X' is not known"),
        (SCALING, f"{SCALING}, schedule: [{{start: 0 8 * * *}}]", 10, "the key is required and missing"),
        (SCALING, f"{SCALING}, {schedule(replicas=4)}", 10, "unknown key; allowed: start, end, timezone, min"),
        ("idle_to_zero_s: null", "idle_to_zero_s: 60", 10, "idle_to_zero_s = 60: needs min: 0"),
        ("version: v2", "version: 1.10", 11, "versions[1].version = 1.1: a string is wanted: put it in quotes"),
        ("version: v2", "version: v@2", 11, "versions[1].version = 'v@2': a version is"),
        ("version: v2", 'version: "2026-11-01"', 11, "a version is listed once"),
        ("gpus: 1,", "gpus: 1.5,", 8, "above 1, gpus is a whole number"),
        ("gpus: 1,", "gpus: yes,", 8, "valid number"),
        ("max-model-len", "--max-model-len", 7, "none leading"),
        ("max-model-len", "max_model_len", 7, "with dashes"),
        ("max-model-len: 16384", "host: 0.0.0.0", 7, "not settable here"),
        ("max-model-len: 16384", "tensor-parallel-size: 4", 8, "gpus is at least 4"),
        ("16384", "{a: 1}", 7, "an engine argument is a string, number, true, false, null or a list of these"),
        ("      kind: vllm", "      env: {PATH: x}", 6, "only VLLM_*, OMP_*, CUDA_* and NCCL_*"),
        ("      kind: vllm", "      env: {VLLM_API_KEY: x}", 6, "not settable here"),
        ("      kind: vllm", "      env: {VLLM_X: 1}", 6, "put it in quotes"),
        ('stable: "2026-11-01"', "stable: v9", 14, "release.stable = 'v9': names one of the versions: 2026-11-01, v2"),
        ('release: {stable: "2026-11-01"}\n', "", 1, "release: the key is required and missing"),
        ("    weights:\n      source: weights/b\n", "", 11, "versions[1].weights: the key is required and missing"),
        ("name: support-llama\n", "", 1, "name: the key is required and missing"),
        (
            "name: support-llama\n",
            "name: support-llama\nname: x\n",
            2,
            "'name': the key is there twice (first on line 1)",
        ),
        ("name: support-llama-de", "name: Foo@x", 9, "versions[0].adapters[0].name = 'Foo@x': a name is"),
        ("name: support-llama-de", "name: support-llama", 9, "the name is taken"),
        (
            "max_queue: 512",
            "max_queue: '5', max_wait_: 3",
            15,
            "max_queue = '5': input should be a valid integer (and 1 more",
        ),
        ("[priority]", "[logprobs]", 16, "allow[0] = 'logprobs': allowed: 'priority', "),
        ("{labels: {region: eu}}", "[]", 17, "placement = []: a mapping"),
        ("[priority]", "priority", 16, "a list is wanted"),
        ("region: eu}}", "region: eu}", 18, "not YAML"),
        ("region: eu", "region: 0x_", 17, "not YAML: not readable"),
        ("region: eu", "{a: b}: eu", 17, "not YAML"),
        ("region: eu", "region: *nobody", 17, "undefined alias"),
        ("region: eu", "region: !!python/object:os.system x", 17, "not YAML"),
        ("name: support", "name: \x01support", 1, "not YAML"),
    ],
)
def test_a_bad_file_is_one_line_with_file_line_key_and_value(
    tmp_path: Path, old: str, new: str, line: int, said: str
) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


def test_anchors_and_merge_keys_work_and_keep_their_lines(tmp_path: Path) -> None:
    text = """\
name: a
versions:
- &one
  version: v1
  weights: {source: w}
  drain_s: -1
- {<<: *one, version: v2}
release: {stable: v2}
"""
    path = write(tmp_path, text)
    said = "versions[0].drain_s = -1: input should be greater than or equal to 0 (and 1 more in this file)"
    assert refusal(path) == f"{path}:6: {said}"
    path = write(tmp_path, text.replace("-1", "1"))
    assert load(path, "gpu").model("a").version("v2").drain_s == 1


def test_an_exponential_document_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "unknown key" in refusal(write(tmp_path, bomb + "name: b\nname2: *a29\n"))


def test_names_are_unique_over_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    other = write(tmp_path, "name: support-llama-de\nversions: [{version: v1, weights: {source: w}}]\n", "b.yaml")
    assert refusal(tmp_path) == (
        f"{other}:1: name = 'support-llama-de': the name is taken by {tmp_path / 'a.yaml'}: "
        "model and adapter names are unique"
    )


def test_sources_of_a_catalog(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one = write(tmp_path, "name: a\nversions: [{version: v1, weights: {source: w}}]\n")
    two = write(tmp_path / "deep", "name: b\nversions: [{version: v1, weights: {source: w}}]\n")
    assert [spec.name for spec in load(tmp_path, "cpu").models] == ["a"]
    assert [spec.name for spec in load(f"{one}, {two}", "cpu").models] == ["a", "b"]
    assert "no such file or folder" in refusal(tmp_path / "none")
    for nothing in ("", f"{one},", " "):
        assert "names no catalog" in refusal(nothing)
    (tmp_path / "empty").mkdir()
    assert "no *.yaml in this folder" in refusal(tmp_path / "empty")
    assert "the file is empty" in refusal(write(tmp_path, "# nothing\n"))
    (tmp_path / "a.yaml").write_bytes(b"name: a\nx: \xff\n")
    assert refusal(tmp_path / "a.yaml").startswith(f"{tmp_path / 'a.yaml'}:2: not UTF-8")


def test_profiles(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    cpu, gpu, sim = (load(path, profile).models[0].versions for profile in ("cpu", "gpu", "sim"))
    assert (cpu[0].resources.gpus, cpu[0].resources.accelerator) == (0, None)
    assert cpu[0].engine.args == {"enforce-eager": True, "max-model-len": 16384, "max-num-seqs": 8}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    assert cpu[0].engine.env == {"VLLM_CPU_KVCACHE_SPACE": "1", **threads}
    assert (gpu[0].resources.gpus, gpu[1].resources.gpus) == (1, 1)
    assert gpu[0].engine.args == {"max-model-len": 16384, "max-num-seqs": 8}
    assert (sim[0].engine.kind, sim[0].weights, sim[0].resources.gpus) == ("simulator", None, 0)
    assert sim[0].engine.args == {"max-model-len": 16384, "max-num-seqs": 8}


def test_a_profile_leaves_what_the_file_says(tmp_path: Path) -> None:
    text = GOOD.replace("{max-model-len", "{enforce-eager: false, max-model-len")
    env = "env: {VLLM_CPU_KVCACHE_SPACE: '4', VLLM_CPU_OMP_THREADS_BIND: 0-3}"
    text = text.replace("kind: vllm", f"kind: vllm\n      {env}").replace("gpus: 1", "gpus: 0.5, cpus: 4")
    path = write(tmp_path, text)
    engine = load(path, "cpu").models[0].versions[0].engine
    assert engine.args["enforce-eager"] is False
    assert engine.env == {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
        "OMP_NUM_THREADS": "4",
    }
    assert load(path, "gpu").models[0].versions[0].resources.gpus == 0.5


def test_the_workers_of_a_replica_without_gpus_share_its_cores(tmp_path: Path) -> None:
    text = GOOD.replace("gpus: 1", "gpus: 2, cpus: 7").replace("max-num-seqs: 8", "tensor-parallel-size: 2")
    engine = load(write(tmp_path, text), "cpu").models[0].versions[0].engine
    assert engine.env["OMP_NUM_THREADS"] == "3"


def test_gpus_default_to_the_parallel_size(tmp_path: Path) -> None:
    text = GOOD.replace("    resources: {gpus: 1, accelerator: H100}\n", "").replace(
        "max-num-seqs", "tensor-parallel-size"
    )
    path = write(tmp_path, text)
    assert load(path, "gpu").models[0].versions[0].resources.gpus == 8
    simulated = load(path, "sim", simulated_gpus=True).models[0].versions[0]
    assert (simulated.engine.kind, simulated.resources.gpus, simulated.resources.accelerator) == ("simulator", 8, None)


@pytest.mark.parametrize("profile", ["cpu", "gpu", "sim"])
def test_a_profile_applied_twice_changes_nothing_more(tmp_path: Path, profile: Profile) -> None:
    once = load(write(tmp_path, GOOD), profile)
    assert apply_profile(once, profile) == once


def test_a_spec_survives_json(tmp_path: Path) -> None:
    spec = load(write(tmp_path, GOOD), "gpu").models[0]
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


KEYS = [
    "name",
    "versions",
    "version",
    "weights",
    "source",
    "engine",
    "args",
    "env",
    "scaling",
    "min",
    "max",
    "release",
    "stable",
]
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.integers(), inner, max_size=5)
    ),
    max_leaves=25,
)


@given(JUNK)
def test_any_data_gives_a_catalog_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    _loads_or_refuses(tmp_path_factory, yaml.safe_dump(data).encode())


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_give_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    _loads_or_refuses(tmp_path_factory, raw)


@given(st.integers(0, len(GOOD) - 1), st.text(max_size=3))
def test_any_slip_of_the_pen_gives_a_catalog_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, typed: str
) -> None:
    _loads_or_refuses(tmp_path_factory, (GOOD[:at] + typed + GOOD[at + 1 :]).encode("utf-8", "replace"))


def _loads_or_refuses(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(raw)
    try:
        load(path, "cpu")
    except CatalogError as error:
        message = str(error)
        assert message.startswith(f"{path}:")
        assert message[len(str(path)) + 1].isdigit()
        assert "\n" not in message
        assert len(message) < len(str(path)) + 700
