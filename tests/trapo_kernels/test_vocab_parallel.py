"""A head sharded over the vocabulary on real processes (gloo): results and gradients equal those of the whole head."""

import os

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import native

NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE = 40, 6, 101


def _batch(dtype):
    """The last five rows carry no weight; two of them are scored all the same."""
    weight = torch.rand(NUM_ROWS, dtype=dtype) / NUM_ROWS
    weight[-5:] = 0.0
    scored = torch.tensor([NUM_ROWS - 5, NUM_ROWS - 2])
    return cases.batch(NUM_ROWS, VOCAB_SIZE, dtype, weight=weight, entropy_weight=None, scored_rows=scored)


def _run(inputs, b, group, backend):
    """Everything that a head computes: scoring, the loss in one pass, the loss in two, each with its gradients."""
    hidden, weight, bias = inputs
    settings = {"bias": bias, "temperature": 0.8, "softcap": 20.0, "process_group": group, "backend": backend}
    out = linear_logprob(hidden, weight, b.target, with_entropy=True, active_rows=b.active_rows, **settings)
    results = [*out, *cases.gradients((out.logprob - 0.3 * out.entropy).sum(), inputs)]
    for objective, invariant in ((objectives.trapo(entropy_coef=0.1), False), (objectives.gmpo(entropy_coef=0.1), True)):
        policy = linear_policy_loss(hidden, weight, b, objective, batch_invariant=invariant, **settings)
        assert policy.logprob[b.scored_rows].all()
        results += [policy.loss, policy.logprob, policy.entropy, *cases.gradients(policy.loss, inputs)]
    return results


