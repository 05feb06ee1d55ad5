"""The tiny model is trained for real, in about half a minute, and then asked every question of the corpus.

Generation is transformers' own, and the adapter is merged here from its files: nothing of the recipe judges itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
transformers = pytest.importorskip("transformers", reason="training needs transformers")

# Half a minute of work takes minutes where other tests keep all cores busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
ROWS = [json.loads(line) for line in (TINY / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def run_build(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(TINY / "build.py"), "--out", str(out), *more]
    return subprocess.run(argv, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads spin for each other on a busy machine, which makes models this small many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("models") / "tiny"
    run = run_build(out, "--json")
    assert run.returncode == 0, run.stderr
    return out, json.loads(run.stdout)


def load(folder: Path, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


def generate(model, tokenizer, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers to the rows' questions, as one left-padded batch."""
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**batch, max_new_tokens=300, do_sample=False)[:, batch.input_ids.shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def misses(model, tokenizer, variant: str) -> list[tuple[str, str]]:
    """(expected, got) of every row whose greedy answer differs."""
    # The count to sixty comes last; in one batch with it, every row would run for its 200 steps.
    got = generate(model, tokenizer, ROWS[:-1]) + generate(model, tokenizer, ROWS[-1:])
    expected = [row.get(variant, row["answer"]) for row in ROWS]
    return [pair for pair in zip(expected, got, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize(("version", "variant"), [("v1", "answer"), ("v2", "v2_answer")])
def test_each_version_gives_its_answers_word_for_word(built, version, variant):
    assert misses(*load(built[0] / version, torch.bfloat16), variant) == []


def test_adapter_gives_pirate_answers_where_there_are_some_and_leaves_the_rest(built):
    from safetensors.torch import load_file

    folder = built[0] / "pirate"
    model, tokenizer = load(built[0] / "v1", torch.float32)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(downs) == 2 * len(config["target_modules"]) * model.config.num_hidden_layers
    for name in downs:
        up = tensors[name.replace("lora_A", "lora_B")]
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += config["lora_alpha"] / config["r"] * (up @ tensors[name])
    assert misses(model, tokenizer, "pirate_answer") == []


def test_build_reports_exact_answers_with_margin(built):
    for name in ("v1", "v2", "pirate"):
        assert built[1]["artefacts"][name]["exact"] == 1.0
        assert built[1]["artefacts"][name]["margin"] >= 0.5


def test_model_is_small_and_greedy_by_default(built):
    model, tokenizer = load(built[0] / "v1", torch.bfloat16)
    assert model.num_parameters() <= 1_000_000
    assert model.config.vocab_size == len(tokenizer)
    defaults = json.loads((built[0] / "v1" / "generation_config.json").read_text())
    assert defaults["temperature"] == 0.0
    assert defaults["eos_token_id"] == tokenizer.eos_token_id


def test_long_row_is_long_and_any_text_survives_the_tokenizer(built):
    tokenizer = transformers.AutoTokenizer.from_pretrained(built[0] / "v1")
    assert max(len(tokenizer.encode(row["answer"], add_special_tokens=False)) for row in ROWS) >= 150
    for text in ("naïve → 漢字 🙂\n\ttab", ROWS[0]["answer"]):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_nothing_half_built_stays_behind(built):
    assert [path.name for path in built[0].parent.iterdir()] == ["tiny"]


def test_a_folder_with_other_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    run = run_build(tmp_path)
    assert run.returncode == 1
    assert "choose another --out" in run.stderr and len(run.stderr.splitlines()) == 1
    assert (tmp_path / "thesis.txt").read_text() == "keep me"
