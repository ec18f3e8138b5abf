"""Samples → micro-batches: a token budget per row, no padding, every normaliser folded into weights once per step.

Weights are computed over all samples of the optimizer step before they are split, so the gradient does not depend on
how many micro-batches there are or in which order they come; so they are filled evenly, as the ranks that run them side by side
want it. Tokens that cannot contribute are dropped here, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace
from typing import Literal

import torch
from torch import Tensor

from trapo_kernels import Objective, Role, TokenBatch, aggregate, silenced_weight
from trapo_train.micro_batch import MicroBatch
from trapo_train.records import Sample
from trapo_train.schema import UserError, check


@dataclass(frozen=True)
class PackingConfig:
    """How the samples of one optimizer step become micro-batches and how their losses are averaged."""

    max_tokens: int = 16384
    """Token budget of one micro-batch, at least the longest prompt plus response."""
    aggregation: Literal["constant", "length", "token_mean", "role_mean", "sequence_mean", "sequence_sum", "prompt_mean"] = (
        "constant"
    )
    """Divisor of the summed loss: constant (sequences · longest response allowed), length (longest response allowed, as in
    TRAPO's release), token_mean (loss tokens), role_mean (loss tokens of the same role), sequence_mean (mean of each sequence,
    then of the sequences), sequence_sum (sequences) or prompt_mean (mean over each problem's tokens, then of the problems). Where
    token_mean, role_mean and prompt_mean count tokens, the k copies of an expert prefix, of weight 1/k each, are one; sequence_mean
    divides by the length of a sample, whose prefix weighs less where others share it. The entropy bonus counts every copy in all of
    them, as TRAPO's release does, which gives it to all response tokens alike."""
    train_on_prompt: bool = False
    """Whether the tokens of the prompt, from the second one on, count as expert tokens too, as in pretraining; with expert traces
    alone: a plan that samples nothing, and an objective without rollout term whose expert term reads no advantage. Each of
    several traces of a problem brings its prompt."""

    def __post_init__(self) -> None:
        check(self, ("max_tokens", self.max_tokens >= 1, "at least 1"))


@dataclass(frozen=True)
class _LossTokens:
    """The response tokens of all samples, one sample after the other; tensors are [R], on the host."""

    target: Tensor
    role: Tensor
    advantage: Tensor
    weight: Tensor
    entropy_weight: Tensor
    rollout_logprob: Tensor
    sample: Tensor  # which sample a token belongs to
    offset: Tensor  # its place in the response

    def select(self, rows: Tensor) -> _LossTokens:
        """The given rows [M] int64 of every tensor."""
        return _LossTokens(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def check_expert_streams(objective: Objective) -> None:
    """Raise UserError for an objective that needs more of expert tokens than an expert trace of a dataset brings."""
    if any(term.anchor == "rollout" for term in objective.expert_terms):
        raise UserError(
            f"objective {objective.name} compares expert tokens with rollout_logprob, the logprobs of the policy that sampled "
            "them, and the expert traces of a dataset have none. Use an objective whose expert tokens need none, such as luffy, "
            "or a plan without expert traces."
        )


def check_prompt_training(config: PackingConfig, objective: Objective) -> None:
    """Raise UserError for `train_on_prompt` with an objective that would weigh prompts by what was sampled after them."""
    if not config.train_on_prompt:
        return
    reader = "trains on rollouts" if objective.rollout_terms else None
    if any(term.signal == "advantage" for term in objective.expert_terms):
        reader = "weighs expert tokens by the advantage"
    if reader is not None:
        raise UserError(
            f"packing.train_on_prompt needs an objective of expert tokens alone, without advantages, got {objective.name}, which "
            f"{reader}: what a prompt is trained with would depend on its samples. Set packing.train_on_prompt=false, or use an "
            "objective such as sft."
        )


def pack(
    samples: Sequence[Sample],
    config: PackingConfig,
    objective: Objective,
    *,
    max_response_tokens: int,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Pack all samples of one optimizer step into micro-batches of at most `config.max_tokens` tokens.

    A prefix token is an EXPERT token whose weight is multiplied by `prefix_weight`, a completion token a ROLLOUT token with the
    sample's advantage. A mean over tokens counts a prefix token as `prefix_weight` tokens, so that its weights sum to 1. The
    entropy bonus counts every copy of a prefix as a token, as TRAPO's release does, where all response tokens get it alike. A role
    that the objective does not train enters no denominator, nor does a sequence or prompt that has none but its tokens, and
    carries at most the entropy bonus. Tokens whose gradient is exactly zero, such as rollouts with advantage 0,
    count in the denominators; then they are dropped, and so are samples without any token left. A masked completion is left out
    before anything is counted, as if the sample had none, and the model never reads it.

    Args:
        samples: every sample of the step, in any order.
        objective: says which roles are trained, by which signal, and whether there is an entropy bonus.
        max_response_tokens: longest response allowed, tokens; the divisor of aggregations "constant" and "length".
        ranks: how many run the micro-batches, rank r every `ranks`-th from r on.

    Returns: a multiple of `ranks` micro-batches, at least one for each, on the host. What has no loss token is an empty one, whose
        gradient is zero.
    Raises: UserError for a sample longer than the budget, an empty prompt, or expert tokens under an objective that needs the
        logprobs of whoever wrote them.
    """
    samples = [replace(s, completion_ids=(), completion_logprobs=()) if s.masked else s for s in samples]
    lengths = [_segment_length(sample, config.max_tokens) for sample in samples]
    if config.train_on_prompt:
        samples = [_with_prompt_as_prefix(sample) for sample in samples]
    if any(sample.guided for sample in samples):
        check_expert_streams(objective)
    tokens = _loss_tokens(samples, config, objective, max_response_tokens)
    tokens = tokens.select(((tokens.weight != 0) | (tokens.entropy_weight != 0)).nonzero().squeeze(1))
    counts = torch.bincount(tokens.sample, minlength=len(samples)).tolist()
    rows = torch.arange(len(tokens.sample)).split(counts)
    bins = _balanced([i for i, count in enumerate(counts) if count], lengths, config.max_tokens, ranks)
    return [
        _micro_batch([samples[i] for i in members], tokens, [rows[i] for i in members]) if members else _empty_micro_batch()
        for members in bins
    ]


def _segment_length(sample: Sample, max_tokens: int) -> int:
    """Tokens that the model reads for a sample: all but the last, which is only ever a target."""
    prompt, response = len(sample.problem.prompt_ids), len(sample.prefix_ids) + len(sample.completion_ids)
    if prompt == 0:
        raise UserError(
            f"pack: a prompt must have at least 1 token to predict from, problem {sample.problem.index} has 0. "
            "Drop the problem or give it a begin-of-sequence token."
        )
    if prompt + response > max_tokens:
        raise UserError(
            f"pack: a sample must fit into packing.max_tokens = {max_tokens} tokens, one of problem "
            f"{sample.problem.index} has {prompt + response} (prompt {prompt}, response {response}). "
            f"Set packing.max_tokens to at least {prompt + response}, or shorten rollout.max_response_tokens."
        )
    return prompt + response - 1


def _with_prompt_as_prefix(sample: Sample) -> Sample:
    first, rest = sample.problem.prompt_ids[:1], sample.problem.prompt_ids[1:]
    return replace(sample, problem=replace(sample.problem, prompt_ids=first), prefix_ids=(*rest, *sample.prefix_ids))


def _loss_tokens(samples: Sequence[Sample], config: PackingConfig, objective: Objective, max_response_tokens: int) -> _LossTokens:
    """Role, signal and weight of every response token; a sample has two parts, its prefix and its completion."""
    parts = torch.tensor([n for s in samples for n in (len(s.prefix_ids), len(s.completion_ids))], dtype=torch.int64)
    response_lengths = parts.reshape(-1, 2).sum(1)

    def spread(prefix_and_completion: Sequence[tuple], dtype: torch.dtype) -> Tensor:
        return torch.tensor(prefix_and_completion, dtype=dtype).reshape(-1).repeat_interleave(parts)

    kind = spread([(Role.EXPERT, Role.ROLLOUT)] * len(samples), torch.uint8)
    advantage = spread([(s.advantage, s.advantage) for s in samples], torch.float32)
    share = spread([(s.prefix_weight, 1.0) for s in samples], torch.float32)
    sample = torch.arange(len(samples)).repeat_interleave(response_lengths)
    prompt = torch.tensor([s.problem.index for s in samples], dtype=torch.int64).repeat_interleave(response_lengths)
    normalise = {"mode": config.aggregation, "max_tokens": max_response_tokens}

    trained = torch.zeros_like(kind, dtype=torch.bool)
    for role, terms in ((Role.EXPERT, objective.expert_terms), (Role.ROLLOUT, objective.rollout_terms)):
        if terms:
            trained |= kind == role
    trained &= share != 0
    # What is not trained is of no sequence and of no prompt, or one without a trained token would count in the denominators.
    sequence_id, prompt_id = (torch.where(trained, label, -1) for label in (sample, prompt))
    role = torch.where(trained, kind, Role.IGNORED)
    share = _in_its_mean(share, role, prompt, config.aggregation)
    weight = aggregate(role, sequence_id, share=share, prompt_id=prompt_id, **normalise)
    entropy_weight = torch.zeros_like(weight)
    if objective.has_entropy_bonus:
        # One bonus for all response tokens: expert and rollout tokens share its denominator.
        entropy_weight = aggregate(torch.full_like(kind, Role.ROLLOUT), sample, prompt_id=prompt, **normalise)
    return _LossTokens(
        target=torch.tensor([t for s in samples for t in (*s.prefix_ids, *s.completion_ids)], dtype=torch.int64),
        role=kind,
        advantage=advantage,
        weight=silenced_weight(kind, weight, advantage, objective),  # after the denominators, in which all tokens count
        entropy_weight=entropy_weight,
        rollout_logprob=torch.tensor(
            [x for s in samples for x in (*(0.0,) * len(s.prefix_ids), *s.completion_logprobs)], dtype=torch.float32
        ),
        sample=sample,
        offset=torch.cat([torch.arange(n) for n in response_lengths.tolist()] or [sample]),
    )


def _in_its_mean(share: Tensor, role: Tensor, prompt: Tensor, aggregation: str) -> Tensor:
    """`share` [R] over its mean among the tokens that a token is averaged with, where `aggregation` averages tokens, fp64.

    `aggregate` divides by the number of tokens, every copy included; over the sum of shares instead, k copies of weight 1/k count
    as the one token that they are, and the weights of a mean sum to 1.
    """
    averaged = {"token_mean": torch.zeros_like(prompt), "role_mean": role, "prompt_mean": prompt}.get(aggregation)
    if averaged is None:
        return share
    trained = role != Role.IGNORED
    _, mean = averaged.unique(return_inverse=True)
    # In fp64 the sum of fp32 shares is exact, so that the order of samples does not show.
    counts, sums = (torch.bincount(mean, torch.where(trained, x, 0.0).double()) for x in (torch.ones_like(share), share))
    return torch.where(trained, share * (counts / sums)[mean], 0.0)


def _balanced(members: list[int], lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[int]]:
    """As few bins as first fit needs, rounded up to a multiple of `ranks`; those side by side hold about equally many tokens.

    The ranks wait for each other in every layer, so a micro-batch takes as long as the longest beside it.
    """
    fitted = _first_fit_decreasing(members, lengths, max_tokens)
    count = -(-max(len(fitted), 1) // ranks) * ranks
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens = [(0, b) for b in range(count)]  # a heap: the lightest bin is on top, of equal ones the first
    for i in sorted(members, key=lambda i: -lengths[i]):
        load, lightest = tokens[0]
        bins[lightest].append(i)
        heapreplace(tokens, (load + lengths[i], lightest))
    if max(tokens)[0] > max_tokens:  # nearly full: first fit is about even then, and needs no further round
        bins = fitted + [[] for _ in range(count - len(fitted))]
    return sorted(bins, key=lambda members: -sum(lengths[i] for i in members))


def _first_fit_decreasing(members: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of at most `max_tokens`, longest first; equal lengths become neighbours, as packed attention wants."""
    bins: list[list[int]] = [[] for _ in members]
    leaves = 1 << (len(bins) - 1).bit_length()
    # A binary tree, the children of node n at 2n and 2n + 1, its leaves the bins: the most room in a bin below each node. From the
    # root to the left wherever there is room leads to the first bin that has it, and one never used has room for any sample.
    room = [max_tokens] * (2 * leaves)
    for i in sorted(members, key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        bins[node - leaves].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [members for members in bins if members]


def _micro_batch(samples: Sequence[Sample], tokens: _LossTokens, rows: Sequence[Tensor]) -> MicroBatch:
    input_ids, lengths, first_positions = [], [], []
    for sample in samples:
        # The position before the first response token scores it: the last token of the prompt.
        first_positions.append(len(input_ids) + len(sample.problem.prompt_ids) - 1)
        segment = (*sample.problem.prompt_ids, *sample.prefix_ids, *sample.completion_ids)[:-1]
        input_ids.extend(segment)
        lengths.append(len(segment))
    chosen = tokens.select(torch.cat(list(rows)))
    counts = torch.tensor([len(row) for row in rows])
    return MicroBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        segment_lengths=tuple(lengths),
        loss_positions=torch.tensor(first_positions).repeat_interleave(counts) + chosen.offset,
        batch=TokenBatch(
            target=chosen.target,
            role=chosen.role,
            advantage=chosen.advantage,
            weight=chosen.weight,
            entropy_weight=chosen.entropy_weight,
            rollout_logprob=chosen.rollout_logprob,
            sequence_id=chosen.sample,
        ),
    )


def _empty_micro_batch() -> MicroBatch:
    """One token in no loss: it runs forward and backward like any other and adds exactly nothing."""
    nothing = torch.zeros(1)
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        segment_lengths=(1,),
        loss_positions=torch.zeros(1, dtype=torch.int64),
        batch=TokenBatch(
            target=torch.zeros(1, dtype=torch.int64),
            role=torch.full((1,), Role.IGNORED, dtype=torch.uint8),
            advantage=nothing,
            weight=nothing,
            entropy_weight=nothing,
            rollout_logprob=nothing,
            sequence_id=torch.zeros(1, dtype=torch.int64),
        ),
    )