def _worker(rank, world_size, path, scale, dtype, backend):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    b = _batch(torch.float32 if dtype == torch.bfloat16 else dtype)
    inputs, objective = cases.head(NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE, dtype, scale), objectives.trapo()
    (hidden, weight, bias), expected = inputs, _run(inputs, b, None, backend)
    edges = torch.tensor([0, *(VOCAB_SIZE * k // 7 + 5 for k in range(1, world_size)), VOCAB_SIZE])  # uneven shards
    mine = slice(int(edges[rank]), int(edges[rank + 1]))
    shard = [x.detach()[mine].clone().requires_grad_() for x in (weight, bias)]
    actual = _run((hidden, *shard), b, dist.group.WORLD, backend)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype]
    for i, (ours, whole) in enumerate(zip(actual, expected, strict=True)):
        whole = whole[mine] if whole.shape[:1] == (VOCAB_SIZE,) else whole
        assert ours.dtype == whole.dtype
        assert cases.error(ours, whole) <= tolerance * max(1.0, whole.abs().max().item()), f"output {i} on rank {rank}"
    masked = bias.detach().clone()
    possible = (int(edges[-2]) or VOCAB_SIZE) - 3
    masked[possible:] = float("-inf")  # a padded tail: of several shards the last has no possible column at all
    target = b.target % possible
    whole = linear_logprob(hidden, weight, target, bias=masked, with_entropy=True, backend="torch")
    parts = linear_logprob(
        hidden, shard[0], target, bias=masked[mine], with_entropy=True, process_group=dist.group.WORLD, backend="torch"
    )
    for ours, expected in zip(parts, whole, strict=True):
        bound = tolerance * max(1.0, expected.abs().max().item())
        assert cases.error(ours, expected) <= bound, (ours, expected)
    impossible = torch.full_like(target, VOCAB_SIZE - 1)
    for group, (w, columns) in ((None, (weight, masked)), (dist.group.WORLD, (shard[0], masked[mine]))):
        out = linear_logprob(hidden, w, impossible, bias=columns, process_group=group, backend=backend)
        assert (out.logprob == float("-inf")).all()
    a, lora_b = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((3, hidden.shape[1]), (VOCAB_SIZE, 3)))
    lora_shard = lora_b.detach()[mine].clone().requires_grad_()
    whole = linear_policy_loss(hidden, weight, b, objective, lora=LoraHead(a, lora_b, 0.5), backend="torch").loss
    part = linear_policy_loss(
        hidden, shard[0], b, objective, lora=LoraHead(a, lora_shard, 0.5), process_group=dist.group.WORLD, backend="torch"
    ).loss
    grads = cases.gradients(whole, (hidden, a, lora_b))
    for ours, truth in zip(cases.gradients(part, (hidden, a, lora_shard)), (*grads[:2], grads[2][mine]), strict=True):
        assert cases.error(ours, truth) <= tolerance * max(1.0, truth.abs().max().item())
    _check_unequal_chunks(rank, world_size)
    _check_peaked_entropy(rank, world_size)
    gathered = [torch.empty_like(actual[0]) for _ in range(world_size)]
    dist.all_gather(gathered, actual[0].detach())
    assert all(torch.equal(other, gathered[0]) for other in gathered), "ranks disagree on logprob"
    dist.barrier()  # a rank that leaves first would take the connection down under the other
    dist.destroy_process_group()
    os._exit(0)  # everything has passed; gloo's threads (torch 2.13) can abort the interpreter's own teardown


def _check_peaked_entropy(rank, world_size):
    """As test_accuracy has it: only one row has an entropy gradient, so its logits are computed again by another GEMM; with another
    target than the peak, and with that."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 896, generator=generator) for n in (64, 1024))
    weight /= 896**0.5
    hidden += 25 * weight[:64]
    size = len(weight) // world_size

    def gradient(dtype, weight, target, **settings):
        x = hidden.to(dtype).requires_grad_()
        entropy = linear_logprob(x, weight.to(dtype), target, with_entropy=True, **settings).entropy
        return cases.gradients(entropy[5], (x,))[0][5]

    mine = weight[rank * size :] if rank == world_size - 1 else weight[rank * size : (rank + 1) * size]
    for target in (torch.arange(64) * 3, torch.arange(64)):
        truth, eager = (gradient(dtype, weight, target, backend="reference") for dtype in (torch.float64, torch.float32))
        ours = gradient(torch.float32, mine, target, process_group=dist.group.WORLD, backend="torch")
        assert cases.error(ours, truth) <= 2 * cases.error(eager, truth) + 1e-5 * truth.abs().max()


def _check_unequal_chunks(rank, world_size):
    """So many rows and so uneven shards that ranks which chose their chunks by their own shard would disagree."""
    hidden, weight, _ = (x.detach() for x in cases.head(600, 16, 1000 + 3000 * (world_size - 1), torch.float32))
    target = torch.randint(len(weight), (600,))
    mine = weight[:1000] if rank == 0 else weight[3000 * rank - 2000 : 3000 * rank + 1000]
    whole = linear_logprob(hidden, weight, target, backend="torch").logprob
    part = linear_logprob(hidden, mine, target, process_group=dist.group.WORLD, backend="torch").logprob
    assert cases.error(part, whole) < 1e-4


@pytest.mark.parametrize(
    ("world_size", "scale", "dtype", "backend"),
    [
        (2, 40.0, torch.float64, "torch"),
        (3, 1.0, torch.float32, "native"),
        (2, 1.0, torch.bfloat16, "native"),
        (1, 1.0, torch.float64, "torch"),
        (4, 1.0, torch.float64, "torch"),
        pytest.param(2, 1.0, torch.float32, "triton", marks=pytest.mark.slow),
    ],
)
def test_sharded_equals_whole(tmp_path, monkeypatch, world_size, scale, dtype, backend):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo's ranks are CPU processes, also where there is a GPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if backend == "native" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    ranks.start(_worker, world_size, world_size, tmp_path / "store", scale, dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_one_rank_on_nccl_equals_no_group(tmp_path, backend):
    """The collectives on a GPU: no copy to the host, no tensor on the wrong device."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        inputs = [x.detach().bfloat16().requires_grad_() for x in cases.head(NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE)]
        results = []
        for group in (None, dist.group.WORLD):
            out = linear_policy_loss(
                *inputs[:2],
                cases.batch(NUM_ROWS, VOCAB_SIZE, torch.float32),
                objectives.trapo(),
                bias=inputs[2],
                process_group=group,
                backend=backend,
            )
            results.append([out.loss, out.logprob, *cases.gradients(out.loss, inputs)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()
