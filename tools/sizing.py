"""The tables of docs/sizing.md: what a model weighs, what a token of its context takes, and which GPUs hold both.

`python -m tools.sizing` rewrites the tables in place. Standard library only.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sizing.md"
GIB = 2**30

# What nvidia-smi reports: 81559 MiB (H100 SXM 80 GB) and 143771 MiB (H200 SXM 141 GB).
GPUS_MIB = {"H100": 81559, "H200": 143771}
UTILISATION = 0.92  # vLLM's --gpu-memory-utilization
OVERHEAD_GIB = 4.0  # per GPU: activations, CUDA graphs, NCCL; vLLM measures it at start
SMALLEST_KV_TOKENS = 65_536  # fewer are not worth a GPU: four contexts of 16k
COUNTS = (1, 2, 4, 8)

BYTES = {"bf16": 2.0, "fp8": 1.0, "mxfp4": 4.25 / 8}  # mxfp4: 4 bits and an 8-bit scale for each 32 values


@dataclass(frozen=True)
class Model:
    """Shape of a model, from its config.json. `latent` is MLA's width per layer and token (kv_lora_rank + qk_rope_head_dim)."""

    name: str
    params_b: float
    layers: int
    kv_heads: int
    head_dim: int
    precisions: tuple[str, ...]
    latent: int = 0

    def weights_bytes(self, precision: str) -> float:
        return self.params_b * 1e9 * BYTES[precision]

    def kv_bytes_per_token(self, kv_bytes: int = 2) -> int:
        """Of the whole model: a key and a value for each layer and KV head; with MLA one latent vector for each layer."""
        if self.latent:
            return self.layers * self.latent * kv_bytes
        return 2 * self.layers * self.kv_heads * self.head_dim * kv_bytes

    def kv_bytes_per_gpu(self, gpus: int) -> float:
        """Tensor parallelism divides KV heads while there are enough; a latent vector is on every GPU whole."""
        whole = self.kv_bytes_per_token()
        return whole if self.latent else whole / min(gpus, self.kv_heads)

    def kv_tokens(self, precision: str, accelerator: str, gpus: int) -> int:
        """Tokens of context that fit beside the weights on so many GPUs; 0 or less when the weights do not fit."""
        usable = GPUS_MIB[accelerator] * 2**20 * UTILISATION - OVERHEAD_GIB * GIB
        return math.floor((usable - self.weights_bytes(precision) / gpus) / self.kv_bytes_per_gpu(gpus))

    def smallest(self, precision: str, accelerator: str) -> tuple[int, int] | None:
        """(GPUs, tokens) of the smallest count that holds SMALLEST_KV_TOKENS; None when eight do not."""
        for gpus in COUNTS:
            tokens = self.kv_tokens(precision, accelerator, gpus)
            if tokens >= SMALLEST_KV_TOKENS:
                return gpus, tokens
        return None


MODELS = (
    Model("Llama-3.1-8B", 8.03, 32, 8, 128, ("bf16", "fp8")),
    Model("Qwen3-32B", 32.8, 64, 8, 128, ("bf16", "fp8")),
    Model("Llama-3.3-70B", 70.6, 80, 8, 128, ("bf16", "fp8")),
    Model("gpt-oss-120b", 117.0, 36, 8, 64, ("mxfp4",)),
    Model("Qwen3-235B-A22B", 235.0, 94, 4, 128, ("bf16", "fp8")),
    Model("DeepSeek-V3.1", 671.0, 61, 1, 0, ("fp8",), latent=512 + 64),
)


def table() -> str:
    rows = ["| model | precision | weights | KV per token | H100 80 GB | H200 141 GB |", "|---|---|---|---|---|---|"]
    for model in MODELS:
        for precision in model.precisions:
            weights = f"{model.weights_bytes(precision) / 1e9:.0f} GB"
            kv = f"{model.kv_bytes_per_token() / 1024:.0f} KiB"
            fits = [_fits(model, precision, accelerator) for accelerator in GPUS_MIB]
            rows.append(f"| {model.name} | {precision} | {weights} | {kv} | {fits[0]} | {fits[1]} |")
    return "\n".join(rows)


def _fits(model: Model, precision: str, accelerator: str) -> str:
    found = model.smallest(precision, accelerator)
    if found is None:
        return "more than 8"
    gpus, tokens = found
    return f"{gpus} GPU{'s' if gpus > 1 else ''}, {tokens // 1000}k tokens"


def page(text: str) -> str:
    """The page with its table made again."""
    before, rest = text.split("<!-- table -->\n")
    _, after = rest.split("<!-- /table -->")
    return f"{before}<!-- table -->\n{table()}\n<!-- /table -->{after}"


def main() -> int:
    text = PAGE.read_text()
    PAGE.write_text(page(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
