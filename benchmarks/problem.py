"""One cell of the matrix: its shapes, its data, the textbook loss, and the fp64 truth that every contender is held to.

The data are a language model's, because near-uniform logits hide errors (p → 1 has its own numerics) and noise has no labels:
hidden states, head and text come from a model that was trained a little (`trained`). A rollout's target is drawn from the model, so
it is on-policy; an expert's is the text's own next token, in 5 % of the positions one from elsewhere in the text, because an expert
surprises and this model knows its text. "flat" cells are noise with uniform targets instead.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import trained
from trapo_kernels import Objective, Role, TokenBatch, objectives

SURPRISE_SHARE = 0.05
SURE = 0.9  # the probability above which a row counts as sure
ALPHA, EPSILON = 0.1, 0.2
ENTROPY_COEF = 0.05  # 50 times TRAPO's own, so that gradients without it are far enough from the truth to be seen (`cell.WRONG`)


@dataclass(frozen=True)
class Case:
    """What to compute at which shape. `job` is one of JOBS; `active` is the share of rows with a non-zero weight.

    `chunk_rows`, `logits_dtype` and `setting` ("frozen head" or "batch_invariant") are ours alone. `measure`: "time", "error"
    (accuracy only), "first_call", "step" or "longest". `contenders`: names to run, empty for all. `with_memory`: measure the peak
    too; on a CPU that costs a process per contender.
    """

    question: str
    job: str
    num_rows: int
    hidden_size: int
    vocab_size: int
    dtype: str
    peaked: bool = True
    active: float = 1.0
    sequence_length: int = 0  # tokens; 0: an eighth of the rows, one group of 8 samples
    chunk_rows: int = 0  # 0: the backend's own rule
    logits_dtype: str = "float32"
    setting: str = ""
    measure: str = "time"
    with_memory: bool = False
    contenders: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        return f"N={self.num_rows} D={self.hidden_size} V={self.vocab_size}"

    @property
    def title(self) -> str:
        """The case in words, without the question's name."""
        extra = [] if self.peaked else ["flat logits"]
        if self.active < 1.0:
            extra.append(f"{self.active:g} of the rows active")
        if self.chunk_rows:
            extra.append(f"chunk {self.chunk_rows} rows")
        if self.logits_dtype != "float32":
            extra.append(f"{self.logits_dtype} logits")
        extra += [self.setting] if self.setting else []
        return ", ".join([f"{self.job}, {self.shape}, {self.dtype}", *extra])

    @property
    def key(self) -> dict[str, object]:
        """The configuration as it is written to and compared with a results file; `contenders` is no part of it."""
        return {name: value for name, value in asdict(self).items() if name != "contenders"}

    @property
    def gemm_flop(self) -> int:
        """FLOP of one GEMM, 2·N·D·V."""
        return 2 * self.num_rows * self.hidden_size * self.vocab_size


class Job(NamedTuple):
    """A computation that a user needs; `gemms` is the floor's count, `entropy` "none", "value" or "gradient"."""

    about: str
    gemms: int
    entropy: str
    objective: Objective | None  # None: no loss, forward only


JOBS = {
    "score": Job("logprob and entropy of every target, forward only", 1, "value", None),
    "sft": Job("mean cross-entropy, forward and backward", 3, "none", objectives.sft()),
    "trapo": Job(
        "TRAPO: TrSFT on expert tokens, ratio loss on rollout tokens, entropy bonus with gradient; forward and backward",
        3,
        "gradient",
        objectives.trapo(alpha=ALPHA, entropy_coef=ENTROPY_COEF),
    ),
    "grpo": Job("GRPO's clipped ratio loss, mean over tokens; forward and backward", 3, "none", objectives.grpo(EPSILON, EPSILON)),
}


class Problem(NamedTuple):
    """The tensors of a case: hidden [N, D] and weight [V, D] in its dtype (leaves that require grad unless the job only
    scores or, of weight, the head is frozen), target [N] int64 with -100 on inactive rows, and the batch, whose sequences are
    `sequence_length` rows each."""

    case: Case
    hidden: Tensor
    weight: Tensor
    target: Tensor
    batch: TokenBatch
    sequence_length: int

    @property
    def job(self) -> Job:
        return JOBS[self.case.job]


