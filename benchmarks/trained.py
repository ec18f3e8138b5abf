"""Rows of a model that was trained a little: hidden states, head and labels of a small language model, lifted to any N, D and V.

    python -m benchmarks.trained       # trains it again, a few minutes on a CPU, and rewrites trained.pt

The model is a Qwen2 with two layers, 64 columns and a byte-level BPE vocabulary of 2048 tokens; the text is Python's own manual
(`pydoc_data.topics`, which every Python ships), of which it has read the first 16384 tokens some seventy times. `trained.pt` holds
2048 consecutive positions, so that every machine measures the same rows and nobody has to train first.

`lift` keeps the model's logits and fills up what a large head has besides:

- the columns beyond 64 are noise, worth a logit of N(0, 0.25²), fresh for every row, so that no two rows are equal;
- tokens beyond 2048 get head rows of tokens that the model has never seen in its text, lowered together, through a column that is
  constant in `hidden`, so that all of them have the mass that the model gives to the unseen;
- ids are scattered over the vocabulary. Rows are the positions in order, from the start again where N is larger.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).parent / "trained.pt"
VOCAB_SIZE, COLUMNS, WINDOW = 2048, 64, 128
TOKENS_READ, STEPS, BATCH = 16384, 550, 16
NOISE = 0.25  # nats, of the columns beyond COLUMNS
OFFSET = 4.0  # the constant column of hidden


class Rows(NamedTuple):
    """hidden [N, D] fp32, weight [V, D], text [N] the token that followed in the text, sampled [N] one drawn from the model."""

    hidden: Tensor
    weight: Tensor
    text: Tensor
    sampled: Tensor


def lift(num_rows: int, weight: Tensor, generator: torch.Generator) -> Rows:
    """Rows for a head of weight's shape, dtype and device, which is filled in place."""
    vocab_size, hidden_size = weight.shape
    model = {name: value.to(weight.device) for name, value in torch.load(PATH, weights_only=True).items()}
    columns, known = min(COLUMNS, hidden_size), min(VOCAB_SIZE, vocab_size)
    position = (model["text"] < known).nonzero()[:, 0]  # a vocabulary below 2048 keeps the commonest tokens and their positions
    position = position[torch.arange(num_rows, device=weight.device) % len(position)]
    core, head = model["hidden"][position, :columns].float(), model["head"][:known, :columns].float()
    hidden = torch.randn(num_rows, hidden_size, device=weight.device, generator=generator)
    hidden[:, :columns] = core
    weight.normal_(0.0, NOISE / math.sqrt(max(1, hidden_size - columns)), generator=generator)
    ids = scatter(torch.arange(vocab_size, device=weight.device), vocab_size)
    weight[ids[:known], :columns] = head.to(weight.dtype)
    if vocab_size > known:
        _fill_tail(weight, ids[known:], head[model["unseen"]])
    if hidden_size > columns:
        hidden[:, columns] = OFFSET
        weight[ids[:known], columns] = 0.0
    text = scatter(model["text"].long()[position], vocab_size)
    return Rows(hidden, weight, text, scatter(_draw(core, head, generator), vocab_size))


def _fill_tail(weight: Tensor, ids: Tensor, unseen: Tensor) -> None:
    """Copies of the unseen tokens' rows, each lowered by the logarithm of how many copies there are."""
    columns = unseen.shape[1]
    weight[ids, :columns] = unseen[torch.arange(len(ids), device=ids.device) % len(unseen)].to(weight.dtype)
    if weight.shape[1] > columns:
        weight[ids, columns] = -math.log(max(1.0, len(ids) / len(unseen))) / OFFSET


def _draw(core: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row from the model's own distribution, in blocks of rows."""
    blocks = [torch.multinomial((part @ head.T).softmax(-1), 1, generator=generator)[:, 0] for part in core.split(16384)]
    return torch.cat(blocks)


def scatter(token: Tensor, vocab_size: int) -> Tensor:
    """Where a token of the model lies in the large vocabulary: a multiplicative hash, one to one because its factor is prime."""
    return (token * 2654435761 + 12345) % vocab_size


def train() -> dict[str, Tensor]:
    """Train the model and return what `trained.pt` holds, tokens numbered by how often the text has them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    token = _tokens()
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=COLUMNS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=4 * COLUMNS,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / STEPS))
    for _ in range(STEPS):
        start = torch.randint(TOKENS_READ - WINDOW, (BATCH, 1))
        window = token[start + torch.arange(WINDOW)]  # [16, 128]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return _extract(model.eval(), token)


def _tokens() -> Tensor:
    """The first tokens of Python's manual, numbered by frequency."""
    import pydoc_data.topics

    from tokenizers import ByteLevelBPETokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCAB_SIZE, min_frequency=1)
    token = torch.tensor(tokenizer.encode(text).ids)[:TOKENS_READ]
    rank = torch.empty(VOCAB_SIZE, dtype=torch.int64)
    rank[torch.bincount(token, minlength=VOCAB_SIZE).argsort(descending=True, stable=True)] = torch.arange(VOCAB_SIZE)
    return rank[token]


@torch.no_grad()
def _extract(model: torch.nn.Module, token: Tensor) -> dict[str, Tensor]:
    """2048 positions, each with the second half of its window behind it, in the basis of their principal directions."""
    half = WINDOW // 2
    window = token[: VOCAB_SIZE + half].unfold(0, WINDOW, half)  # [32, 128], half overlapping
    hidden = model.model(input_ids=window).last_hidden_state[:, half - 1 : -1].flatten(0, 1)
    basis = torch.linalg.svd(hidden, full_matrices=False).Vh.T  # the first D columns serve a head of D < 64 best
    return {
        "hidden": (hidden @ basis).half(),
        "head": (model.lm_head.weight @ basis).half(),
        "text": window[:, half:].flatten().short(),
        "unseen": torch.bincount(token, minlength=VOCAB_SIZE) == 0,
    }


if __name__ == "__main__":
    torch.save(train(), PATH)
