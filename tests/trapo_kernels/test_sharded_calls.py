"""What a caller with several ranks can get wrong: a distributed weight."""

import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from tests.trapo_kernels import cases
from trapo_kernels import Role, TokenBatch, linear_policy_loss, objectives

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="the group is one of CPU processes")
N, D, V = 10, 16, 97


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
    mp.spawn(_worker, (check, path / "store"), nprocs=2)


def _worker(rank, check, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    check(rank)
    dist.barrier()  # a rank that leaves first would take the connection down under the other
    dist.destroy_process_group()
    os._exit(0)  # as in test_vocab_parallel


def _check_remedies(rank):
    hidden, weight, target = _inputs()
    b, objective = _batch(target), objectives.grpo(entropy_coef=0.1)
    whole = weight.clone().requires_grad_()
    linear_policy_loss(hidden, whole, b, objective).loss.backward()
    half = slice(5 * rank, 5 * rank + 5)
    for shape in ((1, 2), (2, 1)):
        head = torch.nn.Linear(D, V, bias=False)
        head.weight.data.copy_(weight)
        fully_shard(head, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
        with pytest.raises(TypeError, match="got a DTensor") as refused:
            linear_policy_loss(hidden[half], head.weight, _rows(b, half), objective)
        remedy = re.search(r"\.full_tensor\(.*?ndim\)", str(refused.value))[0]
        gathered = eval("weight" + remedy, {"weight": head.weight, "Partial": Partial})
        loss = linear_policy_loss(hidden[half].clone().requires_grad_(), gathered, _rows(b, half), objective).loss
        (loss * dist.get_world_size()).backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), whole.grad)
    mesh = init_device_mesh("cpu", (2,))
    shard = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    linear_policy_loss(hidden, shard.to_local(), b, objective, process_group=mesh.get_group()).loss.backward()
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)


def test_the_remedies_for_a_distributed_weight_give_the_gradients_of_the_whole(tmp_path):
    _in_two_ranks(_check_remedies, tmp_path)
