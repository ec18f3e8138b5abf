"""What a caller with several ranks can get wrong: a distributed weight, rows of its own, a target that no rank has."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests import ranks
from tests.trapo_kernels import cases
from trapo_kernels import Role, TokenBatch, checks, linear_logprob, linear_policy_loss, objectives, unsharded
from trapo_kernels.backends import native

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="the group is one of CPU processes")
N, D, V = 10, 16, 97
BAD = [2, 4]  # rows
ON_POLICY = [objectives.grpo(), objectives.dapo(), objectives.cispo(), objectives.gspo(), objectives.sapo(), objectives.trapo()]


def _batch(target):
    role = torch.full((N,), Role.ROLLOUT, dtype=torch.uint8)
    return TokenBatch(target, role, torch.randn(N), torch.full((N,), 0.1), sequence_id=torch.arange(N) // 5)


def _rows(b, rows):
    return replace(b, **{name: value[rows] for name, value in vars(b).items() if isinstance(value, torch.Tensor)})


def _inputs():
    torch.manual_seed(0)
    hidden, weight, _ = (x.detach() for x in cases.head(N, D, V, torch.float32))
    return hidden, weight, torch.randint(V, (N,))


def _in_two_ranks(check, path):
    ranks.start(_worker, 2, check, path / "store")


def _worker(rank, check, path):
    torch.set_num_threads(1)
    waits = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=waits)
    check(rank)
    dist.barrier()  # a rank that leaves first would take the connection down under the other
    dist.destroy_process_group()
    os._exit(0)  # as in test_vocab_parallel


def _check_remedies(rank):
    hidden, weight, target = _inputs()
    b, objective = _batch(target), objectives.grpo(entropy_coef=0.1)
    whole, whole_bias = weight.clone().requires_grad_(), torch.zeros(V, requires_grad=True)
    linear_policy_loss(hidden, whole, b, objective, bias=whole_bias).loss.backward()
    half = slice(5 * rank, 5 * rank + 5)
    for shape in ((1, 2), (2, 1)):
        head = torch.nn.Linear(D, V)
        head.weight.data.copy_(weight)
        head.bias.data.zero_()
        fully_shard(head, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
        with pytest.raises(TypeError, match=r"got a DTensor.*; or pass trapo_kernels\.unsharded\(\.\.\.\) of it"):
            linear_policy_loss(hidden[half], head.weight, _rows(b, half), objective)
        mine, gathered = hidden[half].clone().requires_grad_(), (unsharded(head.weight), unsharded(head.bias))
        loss = linear_policy_loss(mine, gathered[0], _rows(b, half), objective, bias=gathered[1]).loss
        (loss * dist.get_world_size()).backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), whole.grad)
        torch.testing.assert_close(head.bias.grad.full_tensor(), whole_bias.grad)
        assert unsharded(gathered[0]) is gathered[0] and unsharded(None) is None
        whole_graph = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)  # torch 2.11 breaks it at the gather
        compiled = torch.compile(lambda x: unsharded(x) * 2, backend="eager", fullgraph=whole_graph)
        torch.testing.assert_close(compiled(head.weight), 2 * gathered[0])
    mesh = init_device_mesh("cpu", (2,))
    shard = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    linear_policy_loss(hidden, shard.to_local(), b, objective, process_group=mesh.get_group()).loss.backward()
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)


@pytest.mark.slow
def test_the_remedies_for_a_distributed_weight_give_the_gradients_of_the_whole(tmp_path):
    _in_two_ranks(_check_remedies, tmp_path)


def _check_rows_that_differ(rank):
    hidden, weight, target = _inputs()
    mine, b = weight[:50] if rank == 0 else weight[50:], _batch(target)
    group, half = dist.group.WORLD, slice(5 * rank, 5 * rank + 5)
    unequal, reversed_on_one = slice(0, 4 + rank), torch.arange(N).flip(0) if rank == 1 else torch.arange(N)
    for rows, sizes in ((half, r"\[5, 5\]"), (unequal, r"\[4, 5\]"), (reversed_on_one, r"\[10, 10\]")):
        said = rf"all ranks of process_group must pass the same hidden and target, .* N = {sizes} rows .* pass the whole weight"
        with pytest.raises(ValueError, match=f"linear_logprob: {said}"):
            linear_logprob(hidden[rows], mine, target[rows], process_group=group)
        with pytest.raises(ValueError, match=f"linear_policy_loss: {said}"):
            linear_policy_loss(hidden[rows], mine, _rows(b, rows), objectives.sft(), process_group=group)
    checks.may_look = lambda x: False  # as of a GPU's tensors, in this process
    x = hidden[half].clone().requires_grad_()
    out = linear_logprob(x, mine, target[half], with_entropy=True, process_group=group)
    assert all(values.isnan().all() for values in out)
    policy = linear_policy_loss(x, mine, _rows(b, half), objectives.grpo(), process_group=group)
    policy.loss.backward()
    assert policy.logprob.isnan().all() and policy.entropy.isnan().all() and x.grad.isnan().all()


@pytest.mark.slow
def test_ranks_that_share_a_vocabulary_and_have_rows_of_their_own_are_refused_and_on_a_gpu_get_nan(tmp_path):
    _in_two_ranks(_check_rows_that_differ, tmp_path)


def _sharded_gradients(rank, loss, backend, num_rows=600, with_entropy=True):
    """Of rank's own `loss` of what all ranks score, on so many rows that ranks which chose them apart would have other chunks."""
    torch.manual_seed(0)
    hidden, weight, _ = (x.detach() for x in cases.head(num_rows, D, V, torch.float32))
    mine, target = (weight[:50] if rank == 0 else weight[50:]).clone().requires_grad_(), torch.randint(V, (num_rows,))
    target[::7] = -100
    x, whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(x, mine, target, with_entropy=with_entropy, process_group=dist.group.WORLD, backend=backend)
    grads = torch.autograd.grad(loss(out), (x, mine))
    reference = linear_logprob(hidden.requires_grad_(), whole, target, with_entropy=with_entropy, backend="reference")
    grad_hidden, grad_weight = torch.autograd.grad(loss(reference), (hidden, whole), materialize_grads=True)
    return grads, (grad_hidden, grad_weight[:50] if rank == 0 else grad_weight[50:])


