"""A LoRA adapter in PEFT's file format, without PEFT: what the tiny model needs of it and no more.

After "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021): y = W x + (alpha / rank) B A x.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

RANK = 8
ALPHA = 16
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEY_PREFIX = "base_model.model."


class LowRank(nn.Module):
    """A frozen linear layer plus its adapter: A is [RANK, in], B is [out, RANK] and starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        like = {"bias": False, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, RANK, **like)
        self.lora_B = nn.Linear(RANK, base.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x)) * (ALPHA / RANK)


def adapted(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of `model`, frozen but for a fresh LowRank in place of every layer of MODULES."""
    copied = copy.deepcopy(model).requires_grad_(False)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if name in MODULES:
                setattr(module, name, LowRank(child))
    return copied


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the adapter of `adapted(...)` in bf16: a config and a safetensors file with PEFT's key names."""
    folder.mkdir()
    tensors = {
        KEY_PREFIX + name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../v1",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": MODULES,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(base: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """`adapted(base)` with the adapter of `folder`; a key that does not belong there raises."""
    model = adapted(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    model.load_state_dict(model.state_dict() | {k.removeprefix(KEY_PREFIX): v for k, v in tensors.items()})
    return model
