"""The sizing page's arithmetic, against figures worked out by hand, and against the page."""

from __future__ import annotations

import pytest

from tools import sizing

MODELS = {m.name: m for m in sizing.MODELS}


@pytest.mark.parametrize(
    ("name", "precision", "weights_gb", "kv_bytes"),
    [
        ("Llama-3.1-8B", "bf16", 16.06, 2 * 32 * 8 * 128 * 2),  # 128 KiB
        ("Llama-3.3-70B", "fp8", 70.6, 327_680),  # 320 KiB
        ("DeepSeek-V3.1", "fp8", 671.0, 61 * 576 * 2),
    ],
)
def test_weights_and_kv_are_what_the_formulas_say(name: str, precision: str, weights_gb: float, kv_bytes: int) -> None:
    model = MODELS[name]
    assert model.weights_bytes(precision) / 1e9 == pytest.approx(weights_gb)
    assert model.kv_bytes_per_token() == kv_bytes


def test_tokens_are_the_room_that_weights_leave() -> None:
    """Llama-3.1-8B, one H100: 81559 MiB x 0.92 - 4 GiB - 16.06 GB = 58.3 GB; at 128 KiB a token about 445 thousand."""
    assert MODELS["Llama-3.1-8B"].kv_tokens("bf16", "H100", 1) == pytest.approx(445_000, rel=0.01)
    assert MODELS["Llama-3.3-70B"].kv_tokens("bf16", "H100", 1) < 0


def test_kv_heads_divide_only_while_there_are_enough() -> None:
    four_heads = MODELS["Qwen3-235B-A22B"]
    assert four_heads.kv_bytes_per_gpu(8) == four_heads.kv_bytes_per_gpu(4) == four_heads.kv_bytes_per_token() / 4
    latent = MODELS["DeepSeek-V3.1"]
    assert latent.kv_bytes_per_gpu(8) == latent.kv_bytes_per_token()


def test_what_one_gpu_fewer_could_not_hold_is_the_smallest() -> None:
    for model in sizing.MODELS:
        for precision in model.precisions:
            for accelerator in sizing.GPUS_MIB:
                found = model.smallest(precision, accelerator)
                smaller = [n for n in sizing.COUNTS if found is None or n < found[0]]
                assert all(model.kv_tokens(precision, accelerator, n) < sizing.SMALLEST_KV_TOKENS for n in smaller)


def test_the_page_shows_these_tables() -> None:
    text = sizing.PAGE.read_text()
    assert sizing.page(text) == text, "run `python -m tools.sizing`"
    for fact in ("81,559", "143,771", f"{sizing.UTILISATION}", "4 GiB", "65,536"):
        assert fact in text, f"{fact} is stated where the reader sees it"