def build(case: Case, device: torch.device | str, seed: int = 0) -> Problem:
    """The same tensors for the same case, device and seed, in any process."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    weight = torch.empty(case.vocab_size, case.hidden_size, device=device, dtype=dtype)
    hidden, target = _hidden_and_target(case, weight, generator)
    length = case.sequence_length or max(1, case.num_rows // 8)
    batch = _batch(case, target, length, torch.Generator().manual_seed(seed))
    old_logprob = _logprob(hidden, weight, target)
    old_logprob += 0.05 * torch.randn(case.num_rows, device=device, generator=generator)
    old_logprob.clamp_(max=0.0)
    batch = batch.to(device)
    batch = replace(batch, old_logprob=old_logprob).with_active_rows(batch.active_rows, batch.silent_rows)
    needs_grad = JOBS[case.job].objective is not None
    hidden = hidden.to(dtype).requires_grad_(needs_grad)
    weight.requires_grad_(needs_grad and case.setting != "frozen head")
    return Problem(case, hidden, weight, torch.where(batch.active, target, -100), batch, length)


def _hidden_and_target(case: Case, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """hidden [N, D] fp32 and target [N] int64 as the module's docstring describes; fills weight [V, D]."""
    n, device = case.num_rows, weight.device
    if not case.peaked:
        weight.normal_(0.0, case.hidden_size**-0.5, generator=generator)
        hidden = torch.randn(n, case.hidden_size, device=device, generator=generator)
        return hidden, torch.randint(case.vocab_size, (n,), device=device, generator=generator)
    rows = trained.lift(n, weight, generator)
    elsewhere = rows.text[torch.randint(n, (n,), device=device, generator=generator)]
    surprise = torch.rand(n, device=device, generator=generator) < SURPRISE_SHARE
    expert = torch.where(surprise, elsewhere, rows.text)
    return rows.hidden, torch.where((_roles(n, case) == Role.EXPERT).to(device), expert, rows.sampled)