class _NoGradient(torch.autograd.Function):
    """Passes on what it gets, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def _check_losses_that_differ(rank, backend):
    first = rank == 0
    unequal = [
        lambda out: (out.logprob.sum() + out.entropy.sum()) * (1.0 if first else 0.0),
        lambda out: out.logprob.sum() * (0.0 if first else 1.0),
        lambda out: out.logprob.mean() * (1.0 if first else 0.5),
        lambda out: out.entropy.sum() * (1.0 if first else -1.0),
        lambda out: out.logprob[:300].sum() if first else out.logprob[300:].sum(),
        lambda out: out.logprob.sum() if first else out.entropy.sum(),
        lambda out: out.logprob.sum() if first else _NoGradient.apply(out.logprob).sum(),
        lambda out: out.logprob.sum() * (1.0 if first else float("nan")),
    ]
    for loss in unequal:
        said = "linear_logprob: all ranks of process_group must have the same loss, got .* that differ, of .* divide it by no"
        with pytest.raises(ValueError, match=said):
            _sharded_gradients(rank, loss, backend)
    a_zero = torch.ones(600).index_fill(0, torch.arange(0, 600, 3), 0.0)
    equal = [
        lambda out: (out.logprob * a_zero).sum() + out.entropy.sum() * 0.1,
        lambda out: (out.logprob * (a_zero if first else (a_zero + 1e-9))).sum() * (1.0 + 1e-7 * rank),
        lambda out: out.logprob.sum() if first else out.logprob.sum() + 0.0 * out.entropy.sum(),
        lambda out: (0.0 * out.logprob).sum() if first else _NoGradient.apply(out.entropy).sum(),
    ]
    for loss in equal:
        for ours, truth in zip(*_sharded_gradients(rank, loss, backend), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    checks.may_look = lambda x: False  # as of a GPU's tensors, in this process
    for with_entropy, losses in ((True, unequal), (False, unequal[1:3])):
        for loss in losses:
            grads, _ = _sharded_gradients(rank, loss, backend, with_entropy=with_entropy)
            counted = torch.arange(600) % 7 != 0
            assert grads[0][counted].isnan().all() and not grads[0][~counted].any() and grads[1].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_ranks_that_share_a_vocabulary_and_have_other_losses_are_refused_and_on_a_gpu_get_nan(tmp_path, backend):
    if backend == "native" and native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    _in_two_ranks(partial(_check_losses_that_differ, backend=backend), tmp_path)


def _with_bad_targets(target):
    return target.index_put((torch.tensor(BAD),), torch.tensor([V + 5, -7]))


def test_a_target_that_no_rank_has_is_refused(one_rank):
    hidden, weight, target = _inputs()
    bad = _with_bad_targets(target)
    said = r"target must lie in \[0, V\) = \[0, 97\), or be -100 to ignore a row, got 102 at row 2"
    with pytest.raises(ValueError, match=f"linear_logprob: {said}"):
        linear_logprob(hidden, weight, bad, process_group=one_rank)
    with pytest.raises(ValueError, match=f"linear_policy_loss: {said}"):
        linear_policy_loss(hidden, weight, _batch(bad), objectives.grpo(), process_group=one_rank)


@pytest.mark.parametrize("backend", cases.CHUNKED)
@pytest.mark.parametrize("objective", [*ON_POLICY, None], ids=[*(x.name for x in ON_POLICY), "linear_logprob"])
def test_a_target_that_no_rank_has_makes_its_gradients_nan_where_nobody_looks(one_rank, monkeypatch, objective, backend):
    """Strictly on-policy the coefficient does not depend on the logprob, whose NaN alone would be lost."""
    monkeypatch.setattr(checks, "may_look", lambda x: False)  # as of a GPU's tensors
    hidden, weight, target = _inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    bad, settings = _with_bad_targets(target), {"process_group": one_rank, "backend": backend}
    if objective is None:
        linear_logprob(hidden, weight, bad, **settings).logprob.sum().backward()
    else:
        linear_policy_loss(hidden, weight, _batch(bad), objective, **settings).loss.backward()
    assert hidden.grad.isnan().any(1).nonzero().squeeze(1).tolist() == BAD
    assert weight.grad.isnan().any()


WITHOUT_RANKS = """
import sys, torch, torch._dynamo  # which wants names that such a torch has a stand-in for
sys.modules["torch.distributed.distributed_c10d"] = None
for name in [name for name in vars(torch.distributed) if not name.startswith("_") and name != "is_available"]:
    delattr(torch.distributed, name)
from trapo_kernels import doctor, linear_policy_loss, merged_metrics
assert doctor._self_test("torch", torch.device("cpu")) < 1e-5
merged_metrics([{"rollout/count": torch.ones(())}])
"""


@pytest.mark.slow
def test_a_torch_that_was_built_without_distributed_runs_what_one_process_can():
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", WITHOUT_RANKS], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
