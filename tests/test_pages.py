"""The public pages: their Python runs and is the model's own loss, or the frameworks', on one rank, under DDP and under FSDP2."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trapo_kernels
from tests import ranks
from tests.hf_models import MODELS, small_model
from trapo_kernels import LossTotals, TokenBatch

ROOT = Path(__file__).parents[1]
README, PAGE = (ROOT / "README.md").read_text(), (ROOT / "trapo_kernels" / "README.md").read_text()
# The first example and SFT; of the kernels' page the module, a GRPO step from padded tensors and from packed ones, and DPO.
FIRST, SFT, MODULE, PADDED, PACKED, DPO = re.findall(r"```python\n(.*?)```", README + PAGE, re.S)


@pytest.mark.slow
def test_readme_python_runs(tmp_path):
    result = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


def test_readme_sft_is_the_model_s_own_loss():
    model, input_ids = small_model("Gemma2"), torch.randint(3, 50, (2, 9))
    labels = torch.where(torch.arange(9) < 3, -100, input_ids)
    names = {"objectives": trapo_kernels.objectives, "model": model, "input_ids": input_ids, "labels": labels}
    own = model(input_ids, labels=labels).loss
    exec(SFT, names)
    torch.testing.assert_close(names["loss"], own)


def _sequences():
    """Prompts of 4 tokens, padded on the left, completions of 6, on the right; seven of them."""
    prompt, response = torch.tensor([4, 2, 3, 4, 1, 2, 4]), torch.tensor([6, 3, 0, 5, 2, 6, 1])
    mask = (torch.arange(6) < response[:, None]).long()
    return {
        "input_ids": torch.randint(3, 50, (7, 10)),
        "attention_mask": torch.cat([(torch.arange(4) >= 4 - prompt[:, None]).long(), mask], 1),
        "mask": mask,
        "old_logprob": -3.9 + 0.3 * torch.randn(7, 6),
        "ref_logprob": -3.9 + 0.3 * torch.randn(7, 6),
        "advantage": torch.randn(7),
    }


def _grpo_gradient(model, given):
    """By autograd over whole logits, as TRL writes it, and the ratios [7, 6]."""
    mask = given["mask"]
    logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, 3:-1]
    logprob = logits.log_softmax(-1).gather(-1, given["input_ids"][:, 4:, None])[..., 0]
    ratio, advantage = (logprob - given["old_logprob"]).exp(), given["advantage"][:, None]
    d = given["ref_logprob"] - logprob
    of_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.04 * (d.exp() - d - 1)
    loss = ((of_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True), ratio.detach()


def _gradients(model):
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]


def _check_gradient(found, exact):
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(max(x.abs().max() for x in exact)))


def _names(step, world_size, given):
    counted = {"torch": torch, "dist": dist, "step": step, "device": "cpu", "world_size": world_size}
    return vars(trapo_kernels) | counted | given


def _step(model):
    names = vars(trapo_kernels) | {"torch": torch}
    exec(MODULE, names)
    return names["Step"](model)


@pytest.mark.parametrize("name", MODELS)
def test_the_page_s_grpo_of_two_ranks_is_that_of_all_sequences(name):
    """Ranks of 3 and 4 sequences, one after the other, in micro-batches of 2."""
    model, given = small_model(name), _sequences()
    exact, ratio = _grpo_gradient(model, given)

    def all_reduce(counts):
        counts.copy_(torch.stack([given["mask"].sum(), torch.tensor(7)]))

    merged = []
    for rank in (slice(0, 3), slice(3, 7)):
        names = _names(_step(model), 2, {name: x[rank] for name, x in given.items()})
        names["dist"] = SimpleNamespace(all_reduce=all_reduce)
        exec(PADDED, names)
        merged.append(names["metrics"])
    _check_gradient([grad / 2 for grad in _gradients(model)], exact)  # their mean, as DDP takes it
    whole = trapo_kernels.merged_metrics(merged)
    assert whole["rollout/count"] == given["mask"].sum()
    torch.testing.assert_close(whole["rollout/ratio"].float(), ratio[given["mask"] > 0].mean())


def _rank(rank, wrapper):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, given = small_model("Phi"), _sequences()
    exact, _ = _grpo_gradient(model, given)
    step = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}[wrapper](_step(model))
    mine = slice(0, 3) if rank == 0 else slice(3, 7)
    exec(PADDED, _names(step, 2, {name: x[mine] for name, x in given.items()}))
    _check_gradient([x.full_tensor() if wrapper == "FSDP2" else x for x in _gradients(model)], exact)
    dist.destroy_process_group()
    os._exit(0)  # while the wrapped model still lives: to free it here can wait forever for gloo's threads (torch 2.13)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_the_page_s_grpo_is_reduced_over_two_ranks(wrapper):
    ranks.start(_rank, 2, wrapper)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma4", "HyperCLOVAX"])
def test_the_page_s_packed_grpo_is_that_of_padded_sequences(name):
    model, given = small_model(name), _sequences()
    exact, _ = _grpo_gradient(model, given)
    real = given["attention_mask"] > 0

    def of_completion(x):
        return torch.nn.functional.pad(x, (4, 0))[real]  # 0 for the prompt's tokens

    streams = {x: of_completion(given[x]) for x in ("old_logprob", "ref_logprob")}
    streams |= {"response": of_completion(given["mask"]) > 0, "advantage": given["advantage"].repeat_interleave(real.sum(1))}
    rows = {"input_ids": given["input_ids"][real][None], "position_ids": (real.cumsum(1) - 1)[real][None]}
    cut = int(real[:3].sum())
    more = {"parts": [slice(0, cut), slice(cut, None)], "dist": SimpleNamespace(all_reduce=lambda counts: None)}
    names = _names(_step(model), 1, streams | rows | more)
    exec(PACKED, names)
    assert names["totals"] == LossTotals(rollout_tokens=int(given["mask"].sum()), sequences=7)
    _check_gradient(_gradients(model), exact)


@pytest.mark.parametrize("name", ["Qwen2", "Phi", "Gemma4"])
def test_the_page_s_dpo_is_that_of_whole_logits(name):
    """As TRL writes its sigmoid loss; of three pairs the last has an empty rejected response."""
    model, given = small_model(name), {key: x[[0, 1, 3, 4, 5, 2]] for key, x in _sequences().items()}
    response, reference = torch.nn.functional.pad(given["mask"], (4, 0)), -20 * torch.rand(6)
    inputs = (given["input_ids"], given["attention_mask"])
    logits = model(inputs[0], attention_mask=inputs[1]).logits[:, 3:-1]
    logprob = logits.log_softmax(-1).gather(-1, inputs[0][:, 4:, None])[..., 0]
    chosen, rejected = ((logprob * given["mask"]).sum(1) - reference).chunk(2)
    exact = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    names = vars(trapo_kernels) | {"torch": torch}
    exec(DPO, names)
    ours = names["dpo_loss"](model, *inputs, response, reference)
    torch.testing.assert_close(ours, exact)
    weights = list(model.parameters())
    _check_gradient(*(torch.autograd.grad(loss, weights, materialize_grads=True) for loss in (ours, exact)))


TRL = {"max_completion_length": 9, "ga": 3, "num_items_in_batch": 67.0, "num_processes": 2, "steps_per_generation": 4}
VERL = {"batch_num_tokens": 40, "global_batch_size": 11, "loss_scale_factor": 8}
# As TRL 1.16 and the agg_loss of verl 0.9 write them; `x` [B, T] are the losses of tokens.
FRAMEWORKS = {
    "TRL grpo, sapo": lambda x, mask: ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / TRL["ga"],
    "TRL bnpo": lambda x, mask: (x * mask).sum() / mask.sum().clamp(min=1.0) / TRL["ga"],
    "TRL dr_grpo": lambda x, mask: (x * mask).sum() / (x.size(0) * TRL["max_completion_length"]) / TRL["ga"],
    "TRL luspo": lambda x, mask: (x * mask).sum(-1).mean() / TRL["ga"],
    "TRL dapo, cispo": lambda x, mask: (x * mask).sum() / (67.0 / 2 * TRL["ga"] / 4),
    "verl token-mean": lambda x, mask: (x * mask).sum() / 40,
    "verl token-sum": lambda x, mask: (x * mask).sum(),
    "verl seq-mean-token-mean": lambda x, mask: ((x * mask).sum(-1) / (mask.sum(-1) + 1e-8)).sum() / 11,
    "verl seq-mean-token-sum": lambda x, mask: (x * mask).sum(-1).sum() / 11,
    "verl seq-mean-token-sum-norm": lambda x, mask: (x * mask).sum(-1).sum() / 11 / 8,
}


def _framework_rows():
    (table,) = re.findall(r"^\| setting \|.*?\n\n", PAGE, re.S | re.M)
    return {name.replace("`", ""): cell for name, cell in re.findall(r"^\| (\w+ `.*?) \| .*?`(.*)` \|$", table, re.M)}


@pytest.mark.parametrize("mode", ["sequence_mean", "sequence_sum"])
def test_the_page_s_sequences_are_those_that_verl_counts_without_a_global_batch_size(mode):
    mask, x = (torch.arange(6) < torch.tensor([6, 0, 4, 2])[:, None]).long(), torch.rand(4, 6)
    kept = eval(re.search(r"Without a `global_batch_size` verl counts only [^`]*`(.*?)`: drop the others", PAGE)[1], {"mask": mask})
    batch = TokenBatch.from_padded(mask[kept], mask[kept], aggregation=mode)
    of_sequence = (x * mask).sum(-1) / ((mask.sum(-1) + 1e-8) if mode == "sequence_mean" else 1)
    seq_mask = (mask.sum(-1) > 0).float()
    torch.testing.assert_close((batch.weight * x[kept].flatten()).sum(), (of_sequence * seq_mask).sum() / seq_mask.sum())


@pytest.mark.parametrize("setting", FRAMEWORKS)
def test_the_page_s_normalisers_are_the_frameworks(setting):
    rows = _framework_rows()
    assert list(rows) == list(FRAMEWORKS)
    mask, x = (torch.arange(6) < torch.tensor([6, 0, 4, 2])[:, None]).long(), torch.rand(4, 6)
    names = vars(trapo_kernels) | TRL | VERL | {"mask": mask, "B": 4, "torch": torch, "rho": torch.rand(4, 6)}
    names["normalizer"] = eval(re.search(r"`normalizer` is `(.*?)`", PAGE)[1], names)
    plain, corrected = (
        eval(f"TokenBatch.from_padded(mask, mask, {rows[setting]}, correction={correction})", names) for correction in (None, "rho")
    )
    loss, of_kl = FRAMEWORKS[setting](x * names["rho"], mask), FRAMEWORKS[setting](x, mask)
    for weight, expected in ((plain.weight, of_kl), (corrected.weight, loss), (corrected.kl_weight, of_kl)):
        torch.testing.assert_close((weight * x.flatten()).sum(), expected)


def test_the_page_s_entropy_weight_is_trl_s():
    mask = (torch.arange(6) < torch.tensor([6, 1, 4])[:, None]).long()
    batch = TokenBatch.from_padded(torch.zeros_like(mask), mask, aggregation="sequence_mean")
    weighted = re.search(r"`(dataclasses\.replace\(batch, entropy_weight=.*?)`", PAGE)[1]
    entropy = torch.rand(3, 6)
    found = eval(weighted, {"dataclasses": dataclasses, "batch": batch, "mask": mask, "ga": 3})
    found = (found.weight_of_entropy * entropy.flatten()).sum()
    torch.testing.assert_close(found, (entropy * mask).sum() / mask.sum() / 3)
