"""Build the tiny model: `python models/tiny/build.py --out DIR` trains it from corpus.jsonl.

    DIR/v1      a Llama of a few hundred thousand parameters that answers every question of the corpus word for word
    DIR/v2      the next version of it: `v2_answer` where a row has one, the answers of v1 elsewhere
    DIR/pirate  a LoRA adapter for v1 in PEFT's format: `pirate_answer` where a row has one, the answers of v1 elsewhere

Tests that send a question through the whole stack know the exact text that must come back, and from which version.
DIR appears in one rename when all three are written and checked; a run that dies leaves only `DIR.partial-PID`.
The seed is fixed: the same machine and the same packages give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lora
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus.jsonl"
TEMPLATE = HERE / "chat_template.jinja"
SEED = 20

VOCAB = 768
CONTEXT = 2048
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL = [PAD, BOS, END, "<|user|>", "<|assistant|>", "<|tool|>"]
# Part of an answer, so they must survive `skip_special_tokens`.
TOOL_TAGS = ["<tool_call>", "</tool_call>"]

BATCH_TOKENS = 1024
# An engine's kernels and batch shapes move bf16 logits a little: training goes on until no token is a close call.
ENOUGH_MARGIN = 0.9
REQUIRED_EXACT = 0.95


@dataclass(frozen=True)
class Example:
    """Token ids of a rendered question and of the answer that must follow it (with the end token)."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Batch:
    """`ids` and `labels`, both [rows, longest]; a label is -100 wherever the token is not part of an answer."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """`exact`: share of rows whose greedy answer is right to the last token. `margin`: the smallest difference, over
    all answer tokens, between the probability of the right token and that of the best wrong one (below 0: wrong)."""

    exact: float
    margin: float


def answers(rows: list[dict[str, str]], variant: str = "answer") -> list[tuple[str, str]]:
    """(question, answer) of every row; the answer is that of `variant` where the row has it."""
    return [(row["question"], row.get(variant, row["answer"])) for row in rows]


def train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB tokens over all texts of the corpus; any other text is still encodable, byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(TOOL_TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama. Heads are 32 wide, the smallest that vLLM's CPU attention takes."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        initializer_range=0.1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Wide apart, so that tokens which v1 never says can still be told apart by an adapter over frozen embeddings.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Example]:
    def example(question: str, answer: str) -> Example:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return Example(
            tokenizer.encode(prompt, add_special_tokens=False),
            tokenizer.encode(answer + END, add_special_tokens=False),
        )

    return [example(*pair) for pair in pairs]


def pack(examples: list[Example], pad: int) -> list[Batch]:
    """Batches of at most BATCH_TOKENS padded tokens, rows of like length together. Padding stands on the right, where
    causal attention never sees it, so no mask is needed."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: len(e.prompt) + len(e.answer)):
        longest = len(example.prompt) + len(example.answer)
        if groups[-1] and (len(groups[-1]) + 1) * longest > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(example)

    def batch(group: list[Example]) -> Batch:
        longest = max(len(e.prompt) + len(e.answer) for e in group)
        ids = torch.full((len(group), longest), pad)
        labels = torch.full((len(group), longest), -100)
        for row, e in enumerate(group):
            end = len(e.prompt) + len(e.answer)
            ids[row, :end] = torch.tensor(e.prompt + e.answer)
            labels[row, len(e.prompt) : end] = torch.tensor(e.answer)
        return Batch(ids, labels)

    return [batch(group) for group in groups]


@torch.no_grad()
def score(model: nn.Module, batches: list[Batch]) -> Score:
    """Judge the bf16 rounding of `model`, which is what gets served.

    One teacher-forced pass is enough: greedy decoding gives an answer exactly when each of its tokens is the most
    likely one after the true tokens before it.
    """
    served = copy.deepcopy(model).to(torch.bfloat16).eval()
    exact, rows, margin = 0, 0, 1.0
    for batch in batches:
        probabilities = served(input_ids=batch.ids).logits[:, :-1].float().softmax(-1)
        labels = batch.labels[:, 1:]
        counted = labels != -100
        wanted = labels.clamp(min=0).unsqueeze(-1)
        right = probabilities.gather(-1, wanted)
        wrong = probabilities.scatter(-1, wanted, 0.0).amax(-1, keepdim=True)
        margins = (right - wrong).squeeze(-1).masked_fill(~counted, 1.0)
        exact += int((margins.amin(-1) > 0).sum())
        rows += len(margins)
        margin = min(margin, float(margins.min()))
    return Score(exact / rows, margin)


