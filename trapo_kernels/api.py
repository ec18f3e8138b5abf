"""The public functions: check the input, choose a backend, apply the op."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor

from trapo_kernels import autograd, batch_checks, checks, dispatch, terms
from trapo_kernels.backends import reference
from trapo_kernels.backends.logits import LogitTransform, savable, split_temperature, statistics_dtype
from trapo_kernels.batch import TokenBatch
from trapo_kernels.dispatch import Backend, ScoringBackend
from trapo_kernels.inputs import Inputs, LogitOptions, ScoringOptions, Settings, per_row, prepared
from trapo_kernels.lora import LoraHead
from trapo_kernels.objective import Objective
from trapo_kernels.outputs import GivenEntropy, LogprobOutput, PolicyLossOutput
from trapo_kernels.roles import IGNORE_INDEX

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_logprob(
    hidden: Tensor, lm_head_weight: Tensor, target: Tensor, *, with_entropy: Literal[True], **options: Unpack[ScoringOptions]
) -> LogprobOutput[Tensor]: ...
@overload
def linear_logprob(
    hidden: Tensor, lm_head_weight: Tensor, target: Tensor, *, with_entropy: bool = False, **options: Unpack[ScoringOptions]
) -> LogprobOutput[Tensor | None]: ...
def linear_logprob(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoraHead | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    process_group: ProcessGroup | None = None,
    batch_invariant: bool = False,
    active_rows: Tensor | None = None,
    backend: ScoringBackend = "auto",
) -> LogprobOutput[Tensor | None]:
    """Log-probability of each target token, and the entropy of its distribution, straight from the hidden states.

    Equivalent to:

        logits = hidden.float() @ lm_head_weight.to(hidden.dtype).float().T + (0 if bias is None else bias)
        capped = logits if softcap is None else softcap * (logits / softcap).tanh()
        log_p = (capped / torch.as_tensor(temperature, device=hidden.device).view(-1, 1)).log_softmax(-1)
        logprob = log_p.gather(1, target[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64.
        lm_head_weight: [V, D], the dtype of hidden, one row per token id; or float32 master weights beside bfloat16 or float16
            hidden states: the GEMMs run in the dtype of hidden, the gradient stays float32, never rounded.
        target: [N] int64 in [0, V), or -100 to ignore the row (its hidden state is never used and may be NaN).
        bias: [V] or None.
        lora: `LoraHead` or None; the low-rank part of the head, with gradients of its factors in their dtype.
        temperature: float > 0, or fp32 0-d or [N]; divides the logits, and with them the gradient; what a model divides its logits
            by (Granite's logits_scaling) is a factor of it. torch.compile specialises on a float: pass a tensor where it varies.
        softcap: caps logits to (-softcap, softcap) before the temperature, as Gemma does; > 0 or None.
        with_entropy: also return the entropy, with gradient.
        logits_dtype: what hidden · lm_head_weightᵀ is rounded to, before bias and softmax: float32, or the dtype of hidden to match
            a sampler that does.
        process_group: the ranks over which the vocabulary is sharded, in order; each passes its own rows of the weight (and of the
            bias), the same hidden, target and settings, and must compute the same loss of the results, which are equal on all
            ranks: the upstream gradients must be equal, too. dHidden and the gradient of `lora.a` arrive summed over the ranks: do
            not all-reduce these again, nor divide the loss by the number of ranks. Targets or upstream gradients that differ raise
            on a CPU; on a GPU they make every result, or every gradient, NaN, and the ranks hang where N differs.
        batch_invariant: give a row's logprob the same bits whatever else is in the batch, by GEMMs of one fixed number of rows. Not
            promised in float64 on a CPU, where MKL's products of few columns do not allow it.
        active_rows: [K] int64, ascending, rows with a target; all others are ignored like those of target -100, whatever theirs is,
            and reach no GEMM. None: every row with a target. A CPU finds those by itself; a GPU, which would have to wait to know
            them, puts the ignored rows through all four GEMMs as zeros: name the others where they are few. Checked on a CPU; on a
            GPU a row named twice counts twice in the head's gradients, and a missing one is ignored.
        backend: "auto", "reference", "torch" (chunked PyTorch), "triton", "native" (compiled C++ and CUDA), or "triton_fused" and
            "native_fused" (scoring whose logits stay on the chip; backward as without "_fused"); a named one runs or raises. "auto"
            is triton on a GPU, native on a CPU, torch where those cannot run. On a GPU, scoring (this function, and the first pass
            of a two-pass loss; eager or compiled) takes the backend that trapo_kernels/scoring.json has as fastest at the nearest
            shape; it holds no measurement yet. Where the native extension is installed, every chunked backend takes its GEMMs
            for a bf16 head on a CPU with AMX or AVX512_BF16, and into the logits of a float32 head on one with AVX512_BF16 that is
            not Intel's.

    Returns: `LogprobOutput`; logprob and entropy [N] are differentiable in hidden, lm_head_weight, bias and lora.
    Raises: TypeError, ValueError for bad input; RuntimeError for a backend that cannot run, and on double backward.
    Memory: one chunk of logits (three with backend "torch"): on a GPU at most 4096·152064, 2.3 GiB in fp32; on a CPU 256 rows
        (Intel: 512, or to 1024 within 2^25 logits), or 2^20 logits. Backward adds dWeight in fp32, or in 16 bits if 16-bit operands
        are one chunk (on a CPU: N ≤ D). There, if V ≥ 16384, "native" keeps logits in dWeight, but for a block or an overflow.
    Determinism: bitwise repeatable for the same inputs on the same machine and installation; no atomics.
    Source: the chunked cross-entropy of arXiv 2411.09009 and 2410.10989, with entropy gradient.
    """
    where = "linear_logprob"
    checks.is_a(where, "target", target, Tensor, "the token ids [N]")
    checks.yes_or_no(where, "with_entropy", with_entropy)
    inputs = prepared(where, hidden, lm_head_weight, bias, lora, backend)
    temperature = per_row(temperature, target.numel())
    settings = Settings(temperature, softcap, logits_dtype, process_group, batch_invariant, backend)
    hidden, lm_head_weight, *_ = inputs
    if active_rows is not None:
        checks.vector(where, "target", target, hidden.shape[0], hidden.device, (torch.int64,))
        checks.active_rows(where, active_rows, target)
        target = torch.full_like(target, IGNORE_INDEX).index_copy(0, active_rows, target[active_rows])
    checks.target(where, target, hidden.shape[0], _whole_vocab(lm_head_weight, process_group), hidden.device)
    settings.check(where, hidden, target)
    chosen = settings.choose(where, inputs, active_rows)
    return _linear_logprob(where, inputs, target, active_rows, None, settings._replace(backend=chosen), with_entropy)


def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    lora: LoraHead | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype = torch.float32,
    process_group: ProcessGroup | None = None,
    batch_invariant: bool = False,
    backend: Backend = "auto",
) -> PolicyLossOutput[Tensor]:
    """A policy loss straight from the hidden states in a single pass: its gradients come out of the forward sweep, 3 GEMMs.

    Equivalent to:

        out = linear_logprob(hidden, lm_head_weight, batch.target, with_entropy=True)
        loss = policy_loss(out.logprob, out.entropy, batch, objective).loss

    Args:
        hidden: [N, D]; rows that `batch` ignores may hold anything, NaN included, and so may those without a weight unless the
            objective pools over sequences, to which they belong.
        lm_head_weight: [V, D], the dtype of hidden, or float32 master weights, as in `linear_logprob`.
        batch: `TokenBatch` of N tokens; its weights carry every normaliser, nothing is divided by a count here.
        objective: from `trapo_kernels.objectives`, or an `Objective` of your own.
        bias, lora, temperature, softcap, logits_dtype, process_group, batch_invariant, backend: as in `linear_logprob`; the ranks
            of a process_group pass the same batch, and what they do to the loss must be the same, which one pass does not check.

    Returns: `PolicyLossOutput`. What cannot run in the single pass (a gate of your own, a reduction over whole sequences
        with an `old_logprob`, two terms on one role, fp16 inputs, whose gradients a scaler must reach before they are rounded) runs
        in two, 4 GEMMs, and says so in `passes`; see `Objective.why_two_passes`.
    Raises: as `linear_logprob`; ValueError when the objective reads a stream that the batch lacks.
    Memory: as `linear_logprob` and its backward, and both gradients from forward until backward. A factor on the loss costs one
        more read and write of each (on a GPU not of an fp32 one that is rounded); folded into `weight` it costs nothing.
    Determinism: bitwise repeatable for the same inputs; no atomics.
    Source: arXiv 2512.17636 (TRAPO) for the mixed loss; quack's linear cross-entropy for the single pass.
    """
    where = "linear_policy_loss"
    checks.is_a(where, "objective", objective, Objective, "objectives.trapo()")
    checks.is_a(where, "batch", batch, TokenBatch, "TokenBatch(target, role, advantage, weight)")
    inputs = prepared(where, hidden, lm_head_weight, bias, lora, backend)
    temperature = per_row(temperature, len(batch))
    settings = Settings(temperature, softcap, logits_dtype, process_group, batch_invariant, backend)
    hidden, lm_head_weight, *_ = inputs
    batch_checks.batch_fits(where, batch, hidden.shape[0], _whole_vocab(lm_head_weight, process_group), hidden.device)
    batch_checks.streams_fit(where, batch, objective)
    target = batch.target_to_score(objective.pools)
    settings.check(where, hidden, target)
    active, scored = _rows_to_score(batch, objective)
    # fp16 waits for the upstream gradient: a gradient scaler must act before dHidden is rounded, or small ones become 0.
    if backend == "reference" or hidden.dtype == torch.float16 or objective.why_two_passes(batch.on_policy):
        # Where active rows are not known, all with a target pass through, those to be scored among them.
        rows = (active, scored) if active is not None else (None, None)
        settings = settings._replace(backend=settings.choose(where, inputs, *rows))
        out = _linear_logprob(where, inputs, target, *rows, settings, with_entropy=True)
        return _policy_loss(where, out.logprob, out.entropy, batch, objective, "reference")
    chosen = dispatch.choose(where, backend, hidden.device, hidden.dtype)
    s = terms.streams(batch, objective, statistics_dtype(hidden))
    # Silent rows that no index names pass through like active ones, with gradients of 0.
    seen = replace(s, role=batch.role) if objective.pools and active is None else s
    codes, parameters = terms.encode(objective)
    checks.reverse_mode(where, chosen, *inputs, temperature, batch=batch)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    loss, logprob, entropy, *_ = autograd.linear_policy_loss(
        *inputs,
        target,
        streams=terms.pack(seen),
        active_rows=active,
        scored_rows=scored,
        codes=codes,
        parameters=parameters,
        with_entropy_gradient=objective.entropy_coef != 0.0,
        needs=needs,
        grad_weight_dtype=settings.grad_weight_dtype(len(batch) if active is None else len(active), inputs),
        backend=chosen,
        **settings.of_op(),
    )
    return _policy_output(loss, logprob, entropy, batch, s, objective, passes=1)


def policy_loss(
    logprob: Tensor, entropy: GivenEntropy, batch: TokenBatch, objective: Objective, backend: Backend = "auto"
) -> PolicyLossOutput[GivenEntropy]:
    """The same objective on any logprobs: of another head, of a reduced sequence, of your own kernel.

    Equivalent to, for `objectives.trapo(alpha=0.1, entropy_coef=0.001)`:

        expert = torch.where(logprob.exp() < 0.1, logprob.exp() / 0.1, 1 + logprob - math.log(0.1))
        rollout = batch.advantage * (logprob - batch.old_logprob).exp()
        value = torch.where(batch.role == Role.EXPERT, expert, rollout)
        of_token = -batch.weight * value - 0.001 * batch.weight_of_entropy * entropy
        loss = torch.where(batch.role == Role.IGNORED, 0, of_token).sum()

    and in general to `Σ weight · (-a·V(d)) + β Σ kl_weight · KL - entropy_coef Σ entropy_weight · entropy`; see `Objective`.

    Args:
        logprob: [N] fp32 or fp64 nats, differentiable. entropy: [N], differentiable; may be None when entropy_coef is 0. Both are
            read on every token with a weight, and on all of a role whose term pools over sequences.
        batch: `TokenBatch` of N tokens; `target` is not read. objective: as in `linear_policy_loss`.
        backend: as there; what has no compiled form or needs whole sequences first is the reference formula on each of them.

    Returns: `PolicyLossOutput` with passes = 2. Raises: ValueError for a shape that does not fit, a missing stream or entropy.
    Memory: O(N). Determinism: bitwise repeatable. Source: objectives' docstrings.
    """
    where = "policy_loss"
    checks.is_a(where, "objective", objective, Objective, "objectives.trapo()")
    checks.is_a(where, "batch", batch, TokenBatch, "TokenBatch(target, role, advantage, weight)")
    num_rows, device = len(batch), batch.target.device
    checks.vector(where, "logprob", logprob, num_rows, device, (torch.float32, torch.float64))
    known = entropy is not None
    if not known:
        if objective.needs_entropy:
            bonus = next((layer.entropy_coef for layer in objective.layers if layer.entropy_coef), None)
            reader = f"has entropy_coef = {bonus:g}" if bonus else "weighs tokens by their entropy"
            raise ValueError(
                f"{where}: objective {objective.name!r} {reader} and needs entropy [N], got None. "
                f"Ask for it with linear_logprob(..., with_entropy=True){', or set entropy_coef=0' if bonus else ''}."
            )
        entropy = torch.zeros_like(logprob, requires_grad=False)
    checks.vector(where, "entropy", entropy, num_rows, device, (torch.float32, torch.float64))
    batch_checks.streams_fit(where, batch, objective)
    out = _policy_loss(where, logprob, entropy, batch, objective, dispatch.choose(where, backend, device, logprob.dtype))
    if known:
        return out
    metrics = {name: x for name, x in out.metrics.items() if not name.endswith("/entropy")}
    return PolicyLossOutput(out.loss, out.logprob, None, metrics, out.passes)


@overload
def token_logprob(
    logits: Tensor, target: Tensor, *, with_entropy: Literal[True], backend: Backend = "auto", **options: Unpack[LogitOptions]
) -> LogprobOutput[Tensor]: ...
@overload
def token_logprob(
    logits: Tensor, target: Tensor, *, with_entropy: bool = False, backend: Backend = "auto", **options: Unpack[LogitOptions]
) -> LogprobOutput[Tensor | None]: ...
def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    backend: Backend = "auto",
) -> LogprobOutput[Tensor | None]:
    """logprob and entropy from logits you have; contiguous ones are not copied whole in the forward pass.

    Equivalent to:

        capped = logits.float() if softcap is None else softcap * (logits.float() / softcap).tanh()
        log_p = (capped / torch.as_tensor(temperature, device=logits.device)[..., None]).log_softmax(-1)
        logprob = log_p.gather(-1, target[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64. target: [...] int64 in [0, V), or -100 to ignore.
        temperature: float > 0, or fp32 in the shape of target. softcap, with_entropy, backend: as in `linear_logprob`.

    Returns: `LogprobOutput` in the shape of target; logprob and entropy are differentiable in logits.
    Raises: as `linear_logprob`. Memory: one fp32 chunk; backward writes dLogits. Determinism: bitwise repeatable.
    Source: the softmax identity above.
    """
    where = "token_logprob"
    checks.is_a(where, "logits", logits, Tensor, "the model's logits [..., V]")
    checks.is_a(where, "target", target, Tensor, "the token ids [...]")
    checks.yes_or_no(where, "with_entropy", with_entropy)
    for name, x in (("logits", logits), ("target", target), ("temperature", temperature)):
        checks.whole(where, name, x)
    if logits.ndim < 1 or logits.shape[:-1] != target.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"{where}: logits must have shape [..., V] and target the same leading shape, got {list(logits.shape)} and "
            f"{list(target.shape)}. Shift with logits[:, :-1] and target[:, 1:]."
        )
    if logits.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(
            f"{where}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}. Convert them with logits.float()."
        )
    flat, flat_target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand_as(target) if temperature.ndim == 0 else temperature
        if temperature.shape != target.shape:
            raise ValueError(
                f"{where}: temperature must be a float or have the shape of target, {list(target.shape)}, got "
                f"{list(temperature.shape)}. Use temperature.expand_as(target)."
            )
        temperature = temperature.reshape(-1)
    checks.target(where, flat_target, flat.shape[0], flat.shape[1], logits.device)
    checks.temperature(where, temperature, flat_target)
    checks.softcap(where, softcap)
    chosen = dispatch.choose(where, backend, logits.device, logits.dtype)
    checks.reverse_mode(where, chosen, logits, temperature)
    if chosen == "reference":
        exact = flat.to(statistics_dtype(flat))
        transform = LogitTransform(None, softcap, savable(temperature))
        logprob, entropy, logsumexp = reference.logprob_and_entropy(exact, flat_target, transform)
    else:
        logprob, entropy, row_max, log_sum = autograd.token_logprob(
            flat, flat_target, *split_temperature(temperature), softcap, with_entropy, chosen
        )
        logsumexp = (row_max + log_sum).detach()
    shaped = (logprob.reshape(target.shape), entropy.reshape(target.shape), logsumexp.reshape(target.shape))
    return LogprobOutput(shaped[0], shaped[1] if with_entropy else None, shaped[2])


def _policy_loss(
    where: str, logprob: Tensor, entropy: Tensor, batch: TokenBatch, objective: Objective, chosen: str
) -> PolicyLossOutput[Tensor]:
    """`policy_loss` of inputs that were checked, on a backend that was chosen."""
    s = terms.streams(batch, objective, logprob.dtype)
    if chosen == "reference" or objective.why_two_passes(batch.on_policy):
        loss = reference.policy_loss(logprob, entropy, batch, objective)
    else:
        checks.reverse_mode(where, chosen, logprob, entropy, batch=batch)
        loss, _ = autograd.policy_loss(logprob, entropy, terms.pack(s), *terms.encode(objective), chosen)
    return _policy_output(loss, logprob, entropy, batch, s, objective, passes=2)


def _policy_output(
    loss: Tensor, logprob: Tensor, entropy: Tensor, batch: TokenBatch, s: terms.Streams, objective: Objective, passes: int
) -> PolicyLossOutput[Tensor]:
    with torch.no_grad():
        logprob, entropy = logprob.detach(), entropy.detach()
        return PolicyLossOutput(loss, logprob, entropy, terms.metrics(logprob, entropy, s, objective, batch), passes)


def _linear_logprob(
    where: str,
    inputs: Inputs,
    target: Tensor,
    active_rows: Tensor | None,
    scored_rows: Tensor | None,
    settings: Settings,
    with_entropy: bool,
) -> LogprobOutput[Tensor | None]:
    """`linear_logprob` of checked inputs on a backend that was chosen; `active_rows` [M] and `scored_rows` [K], which need no
    gradient, are together the rows with a target, where the caller knows them."""
    hidden, weight, bias, *lora = inputs
    chosen = settings.backend
    if chosen == "reference":
        logits = reference.head_logits(hidden, weight, target, bias, *lora, settings.logits_dtype)
        transform = LogitTransform(None, settings.softcap, savable(settings.temperature))
        logprob, entropy, logsumexp = reference.logprob_and_entropy(logits, target, transform)
    else:
        checks.reverse_mode(where, chosen, *inputs, settings.temperature)
        logprob, entropy, row_max, log_sum = autograd.linear_logprob(
            *inputs,
            target,
            active_rows=active_rows,
            scored_rows=scored_rows,
            with_entropy=with_entropy,
            backend=chosen,
            **settings.of_op(),
        )
        logsumexp = (row_max + log_sum).detach()
    return LogprobOutput(logprob, entropy if with_entropy else None, logsumexp)


def _rows_to_score(batch: TokenBatch, objective: Objective) -> tuple[Tensor | None, Tensor | None]:
    """(rows with a gradient, None where some that matter are not known; rows without one whose logprob is wanted)."""
    active, silent, scored = batch.active_rows, batch.silent_rows, batch.scored_rows
    if active is None or not objective.pools:
        return active, scored
    flows = any(layer.pools_kl for layer in objective.layers)  # a gradient to silent rows, and to scored ones, maybe named twice
    if silent is None or (flows and scored is not None):
        return None, scored
    return (torch.cat([active, silent]), None) if flows else (active, silent if scored is None else torch.cat([scored, silent]))


def _whole_vocab(weight: Tensor, process_group: ProcessGroup | None) -> int | None:
    """V where this process has the whole head; None where only the ranks together know it."""
    return weight.shape[0] if process_group is None else None