def _roles(n: int, case: Case) -> Tensor:
    """[N] uint8: in each group of 8 sequences one is an expert trace and two start with an expert prefix of half their length, as
    in TRAPO's ladder; SFT has expert tokens alone, GRPO and scoring rollout tokens alone."""
    if case.job != "trapo":
        return torch.full((n,), Role.EXPERT if case.job == "sft" else Role.ROLLOUT, dtype=torch.uint8)
    length = case.sequence_length or max(1, n // 8)
    row = torch.arange(n)
    sample, place = row // length % 8, row % length
    expert = (sample == 7) | ((sample >= 5) & (place < length // 2))
    return torch.where(expert, Role.EXPERT, Role.ROLLOUT).to(torch.uint8)


def _batch(case: Case, target: Tensor, length: int, generator: torch.Generator) -> TokenBatch:
    """Host tensors; each sequence has one advantage, reward minus the mean of its group of 8; inactive rows are spread evenly."""
    n = case.num_rows
    row = torch.arange(n)
    sequence = row // length
    reward = (torch.rand(int(sequence[-1]) + 1, generator=generator) < 0.5).float()
    group = torch.arange(len(reward)) // 8
    mean = torch.zeros(int(group[-1]) + 1).scatter_reduce(0, group, reward, "mean", include_self=False)
    active = (row * case.active).floor() != ((row + 1) * case.active).floor()
    return TokenBatch(
        target=target.cpu(),
        role=torch.where(active, _roles(n, case), Role.IGNORED),
        advantage=(reward - mean[group])[sequence],
        weight=active.float() / active.sum().clamp(min=1),
        old_logprob=torch.zeros(n),
    )


def _blocks(num_rows: int, weight: Tensor, itemsize: int) -> list[slice]:
    """Row blocks whose logits fill at most 256 MiB, or 2 GiB on a GPU."""
    step = max(1, 2 ** (31 if weight.is_cuda else 28) // (weight.shape[0] * itemsize))
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


@torch.no_grad()
def _logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """[N] fp32, block by block; in the head's precision, which is what a sampler would have reported."""
    out = torch.empty(len(target), device=hidden.device)
    for block in _blocks(len(target), weight, 4):
        logits = (hidden[block].to(weight.dtype) @ weight.T).float()
        out[block] = logits.gather(1, target[block, None])[:, 0] - logits.logsumexp(1)
    return out


def textbook_loss(job: str, logprob: Tensor, entropy: Tensor | None, batch: TokenBatch) -> Tensor:
    """0-d: the published loss in plain PyTorch, summed over any rows; weights are zero on inactive ones.

    Kept apart from `trapo_kernels.objective` on purpose: it is what every peer's logprobs are turned into a loss with.
    """
    weight, advantage = batch.weight.to(logprob.dtype), batch.advantage.to(logprob.dtype)
    if job == "sft":
        return -(weight * logprob).sum()
    ratio = (logprob - batch.old_logprob.to(logprob.dtype)).exp()
    if job == "grpo":
        return -(weight * torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)).sum()
    trsft = logprob.exp().clamp(max=ALPHA) / ALPHA + (logprob - math.log(ALPHA)).clamp(min=0)
    value = torch.where(batch.role == Role.EXPERT, trsft, advantage * ratio)
    return -(weight * value).sum() - ENTROPY_COEF * (weight * entropy).sum()


def statistics(exact: Result, batch: TokenBatch) -> dict[str, float]:
    """What the active rows are like: means in nats, shares of sure rows (p > 0.9) and of rows below α, where TrSFT attenuates."""
    logprob, entropy = exact.logprob[batch.active], exact.entropy[batch.active]
    quantile = logprob.float().quantile(torch.tensor([0.2, 0.5, 0.8], device=logprob.device)).exp().tolist()
    return {
        "mean_logprob": logprob.mean().item(),
        "mean_entropy": entropy.mean().item(),
        "sure_share": (logprob > math.log(SURE)).double().mean().item(),
        "below_alpha_share": (logprob < math.log(ALPHA)).double().mean().item(),
        "p_quantiles": quantile,
    }


class Result(NamedTuple):
    """What a contender hands back; None where the job does not ask for it or the contender does not expose it."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    loss: Tensor | None = None
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None


def truth(problem: Problem) -> Result:
    """The job in fp64, from the same (already rounded) inputs, row block by row block; autograd of the textbook."""
    case, batch = problem.case, problem.batch
    weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    target = batch.target
    logprob, entropy = (torch.empty(case.num_rows, dtype=torch.float64, device=weight.device) for _ in range(2))
    loss, grad_hidden = 0.0, []
    for block in _blocks(case.num_rows, weight, 8):
        hidden = problem.hidden[block].detach().double().requires_grad_(problem.hidden.requires_grad)
        log_p = (hidden @ weight.T).log_softmax(-1)
        logp = log_p.gather(1, target[block, None])[:, 0]
        h = -(log_p.exp() * log_p).sum(-1)
        logprob[block], entropy[block] = logp.detach(), h.detach()
        if problem.job.objective is not None:
            named = ((field.name, getattr(batch, field.name)) for field in fields(batch))
            streams = {name: value[block] for name, value in named if value is not None}
            part = textbook_loss(case.job, logp, h, TokenBatch(**streams))
            part.backward()
            loss = loss + part.detach()
            grad_hidden.append(hidden.grad)
    if problem.job.objective is None:
        return Result(logprob, entropy)
    return Result(logprob, entropy, loss, torch.cat(grad_hidden), weight.grad)


def errors(result: Result, exact: Result, batch: TokenBatch) -> dict[str, float]:
    """Distances from the truth: nats for logprob and entropy (largest, active rows), relative L2 for gradients, relative for the
    loss. A NaN anywhere makes its entry NaN."""
    found: dict[str, float] = {}
    for name in ("logprob", "entropy"):
        got, want = getattr(result, name), getattr(exact, name)
        if got is not None:
            found[f"{name}_max_nats"] = (got.double() - want)[batch.active].abs().max().item()
    for name in ("grad_hidden", "grad_weight"):
        got, want = getattr(result, name), getattr(exact, name)
        if got is not None:
            found[f"{name}_relative"] = _distance(got, want) / max(want.norm().item(), 1e-300)
    if result.loss is not None:
        scale = max(abs(float(exact.loss)), 1e-3)  # a loss near zero is a sum of terms near one that cancel
        found["loss_relative"] = abs(float(result.loss) - float(exact.loss)) / scale
    return found


def _distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖₂ in fp64, in pieces, so that no fp64 copy of a whole gradient is made."""
    pieces = zip(got.split(8192), want.split(8192), strict=True)
    return sum((g.double() - w).square().sum() for g, w in pieces).sqrt().item()