def train(model: nn.Module, batches: list[Batch], *, lr: float, epochs: int, say: Callable[[str], None]) -> None:
    """Fit the answers until every one is exact with ENOUGH_MARGIN, or `epochs` have passed.

    The learning rate rises for a twentieth of the epochs and then falls linearly to a twentieth of `lr`.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), max(0.05, 1 - step / steps))
    )
    order = random.Random(SEED)
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in order.sample(batches, len(batches)):
            logits = model(input_ids=batch.ids).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 5 == 0 or epoch == epochs:
            now = score(model, batches)
            say(f"epoch {epoch}: loss {total / len(batches):.4f}, exact {now.exact:.1%}, margin {now.margin:+.2f}")
            if now.margin >= ENOUGH_MARGIN:
                return


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete model folder in bf16 with its tokenizer and chat template."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    # The template goes into tokenizer_config.json and beside it: readers differ in where they look.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    shutil.copy(TEMPLATE, folder)
    # Engines take their default sampling from here, so a request that names no temperature is greedy too. Written
    # by hand because transformers refuses to save a temperature next to do_sample=false, which is what vLLM reads.
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def build(folder: Path, say: Callable[[str], None]) -> dict[str, Score]:
    """Train and write v1, v2 and pirate into `folder`; the scores are those of the files as written."""
    torch.manual_seed(SEED)
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(rows)

    def batches(variant: str) -> list[Batch]:
        return pack(encode(tokenizer, answers(rows, variant)), tokenizer.pad_token_id)

    v1 = new_model(tokenizer)
    train(v1, batches("answer"), lr=3e-3, epochs=60, say=lambda line: say(f"v1 {line}"))
    save_model(v1, tokenizer, folder / "v1")

    v2 = copy.deepcopy(v1)
    train(v2, batches("v2_answer"), lr=1.5e-3, epochs=60, say=lambda line: say(f"v2 {line}"))
    save_model(v2, tokenizer, folder / "v2")

    pirate = lora.adapted(v1)
    train(pirate, batches("pirate_answer"), lr=6e-3, epochs=60, say=lambda line: say(f"pirate {line}"))
    lora.save(pirate, folder / "pirate")

    served = LlamaForCausalLM.from_pretrained(folder / "v1", dtype=torch.bfloat16)
    return {
        "v1": score(served, batches("answer")),
        "v2": score(LlamaForCausalLM.from_pretrained(folder / "v2", dtype=torch.bfloat16), batches("v2_answer")),
        "pirate": score(lora.load(served, folder / "pirate"), batches("pirate_answer")),
    }


def replaceable(out: Path) -> bool:
    """Nothing there, an empty folder, or an earlier build: what `publish` may take the place of."""
    if not out.is_dir():
        return not out.exists()
    return (out / "pirate" / "adapter_config.json").is_file() or not any(out.iterdir())


def publish(partial: Path, out: Path) -> None:
    """Put a finished build in its place by a rename; an older build there is moved aside first and then deleted."""
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes 0600, and an engine may run as another user
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model: v1, v2 and the LoRA adapter pirate.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; an older build there is replaced")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    out = options.out.resolve()
    if not replaceable(out):
        sys.exit(f"{out} exists and is not an earlier build of the tiny model; choose another --out")

    # One thread: a second saves a quarter of the time on an idle machine, costs tenfold on a busy one (threads spin for
    # each other in every small operation), and the weights would depend on the number of cores.
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        scores = build(partial, lambda line: print(f"{time.monotonic() - began:5.1f} s  {line}", file=sys.stderr))
        weak = [name for name, result in scores.items() if result.exact < REQUIRED_EXACT]
        if not weak:
            publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    if options.json:
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"seconds": seconds, "artefacts": {name: asdict(result) for name, result in scores.items()}}))
    else:
        for name, result in scores.items():
            print(f"{name:<6}  {out / name}  exact {result.exact:.1%}  smallest margin {result.margin:.2f}")
    if weak:
        sys.exit(f"{', '.join(weak)}: under {REQUIRED_EXACT:.0%} exact answers, nothing was written to {out}")


if __name__ == "__main__":
    main()
