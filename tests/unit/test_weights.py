"""Weights: found, built once, and refused when half-written, changed or unsafe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.catalog.weights import require_free_disk, resolve, verify
from serving.errors import WeightsError


def safetensors(path: Path, tensors: dict[str, int]) -> Path:
    """A valid file with one uint8 tensor of the given size per name."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" * at)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "model.safetensors", {"a": 10, "b": 0, "c": 5})
    return folder


def refusal(folder: Path, kind: str = "model", sha256: str | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        verify(folder, kind, sha256)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def manifest(folder: Path, *names: str) -> None:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "manifest.sha256").write_text("".join(lines))


def test_whole_weights_pass(model: Path) -> None:
    verify(model, "model")
    manifest(model, "config.json", "model.safetensors", "tokenizer.json")
    verify(model, "model", "manifest.sha256")


def test_an_adapter_needs_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    safetensors(tmp_path / "adapter_model.safetensors", {"a": 1})
    verify(tmp_path, "adapter")
    assert "config.json: missing" in refusal(tmp_path, "model")


@pytest.mark.parametrize("cut", [1, 14, 15, 16, 100])
def test_half_written_weights_are_named_with_both_sizes(model: Path, cut: int) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    message = refusal(model)
    assert str(file) in message
    assert "half-written" in message
    assert f"found {len(whole) - cut}" in message
    if cut <= 15:
        assert f"expected {len(whole)} bytes" in message


def test_trailing_bytes_are_refused(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "trailing bytes" in refusal(model)


@given(st.binary(max_size=200))
def test_any_bytes_as_safetensors_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(raw)
    assert "model.safetensors" in refusal(folder)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x)
    )
)
def test_any_json_as_header_passes_or_is_refused(tmp_path_factory: pytest.TempPathFactory, header: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz2"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with contextlib.suppress(WeightsError):
        verify(folder, "model")


def test_a_missing_shard_and_a_shard_of_another_save(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "z": "model-2.safetensors"}}))
    assert "the shard model-2.safetensors is missing" in refusal(model)
    safetensors(model / "model-2.safetensors", {"y": 1})
    assert "model-2.safetensors: holds no tensor z" in refusal(model)
    safetensors(model / "model-2.safetensors", {"z": 1})
    verify(model, "model")


