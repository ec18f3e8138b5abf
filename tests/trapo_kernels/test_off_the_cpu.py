"""What the chunked path does on any device but the CPU: the host never waits, nothing mixes devices, the results are the same."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.account import LAUNCHES
from tests.pretended_gpu import DEVICE, pretend
from tests.trapo_kernels import cases
from trapo_kernels import (
    KL,
    LoraHead,
    LossTotals,
    Role,
    TokenBatch,
    linear_logprob,
    linear_policy_loss,
    merged_metrics,
    objectives,
    policy_loss,
)
from trapo_kernels.backends import rows_torch
from trapo_kernels.backends.gemm import HeadGemm
from trapo_kernels.backends.vocab_parallel import VocabShard
from trapo_kernels.weights import AGGREGATIONS

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="runs on the GPU itself, in all other files")
N, D, V = 300, 12, 40


@pytest.fixture
def gpu(monkeypatch):
    with pretend(monkeypatch) as mode:
        yield mode


def _moved(*tensors):
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors]


def _close(ours, reference, dtype):
    eps = max(torch.finfo(dtype).eps, 1e-6)
    for x, y in zip(ours, reference, strict=True):
        assert x.device.type == DEVICE
        values, truth = x.detach().values.double(), y.detach().double()
        torch.testing.assert_close(values, truth, rtol=8 * eps, atol=8 * eps * max(1e-3, float(truth.abs().max())))


def _policy(hidden, weight, b, objective, **options):
    """Loss, gradients and metrics."""
    out = linear_policy_loss(hidden, weight, b, objective, **options)
    return [out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), *out.metrics.values()]


def _check_policy(gpu, preset, dtype, known_rows, batch_invariant=False):
    hidden, weight, _ = cases.head(N, D, V, dtype)
    b, objective = cases.batch(N, V, torch.float32), getattr(objectives, preset)()
    reference = _policy(hidden, weight, b, objective, backend="reference")
    there = b.to(DEVICE) if known_rows else replace(b.to(DEVICE))
    assert (there.active_rows is None) == (not known_rows)
    moved = _moved(hidden, weight)
    gpu.waits.clear()
    _close(_policy(*moved, there, objective, backend="torch", batch_invariant=batch_invariant), reference, dtype)
    assert gpu.waits == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", cases.PUBLISHED)
def test_policy_loss(gpu, preset, dtype):
    _check_policy(gpu, preset, dtype, known_rows=False)


def test_the_arithmetic_of_tokens_takes_few_launches(gpu, monkeypatch):
    """Each costs the host microseconds: hundreds of them would show beside the GEMMs of a few thousand rows."""
    hidden, weight = _moved(*cases.head(N, D, V, torch.bfloat16)[:2])
    b = cases.batch(N, V, torch.float32).to(DEVICE)
    row_kernel, in_row_kernel = rows_torch.policy, []

    def counted(*args):
        before = gpu.launches
        result = row_kernel(*args)
        in_row_kernel.append(gpu.launches - before)
        return result

    monkeypatch.setattr(rows_torch, "policy", counted)
    gpu.launches = 0
    linear_policy_loss(hidden, weight, b, objectives.trapo(), backend="torch").loss.backward()
    assert len(in_row_kernel) == 1  # chunk, so one launch of a compiled kernel
    assert gpu.launches - sum(in_row_kernel) <= LAUNCHES  # the GEMMs among them


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("preset", ["trapo", "gspo"])  # one pass and two
def test_policy_loss_of_the_rows_that_a_cpu_knew_to_be_active(gpu, preset, batch_invariant):
    _check_policy(gpu, preset, torch.bfloat16, known_rows=True, batch_invariant=batch_invariant)


@pytest.mark.parametrize("rows", ["known", "unknown", "scored"])
def test_a_pooled_kl_has_its_gradient_on_silent_rows(gpu, monkeypatch, rows):
    """A tenth of the tokens has no weight, and belongs to the ratio of its sequence all the same."""
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    muted, objective = torch.arange(N) % 10 == 0, replace(objectives.gspo(), kl=KL(0.2, "k3_corrected"))
    b = cases.batch(N, V, torch.float32, kl_weight=torch.where(muted, 0.0, 1 / N), entropy_weight=None)
    silent = (muted & (b.role != Role.IGNORED)).nonzero().squeeze(1)
    b = replace(b, weight=torch.where(muted, 0.0, b.weight), scored_rows=silent[[0, 0]] if rows == "scored" else None)
    reference = _policy(hidden, weight, b, objective, backend="reference")
    assert reference[1][silent].any(1).sum() > 9
    there, moved, factors = replace(b.to(DEVICE)) if rows == "unknown" else b.to(DEVICE), _moved(hidden, weight), []
    add = HeadGemm.add_grad_factor
    monkeypatch.setattr(HeadGemm, "add_grad_factor", lambda gemm, x, *rest: factors.append(len(x)) or add(gemm, x, *rest))
    gpu.waits.clear()
    _close(_policy(*moved, there, objective, backend="torch"), reference, torch.float32)
    assert gpu.waits == [] and sum(factors) == ((b.role != Role.IGNORED).sum() if rows == "known" else N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [None, "hidden", "weight"])
def test_logprob(gpu, dtype, frozen):
    hidden, weight, bias = cases.head(N, D, V, dtype)
    target = torch.randint(V, (N,))
    target[::3] = -100
    hidden[::3].data.fill_(float("nan"))
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")

    def run(hidden, weight, bias, target, backend):
        out = linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, softcap=5.0, backend=backend)
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        return [out.logprob, out.entropy, *torch.autograd.grad((out.logprob - 0.1 * out.entropy).sum(), leaves)]

    reference = run(hidden, weight, bias, target, "reference")
    assert len(reference) == (5 if frozen is None else 4)
    there = [*_moved(hidden, weight, bias), target.to(DEVICE)]
    gpu.waits.clear()
    _close(run(*there, "torch"), reference, dtype)
    assert gpu.waits == []


def test_a_head_that_ranks_share_makes_the_host_wait_for_nothing(gpu, one_rank, monkeypatch):
    """Of one rank here: the pretended GPU has no collectives, whose part of the work is then nothing."""
    monkeypatch.setattr(VocabShard, "_gather", lambda self, value: value[None])
    monkeypatch.setattr(VocabShard, "sum_over_ranks", lambda self, grad: None)
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b = cases.batch(N, V, torch.float32)
    reference = _policy(hidden, weight, b, objectives.trapo(), backend="reference")
    moved, there = _moved(hidden, weight), b.to(DEVICE)
    gpu.waits.clear()
    _close(_policy(*moved, there, objectives.trapo(), backend="torch", process_group=one_rank), reference, torch.float32)
    outside = replace(there, target=torch.full_like(there.target, V))
    logprob = linear_logprob(*moved, outside.target, backend="torch", process_group=one_rank).logprob.sum()
    on_policy = linear_policy_loss(
        *moved, replace(outside, old_logprob=None), objectives.grpo(), process_group=one_rank, backend="torch"
    )
    for loss in (logprob, on_policy.loss):
        assert torch.autograd.grad(loss, moved[1])[0].values.isnan().all()
    assert gpu.waits == []


@pytest.mark.parametrize("num_rows", [0, 6])
def test_a_head_that_no_row_reaches_has_gradients_of_zero(gpu, num_rows, monkeypatch):
    """Nothing overwrites the room for them then, which on a GPU may hold anything."""
    hidden, weight, bias = cases.head(num_rows, D, V, torch.float32)
    there = cases.batch(num_rows, V, torch.float32, weight=torch.zeros(num_rows), entropy_weight=None).to(DEVICE)
    moved = _moved(hidden, weight, bias)
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, float("nan"), **options))
    loss = linear_policy_loss(*moved[:2], there, objectives.sft(), bias=moved[2], backend="torch").loss
    assert len(there.active_rows) == 0 and not any(x.values.any() for x in (loss, *torch.autograd.grad(loss, moved)))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_logprob_of_named_rows_puts_no_other_through_a_gemm(gpu, monkeypatch, batch_invariant):
    hidden, weight, _ = cases.head(N, D, V, torch.bfloat16)
    target, rows = torch.randint(V, (N,)), torch.arange(2, N, 3)
    ran = []
    for name in ("logits", "grad_hidden", "add_grad_factor"):
        method = getattr(HeadGemm, name)
        monkeypatch.setattr(HeadGemm, name, lambda *a, o=method: ran.append(getattr(a[1], "hidden", a[1]).shape[0]) or o(*a))

    def run(hidden, weight, target, rows, backend, **options):
        out = linear_logprob(hidden, weight, target, with_entropy=True, active_rows=rows, backend=backend, **options)
        return [*out, *torch.autograd.grad((out.logprob - 0.1 * out.entropy).sum(), (hidden, weight))]

    reference = run(hidden, weight, target, rows, "reference")
    there = [*_moved(hidden, weight), target.to(DEVICE), rows.to(DEVICE)]
    gpu.waits.clear()
    _close(run(*there, "torch", batch_invariant=batch_invariant), reference, torch.bfloat16)
    assert gpu.waits == [] and ran == [1024 if batch_invariant else 100] * 4


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_a_batch_built_on_a_gpu_is_told_its_rows_as_the_page_says(gpu, monkeypatch, preset):
    """At the price of a wait for either kind; 60 active ones of 300 then reach a GEMM, and 40 silent ones where they are pooled."""
    text = (Path(__file__).parents[2] / "trapo_kernels" / "README.md").read_text()
    (told,) = re.findall(r"`(batch\.with_active_rows\(.*?)\)`", text)
    (silent,) = re.findall(r"`(\(\(batch\.role.*?\))`", text)
    told, waits = (f"{told})", 1) if preset == "grpo" else (f"{told}, {silent})", 2)
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    row, objective = torch.arange(N), getattr(objectives, preset)()
    streams = {
        "target": torch.randint(V, (N,)),
        "advantage": torch.randn(N),
        "old_logprob": -torch.rand(N),
        "sequence_id": row // 60,
    }
    streams["role"] = torch.where(row % 3 == 0, Role.ROLLOUT, Role.IGNORED).to(torch.uint8)
    streams["weight"] = 0.01 * (row % 5 < 3)
    reference = _policy(hidden, weight, TokenBatch(**streams), objective, backend="reference")
    there, moved = TokenBatch(**{name: x.to(DEVICE) for name, x in streams.items()}), _moved(hidden, weight)
    ran, logits = [], HeadGemm.logits
    monkeypatch.setattr(HeadGemm, "logits", lambda *a: ran.append(a[1].hidden.shape[0]) or logits(*a))
    _close(_policy(*moved, there, objective, backend="torch"), reference, torch.float32)
    gpu.waits.clear()
    ran.clear()
    _close(_policy(*moved, eval(told, {"batch": there, "Role": Role}), objective, backend="torch"), reference, torch.float32)
    assert gpu.waits == ["aten::nonzero"] * waits and ran == {"grpo": [60], "gspo": [60, 40, 60]}[preset]


def test_a_replaced_weight_is_not_read_through_the_rows_of_the_old_one(gpu):
    """Six expert tokens, the last three of weight 0 until they are replaced."""
    hidden, weight, _ = cases.head(6, D, V, torch.float32)
    expert, one = torch.full((6,), Role.EXPERT, dtype=torch.uint8), torch.ones(6)
    batch = TokenBatch(torch.arange(6), expert, one, (torch.arange(6) < 3).float())
    truth = _policy(hidden, weight, replace(batch, weight=one), objectives.sft(), backend="reference")
    assert replace(batch, weight=one).active_rows.tolist() == list(range(6))
    there, moved = batch.to(DEVICE), _moved(hidden, weight)
    changes = (
        {"weight": one.to(DEVICE)},
        {"entropy_weight": one.to(DEVICE)},
        {"role": expert.to(DEVICE)},
        {"ref_logprob": -one.to(DEVICE)},
    )
    assert there.active_rows is not None and all(replace(there, **change).active_rows is None for change in changes)
    _close(_policy(*moved, replace(there, **changes[0]), objectives.sft(), backend="torch"), truth, torch.float32)
    gpu.waits.clear()
    kept = replace(there, **changes[3]).with_active_rows(there.active_rows, there.silent_rows)
    assert kept.active_rows is there.active_rows and kept.silent_rows is there.silent_rows
    assert kept.ref_logprob is not None and gpu.waits == []
    back = replace(there, **changes[0]).to("cpu")  # where they are found anew
    assert back.active_rows.tolist() == list(range(6)) and back.silent_rows.tolist() == []


def test_a_pinned_batch_moves_without_a_wait(gpu):
    b = cases.batch(N, V, torch.float32)
    there = b.pin_memory().to(DEVICE)
    assert gpu.waits == [] and len(there.active_rows) == len(b.active_rows) and len(there.silent_rows) == len(b.silent_rows)
    b.to(DEVICE)
    assert gpu.waits  # out of pageable memory


def test_loss_of_given_logprobs(gpu):
    b = cases.batch(N, V, torch.float32)
    logprob = (-6 * torch.rand(N)).requires_grad_()
    objective = objectives.trapo(entropy_coef=0.0)
    results = []
    for x, streams, backend in ((logprob, b, "reference"), (*_moved(logprob), b.to(DEVICE), "torch")):
        gpu.waits.clear()
        out = policy_loss(x, None, streams, objective, backend=backend)
        results.append([out.loss, *torch.autograd.grad(out.loss, x)])
    _close(results[1], results[0], torch.float32)
    assert gpu.waits == []


@pytest.mark.parametrize("counted", ["counted here", "of the step"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_batch_of_padded_tensors_is_built_without_a_wait(gpu, mode, counted):
    """As on a GPU that sampled: there a wait would stand between two micro-batches."""
    mask = torch.arange(7) < torch.tensor([7, 3, 0, 5])[:, None]
    given = {"target": torch.randint(V, (4, 7)), "mask": mask, "advantage": torch.randn(4), "old_logprob": -torch.rand(4, 7)}
    given["correction"] = torch.rand(4, 7)
    given["prompt_id"] = torch.tensor([5, 5, -2, 6])
    totals = {} if counted == "counted here" else {"rollout_tokens": torch.tensor(40), "sequences": torch.tensor(9), "prompts": 5}
    there = {name: x.to(DEVICE) for name, x in given.items()}
    totals_there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in totals.items()}
    gpu.waits.clear()
    found = TokenBatch.from_padded(**there, aggregation=mode, max_tokens=9, totals=LossTotals(**totals_there) if totals else None)
    assert gpu.waits == [] and found.active_rows is None
    expected = TokenBatch.from_padded(**given, aggregation=mode, max_tokens=9, totals=LossTotals(**totals) if totals else None)
    for name in ("weight", "kl_weight", "sequence_id"):
        assert torch.equal(getattr(found, name).values, getattr(expected, name))


def test_rows_of_a_batch_on_a_gpu_are_taken_without_a_wait(gpu):
    hidden, weight, _ = cases.head(N, D, V, torch.float32)
    b, index = cases.batch(N, V, torch.float32), torch.arange(N // 2)
    expected = _policy(hidden[: N // 2].detach().requires_grad_(), weight, b.rows(index), objectives.trapo(), backend="reference")
    there, moved, index = b.to(DEVICE), _moved(hidden[: N // 2], weight), index.to(DEVICE)
    gpu.waits.clear()
    for part in (there.rows(index), there.rows(slice(N // 2))):
        assert part.active_rows is None
        _close(_policy(*moved, part, objectives.trapo(), backend="torch"), expected, torch.float32)
    assert gpu.waits == []
    scored = replace(b, weight=torch.zeros(N), entropy_weight=None, scored_rows=torch.tensor([0])).to(DEVICE)
    with pytest.raises(ValueError, match=r"a batch with scored_rows must be on the CPU.*got .*\. Split it before batch\.to"):
        scored.rows(index)


def test_metrics_merge_without_a_wait(gpu):
    batches = [cases.batch(N, V, torch.float32, seed=seed) for seed in range(3)]
    logprob, objective = -6 * torch.rand(N), objectives.grpo(beta=0.1)
    expected = merged_metrics([policy_loss(logprob, None, b, objective).metrics for b in batches])
    there = [b.to(DEVICE) for b in batches]
    (moved,) = _moved(logprob)
    gpu.waits.clear()
    found = merged_metrics([policy_loss(moved, None, b, objective, backend="torch").metrics for b in there])
    assert gpu.waits == [] and list(found) == list(expected)
    _close(found.values(), expected.values(), torch.float32)


X = torch.arange(3.0)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.empty(3).copy_(x), "copy_"),
        (lambda x: X.to(DEVICE), "_to_copy"),
        (lambda x: X.to(DEVICE, non_blocking=True), "_to_copy"),  # not from pinned memory
        (lambda x: x.copy_(X), "copy_"),
        (lambda x: x.copy_(X, non_blocking=True), "copy_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.masked_select(x > 1), "masked_select"),
        (lambda x: x.unique(), "_unique2"),
    ],
)
def test_the_pretended_gpu_sees_what_waits(gpu, wait, name):
    x = X.pin_memory().to(DEVICE, non_blocking=True)
    assert gpu.waits == []
    wait(x)
    assert f"aten::{name}" in gpu.waits


def test_the_pretended_gpu_lets_pass_what_does_not_wait(gpu):
    x = X.pin_memory().to(DEVICE, non_blocking=True)
    x.copy_(X.pin_memory(), non_blocking=True).add_(1).index_select(0, torch.tensor([0], device=DEVICE)).sum()
    x[torch.tensor([0, 1], device=DEVICE)] = torch.where(x > 1, x, 0.0)[:2]
    assert gpu.waits == ["aten::_to_copy"] * 2  # of the indices
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)


def test_a_tensor_left_on_the_cpu_is_named(gpu):
    hidden, weight, _ = cases.head(4, D, V, torch.float32)
    with pytest.raises(ValueError, match=f"target must be on {DEVICE}.*cpu"):
        linear_logprob(*_moved(hidden, weight), torch.zeros(4, dtype=torch.int64), backend="torch")


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["trapo", "gspo"])  # one pass and two
def test_a_lora(gpu, preset, dtype, batch_invariant):
    """The thin GEMMs, of bf16 operands into fp32 sums; ignored rows, which pass through them here, hold NaN."""
    hidden, weight, _ = cases.head(N, D, V, dtype)
    a, b = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((3, D), (V, 3)))
    batch, objective = cases.batch(N, V, torch.float32), getattr(objectives, preset)()
    hidden = torch.where(batch.active[:, None], hidden.detach(), float("nan")).requires_grad_()

    def run(hidden, weight, a, b, batch, **options):
        out = linear_policy_loss(hidden, weight, batch, objective, lora=LoraHead(a, b, 0.25), **options)
        return [out.loss, *torch.autograd.grad(out.loss, (hidden, weight, a, b))]

    reference = run(hidden, weight, a, b, batch, backend="reference")
    there = replace(batch.to(DEVICE))
    moved = _moved(hidden, weight, a, b)
    gpu.waits.clear()
    _close(run(*moved, there, backend="torch", batch_invariant=batch_invariant), reference, dtype)
    assert gpu.waits == []
