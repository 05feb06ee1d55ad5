"""A Llama of any size with random weights and a tokenizer of its own, made in a minute without any download.

Speed and memory of a model depend on its shape, not on what it says: this stands in for Llama-3.1-8B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHAT = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the defaults are Llama-3.1-8B's (16 GB in bf16)."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    ffn: int = 14336
    vocab: int = 128256
    context: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def make(folder: Path, shape: Shape, *, weights: bool = True) -> Path:
    """Write config, tokenizer and, with `weights`, one safetensors shard per layer; returns `folder`. Without weights
    the engine needs `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, shape)
    _write_tokenizer(folder, shape)
    if weights:
        _write_weights(folder, shape)
    return folder


def _write_config(folder: Path, shape: Shape) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": shape.vocab - 2,
        "eos_token_id": shape.vocab - 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """Byte-level without merges: a prompt has one token per byte. Every id decodes to some text, since a model of
    random weights picks any of them, and a token without text would look like a first token that never came."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{i}" for i in range(len(letters), shape.vocab - 2)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _write_weights(folder: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(7)
    index: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(shape)):
        name = f"model-{number:05d}.safetensors"
        made = {}
        for key, size in tensors.items():
            tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
            made[key] = (tensor.fill_(1.0) if len(size) == 1 else tensor.normal_(0, 0.02, generator=generator)).cpu()
            total += tensor.numel() * 2
        save_file(made, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(made, name)
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensor names and sizes, one dictionary per file."""
    h, kv = shape.hidden, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        yield {
            f"{p}input_layernorm.weight": (h,),
            f"{p}post_attention_layernorm.weight": (h,),
            f"{p}self_attn.q_proj.weight": (h, h),
            f"{p}self_attn.k_proj.weight": (kv, h),
            f"{p}self_attn.v_proj.weight": (kv, h),
            f"{p}self_attn.o_proj.weight": (h, h),
            f"{p}mlp.gate_proj.weight": (shape.ffn, h),
            f"{p}mlp.up_proj.weight": (shape.ffn, h),
            f"{p}mlp.down_proj.weight": (h, shape.ffn),
        }
    yield {
        "model.embed_tokens.weight": (shape.vocab, h),
        "lm_head.weight": (shape.vocab, h),
        "model.norm.weight": (h,),
    }