def test_pickles_alone_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin), which can run code" in refusal(model)
    (model / "pytorch_model.bin").unlink()
    assert "no *.safetensors" in refusal(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(model: Path, file: str) -> None:
    (model / file).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert "auto_map" in refusal(model)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json: not" in refusal(model)


def test_a_missing_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(model)


def test_the_manifest_is_checked(model: Path) -> None:
    manifest(model, "config.json", "model.safetensors")
    safetensors(model / "model.safetensors", {"a": 9, "b": 0, "c": 6})
    assert "model.safetensors: changed: sha256" in refusal(model, sha256="manifest.sha256")
    manifest(model, "config.json")
    assert "model.safetensors is not listed" in refusal(model, sha256="manifest.sha256")
    (model / "manifest.sha256").write_text("nonsense\n")
    assert "manifest.sha256:1: not a line of sha256sum" in refusal(model, sha256="manifest.sha256")
    (model / "manifest.sha256").write_text(f"{'0' * 64}  ../secret\n")
    assert "outside the folder" in refusal(model, sha256="manifest.sha256")
    assert "none.sha256: not readable" in refusal(model, sha256="none.sha256")


def test_local_sources(model: Path, tmp_path: Path) -> None:
    assert resolve("model", base=tmp_path, cache=tmp_path / "cache") == model
    assert resolve(str(model), base=Path("/"), cache=tmp_path / "cache") == model
    with pytest.raises(WeightsError, match="no such folder"):
        resolve("none", base=tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize("source", ["s3://bucket/x", "hf://org/model", "oci://registry/x:1", "oci:x"])
def test_other_schemes_say_so(tmp_path: Path, source: str) -> None:
    with pytest.raises(WeightsError, match="not supported yet by this version"):
        resolve(source, base=tmp_path, cache=tmp_path)


@pytest.mark.parametrize("source", ["build:", "build:a", "build:../a/b", "build:a/../b", "build:a/b/c", "build:a/.b"])
def test_a_build_source_names_a_recipe_and_an_artefact(tmp_path: Path, source: str) -> None:
    with pytest.raises(WeightsError, match="no build source"):
        resolve(source, base=tmp_path, cache=tmp_path)


RECIPE = """
import pathlib, sys, time
import helper
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "weights").mkdir(parents=True)
print("step 1")
time.sleep(0.2)
(pathlib.Path(__file__).parent.parent / "runs").open("a").write("x")
(out / "weights" / "file").write_text(helper.TEXT)
print("step 2", file=sys.stderr)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "build.py").write_text(RECIPE)
    (folder / "helper.py").write_text("TEXT = 'one'\n")
    return folder


def test_a_recipe_runs_once_until_its_content_changes(tmp_path: Path, recipe: Path) -> None:
    lines: list[str] = []
    first = resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache", on_progress=lines.append)
    assert (first / "file").read_text() == "one"
    assert lines == ["step 1", "step 2"]
    (recipe / "README.md").write_text("words")
    assert resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache") == first
    assert (tmp_path / "runs").read_text() == "x"
    (recipe / "helper.py").write_text("TEXT = 'two'\n")
    second = resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache")
    assert second != first
    assert (second / "file").read_text() == "two"


def test_two_at_once_build_once(tmp_path: Path, recipe: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from serving.catalog.weights import resolve; b = Path(sys.argv[1]);"
        "print(resolve('build:tiny/weights', base=b, cache=b / 'cache', on_progress=lambda line: None))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert len({child.communicate(timeout=60)[0] for child in both}) == 1
    assert [child.returncode for child in both] == [0, 0]
    assert (tmp_path / "runs").read_text() == "x"


def test_a_failing_recipe_gives_its_last_line_and_leaves_nothing(tmp_path: Path, recipe: Path) -> None:
    (recipe / "build.py").write_text("print('began'); raise SystemExit('no corpus')")
    with pytest.raises(WeightsError, match=r"build\.py failed \(exit 1\): no corpus"):
        resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []


def test_a_recipe_without_the_artefact_says_what_it_made(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(WeightsError, match=r"makes no 'other' \(it made: weights\)"):
        resolve("build:tiny/other", base=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(WeightsError, match="no such recipe"):
        resolve("build:none/x", base=tmp_path, cache=tmp_path / "cache")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux only")
def test_a_build_dies_with_the_process_that_asked_for_it(tmp_path: Path, recipe: Path) -> None:
    (recipe / "build.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = (
        "import sys; from pathlib import Path; from serving.catalog.weights import resolve; b = Path(sys.argv[1]);"
        "resolve('build:tiny/x', base=b, cache=b / 'cache', on_progress=lambda line: print(line, flush=True))"
    )
    asker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    builder = psutil.Process(int(asker.stdout.readline()))
    asker.kill()
    asker.wait()
    deadline = time.monotonic() + 5
    while builder.is_running() and builder.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE


def test_an_interrupted_build_is_not_taken_for_a_whole_one(tmp_path: Path, recipe: Path) -> None:
    built = threading.Event()
    whole = resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache", on_progress=lambda _: built.set())
    assert built.is_set()
    draft = whole.parent.with_name(f".{whole.parent.name}.draft")
    whole.parent.rename(draft)
    (draft / "weights" / "file").write_text("half")
    again = resolve("build:tiny/weights", base=tmp_path, cache=tmp_path / "cache")
    assert (again / "file").read_text() == "one"
    assert not draft.exists()


def test_a_full_disk_is_named_before_writing(tmp_path: Path) -> None:
    require_free_disk(tmp_path / "not" / "there", 1, "weights", "STEELYARD_CACHE_DIR")
    with pytest.raises(WeightsError, match=r"weights needs 1048576\.0 GiB and .* GiB free"):
        require_free_disk(tmp_path / "not" / "there", 2**50, "weights", "STEELYARD_CACHE_DIR")
