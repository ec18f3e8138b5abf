"""Metrics of micro-batches and ranks merge to those of one call on all of their tokens."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.trapo_kernels import cases
from trapo_kernels import KL, Role, merged_metrics, metric_count, objectives, policy_loss

NUM_TOKENS = 70


def _objective(name):
    objective = objectives.PRESETS[name](entropy_coef=0.1)
    return replace(objective, kl=KL(0.1)) if objective.rollout else objective


def _batch():
    """Counts that differ: a third of the tokens has no weight and its entropy bonus or KL alone, a fifth has no KL."""
    b, row = cases.batch(NUM_TOKENS, 40), torch.arange(NUM_TOKENS, device=cases.DEVICE)
    return replace(b, weight=torch.where(row % 3 == 0, 0.0, b.weight), kl_weight=torch.where(row % 5 == 0, 0.0, b.weight))


def _metrics(name, b):
    generator = torch.Generator().manual_seed(3)
    entropy = torch.rand(NUM_TOKENS, generator=generator, dtype=torch.float64).to(cases.DEVICE)
    logprob = b.old_logprob / 2
    whole = policy_loss(logprob, entropy, b, _objective(name)).metrics
    return whole, lambda rows: policy_loss(logprob[rows], entropy[rows], cases.subset(b, rows), _objective(name)).metrics


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_any_split_merges_to_the_metrics_of_the_whole(name, num_parts):
    b = _batch()
    whole, of = _metrics(name, b)
    parts = [of(rows) for rows in cases.whole_sequences(b, num_parts)]
    for given in (parts, [merged_metrics(parts[:1]), *parts[1:]], [merged_metrics(parts)]):
        merged = merged_metrics(given)
        assert list(merged) == list(whole)
        for metric, value in whole.items():
            torch.testing.assert_close(merged[metric], value.double(), rtol=1e-5, atol=1e-6, msg=metric)


def test_a_part_without_tokens_changes_nothing():
    b = _batch()
    whole, of = _metrics("trapo", b)
    nothing = of((b.role == Role.IGNORED).nonzero().squeeze(1))
    merged = merged_metrics([nothing, whole, nothing])
    assert all(torch.equal(merged[name], value.double()) for name, value in whole.items())


def _rank(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    b, alone = _batch(), [dist.new_group([0]), dist.new_group([1])]
    for name in ("grpo", "sft"):  # with a maximum, and without one
        whole, of = _metrics(name, b)
        torch.manual_seed(0)
        mine = [of(rows) for rows in cases.whole_sequences(b, 5)[rank::2]]  # three, and two
        merged = merged_metrics(mine, process_group=dist.group.WORLD)
        for metric, value in whole.items():
            torch.testing.assert_close(merged[metric], value.double(), rtol=1e-5, atol=1e-6, msg=metric)
        of_this_rank = merged_metrics(mine)
        assert merged_metrics(mine, process_group=alone[rank]) == of_this_rank != merged
    dist.destroy_process_group()


@cases.SLOW_ON_A_CPU
@pytest.mark.skipif(cases.DEVICE != "cpu", reason="gloo, on CPU tensors")
def test_the_ranks_of_a_group_merge_by_two_reductions(tmp_path):
    ranks.start(_rank, 2, str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rollout/clip_low", "rollout/trained_count"),
        ("rollout/ratio_max", "rollout/trained_count"),
        ("expert/prob", "expert/count"),
        ("rollout/kl_ref_k3", "rollout/kl_count"),
        ("rollout/kl_old_k3", "rollout/trained_count"),
        ("expert/count", "expert/count"),
    ],
)
def test_the_count_of_a_metric(name, count):
    assert metric_count(name) == count


def test_what_cannot_be_merged_is_refused():
    whole, _ = _metrics("grpo", _batch())
    with pytest.raises(ValueError, match=r"parts must hold the metrics of at least one call, got none\. Pass"):
        merged_metrics([])
    with pytest.raises(TypeError, match=r"a part must be a Mapping, got str\. Pass out\.metrics\."):
        merged_metrics(["rollout/count"])
    with pytest.raises(TypeError, match=r"/count must be a Tensor, got float\. Pass out\.metrics as they are, before"):
        merged_metrics([whole, {name: float(x) for name, x in whole.items()}])
    with pytest.raises(ValueError, match=r"the same metrics, got \['rollout/prob'\] in some\. Merge those of one objective"):
        merged_metrics([whole, {name: x for name, x in whole.items() if name != "rollout/prob"}])
    with pytest.raises(ValueError, match=r"rollout/clip_low is a mean over rollout/trained_count, got parts without it\."):
        merged_metrics([{"rollout/clip_low": whole["rollout/clip_low"]}])
    with pytest.raises(ValueError, match=r"name must be that of a metric, .*got 'loss'\. Pass a key of out\.metrics"):
        merged_metrics([whole | {"loss": whole["rollout/count"]}])
