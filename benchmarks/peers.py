"""Peers from other packages, as their users call them; a name says which of a package's ways ran."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.adapters import Call, Contender, finish, from_logprob, mean_or_each, needs, nothing_wrong, without_entropy
from benchmarks.problem import EPSILON, Case, Problem, Result
from trapo_kernels import IGNORE_INDEX

TRL = "TRL chunked logprob"
TRL_TILE = 32768  # vocabulary columns, TRL's own setting: _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py (1.16.0)
LIGER_ROWS = 4096  # of a chunk, as ours and quack's have
_ONE_SUM = "gives one summed loss: a per-token policy loss cannot follow it."
_SCALED, _SM90 = "liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger_kernel.ops.cutedsl.ops.{}_sm90"

# Liger


def _liger(accum_dtype: torch.dtype | None) -> Callable[[Problem], Call]:
    def loss(p: Problem, reduction: str) -> Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=accum_dtype)(p.weight, p.hidden, p.target)

    return mean_or_each(loss)


def chunk_mem_const(rows: int, hidden_size: int, vocab_size: int) -> int:
    """The least `chunk_mem_const` that gives FLCE chunks of LIGER_ROWS rows or more, or one of all rows."""
    return -(-vocab_size // (hidden_size * max(1, rows // LIGER_ROWS)))


def _liger_large_chunks(p: Problem, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    const = chunk_mem_const(*p.hidden.shape, p.weight.shape[0])
    return liger_fused_linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction, chunk_mem_const=const)


def _liger_sm90(problem: Problem) -> Call:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda: finish(problem, liger_fused_linear_cross_entropy_sm90(problem.hidden, problem.weight, problem.target))


def _sm90_cannot(case: Case) -> str | None:
    if case.dtype != "bfloat16":
        return "needs bfloat16."
    if case.num_rows % 128 or case.vocab_size % 256:
        return "needs N divisible by 128 and V by 256."
    return without_entropy(("sft",), _ONE_SUM)(case)


def _liger_scaled(implementation: str) -> Callable[[Problem], Call]:
    """Liger picks the implementation by device; RuntimeError where that is not the one that the contender is named for."""

    def prepare(problem: Problem) -> Call:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as scaled

        found = scaled._resolve_implementation(problem.hidden.device).__name__
        if found != implementation:
            raise RuntimeError(f"Liger runs {found} here, not {implementation}.")
        os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # that check waits for the GPU in every call
        function = scaled.LigerFusedLinearScaledCrossEntropyFunction.apply

        def statistics(p: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
            # temperature, ignore_index, m_tiles_per_cluster, return_entropy
            out = function(p.hidden, p.weight, p.target, 1.0, IGNORE_INDEX, 1, with_entropy)
            nll, entropy = out if with_entropy else (out, None)
            return -nll, entropy

        return from_logprob(statistics)(problem)

    return prepare


def _on_hopper(module: str) -> Callable[[torch.device], str | None]:
    def absent(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels need a CUDA device."
        return needs(module, gpu=True)(device) if _is_hopper(device) else "its kernels are for sm_90 GPUs."

    return absent


def _elsewhere(device: torch.device) -> str | None:
    return "on sm_90 Liger has no fallback." if _is_hopper(device) else needs(_SCALED, gpu=False)(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _liger_grpo(problem: Problem) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = problem.sequence_length
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=problem.hidden.is_cuda, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="bnpo"
    )
    batch, shape = problem.batch, (-1, length)

    def call() -> Result:
        loss = fused(
            problem.hidden.view(*shape, problem.hidden.shape[1]),
            problem.weight,
            batch.target.view(shape),
            batch.active.view(shape).float(),
            batch.advantage.view(shape)[:, 0],
            old_per_token_logps=batch.old_logprob.view(shape),
        )[0]
        return finish(problem, loss)

    return call


def _grpo_only(case: Case) -> str | None:
    if case.job == "trapo":
        return "has one loss for all tokens and no entropy gradient."
    if case.job != "grpo":
        return "computes the GRPO loss only."
    length = case.sequence_length or max(1, case.num_rows // 8)
    return f"needs sequences of one length; {case.num_rows} rows are no multiple of {length}." if case.num_rows % length else None


# Others


def _cut_cross_entropy(p: Problem, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.target, reduction=reduction)


def _cce_cannot(case: Case) -> str | None:
    if case.dtype == "float32":
        return "its backward needs bfloat16 or float16."
    return without_entropy(("sft", "grpo"))(case)


def _trl(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """As TRL's fused head calls it: where Triton runs on the rows that have a target alone, elsewhere on all."""
    from trl.kernels import chunked_logprob

    hidden, target, outputs = problem.hidden, problem.target, ("entropy",) if with_entropy else ()
    mask = target != IGNORE_INDEX
    compact = chunked_logprob._use_triton(hidden.device)
    hidden, target = (hidden[mask], target[mask]) if compact else (hidden, target.clamp(min=0))
    settings = (1.0, TRL_TILE, None, 1.0, outputs)  # temperature, columns, softcap, scale
    found = chunked_logprob.ChunkedLogProbFunction.apply(hidden, problem.weight, None, target, *settings)[:2]
    if compact:
        return tuple(None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
    return tuple(None if x is None else x.masked_fill(~mask, 0) for x in found)


def _trl_on_logits(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    from trl.kernels import selective_log_softmax_and_entropy

    logits, mask = problem.hidden @ problem.weight.t(), problem.target != IGNORE_INDEX
    logprob, entropy = selective_log_softmax_and_entropy(logits, problem.target.clamp(min=0), row_mask=mask)
    return logprob, entropy if with_entropy else None


def _quack(problem: Problem) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: finish(problem, chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.target))


def _quack_cannot(case: Case) -> str | None:
    if case.num_rows % 8 or case.vocab_size % 8:
        return "needs N and V divisible by 8."
    return without_entropy(("sft",), _ONE_SUM)(case)


def _verl(problem: Problem, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(problem.hidden, problem.weight, problem.target.clamp(min=0), 1.0, "none")


def _verl_cannot(case: Case) -> str | None:
    return f"needs D divisible by 128, got {case.hidden_size}." if case.hidden_size % 128 else None


_cross_entropy_only = without_entropy(("sft", "grpo"))
_liger_flce, _liger_chunked = needs("liger_kernel.transformers", gpu=True), needs("liger_kernel.chunked_loss", gpu=False)
_cce, _trl_kernels = needs("cut_cross_entropy", gpu=True), needs("trl.kernels", "trl.trainer.utils", gpu=False)
_trl_triton, _quack_lce, _verl_lce = (
    needs(name, gpu=True)
    for name in ("trl.kernels.logprob_entropy", "quack.linear_cross_entropy", "verl.utils.kernel.linear_cross_entropy")
)
PEERS = [
    Contender("Liger FLCE", "liger-kernel, defaults", _liger(None), _liger_flce, _cross_entropy_only),
    Contender("Liger FLCE, fp32 dWeight", "accum_dtype=float32", _liger(torch.float32), _liger_flce, _cross_entropy_only),
    Contender(
        "Liger FLCE, large chunks",
        f"chunk_mem_const for chunks of {LIGER_ROWS} rows",
        mean_or_each(_liger_large_chunks),
        _liger_flce,
        _cross_entropy_only,
    ),
    Contender(
        "Liger FLCE, sm_90",
        "liger-kernel[cutedsl], liger_fused_linear_cross_entropy_sm90: all logits at once, in bfloat16",
        _liger_sm90,
        _on_hopper(_SM90.format("fused_linear_cross_entropy")),
        _sm90_cannot,
    ),
    Contender(
        "Liger scaled CE, sm_90",
        "liger-kernel[cutedsl], LigerFusedLinearScaledCrossEntropyFunction on sm_90: forward writes no logits, entropy in bfloat16",
        _liger_scaled("LigerFusedScaledCrossEntropySM90Function"),
        _on_hopper(_SM90.format("fused_scaled_cross_entropy")),
        lambda case: None if case.dtype == "bfloat16" else "needs bfloat16.",
    ),
    Contender(
        "Liger scaled CE, fallback",
        "what the same function runs elsewhere: PyTorch, chunks of 512 rows, logits and entropy in the head's dtype",
        _liger_scaled("_FusedLinearPPOFallbackFunction"),
        _elsewhere,
        nothing_wrong,
    ),
    Contender("Liger fused GRPO", "liger-kernel, LigerFusedLinearGRPOLoss, bnpo", _liger_grpo, _liger_chunked, _grpo_only),
    Contender("cut-cross-entropy", "Apple's, default gradient filter", mean_or_each(_cut_cross_entropy), _cce, _cce_cannot),
    Contender(
        TRL,
        "trl.kernels.ChunkedLogProbFunction, as TRL's SFT and GRPO trainers call it: on a GPU without the rows that have no target",
        from_logprob(_trl),
        _trl_kernels,
        nothing_wrong,
    ),
    Contender(
        "TRL logprob on logits",
        "trl.kernels.selective_log_softmax_and_entropy on full logits in the head's dtype, as in TRL's TPO trainer",
        from_logprob(_trl_on_logits),
        _trl_triton,
        nothing_wrong,
    ),
    Contender("quack", "quack-kernels, chunks of 4096 rows", _quack, _quack_lce, _quack_cannot),
    Contender("verl", "verl.utils.kernel.linear_cross_entropy", from_logprob(_verl), _verl_lce, _verl_cannot),
]
