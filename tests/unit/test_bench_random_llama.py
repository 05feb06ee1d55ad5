"""The stand-in for an 8B model has the real one's shape, and every token of it has text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.random_llama import Shape, make

SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=600, context=512)


def test_the_default_shape_weighs_what_an_8b_does() -> None:
    from bench.random_llama import _shards

    sizes = [size for shard in _shards(Shape()) for size in shard.values()]
    parameters = sum(size[0] * (size[1] if len(size) == 2 else 1) for size in sizes)
    assert parameters == 8_030_261_248  # meta-llama/Llama-3.1-8B


def test_every_id_decodes_to_text_and_text_comes_back(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    make(tmp_path, SMALL, weights=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SMALL.vocab
    assert tokenizer.encode("grüße").ids and tokenizer.decode(tokenizer.encode("grüße").ids) == "grüße"
    assert all(tokenizer.decode([i]) for i in range(SMALL.vocab - 2))


@pytest.mark.slow
def test_transformers_loads_it_and_renders_a_chat(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    make(tmp_path, SMALL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin|>user: hi\nassistant: "
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
