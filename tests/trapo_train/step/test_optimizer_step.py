"""One optimizer step: what it updates and what it reports."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trapo_kernels import Role, objectives
from trapo_train.models.attention import PACKED_IMPLEMENTATION
from trapo_train.models.model import enable_gradient_checkpointing, install_policy_head, policy_forward, score
from trapo_train.records import Problem, Sample
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer, build_scheduler
from trapo_train.step.optimizer_step import optimizer_step
from trapo_train.step.packing import PackingConfig, pack


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=PACKED_IMPLEMENTATION)
    install_policy_head(model, compute_dtype=torch.float32)
    return model


def make_samples(advantages=(0.5, -0.5, 0.25), prefixes=(0, 0, 4)) -> list[Sample]:
    generator = random.Random(0)
    draw = lambda count: tuple(generator.randrange(11) for _ in range(count))  # noqa: E731
    return [
        Sample(
            problem=Problem(index, "", draw(3)), micro_group=1, prefix_ratio=0.0, prefix_ids=draw(prefix),
            completion_ids=draw(5), completion_logprobs=(-2.0,) * 5, finish_reason="stop", advantage=advantage,
        )
        for index, (advantage, prefix) in enumerate(zip(advantages, prefixes, strict=True))
    ]  # fmt: skip


def packed(samples, objective, max_tokens=1000):
    return pack(samples, PackingConfig(max_tokens), objective, max_response_tokens=10)


def step(model, micro_batches, objective, config=None, optimizer=None, scheduler=None, temperature=1.0):
    config = config or OptimizerConfig(learning_rate=1e-2)
    optimizer = optimizer or build_optimizer(model, config)
    scheduler = scheduler or build_scheduler(optimizer, config, steps=10)
    return optimizer_step(model, optimizer, scheduler, micro_batches, objective, temperature, config.max_grad_norm)


def with_stream(micro_batch, name, values):
    return replace(micro_batch, batch=replace(micro_batch.batch, **{name: values}))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_step_lowers_the_loss_and_clears_the_gradients():
    model, objective = make_model(), objectives.sft()
    micro_batches = packed(make_samples(prefixes=(3, 3, 4)), objective)
    config = OptimizerConfig(learning_rate=1e-2)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, steps=10)
    losses = [step(model, micro_batches, objective, config, optimizer, scheduler)["loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_recomputes_activations_after_an_evaluation_too():
    """Gradient checkpointing works in training mode alone."""
    model, objective, ran = make_model().eval(), objectives.sft(), []
    enable_gradient_checkpointing(model)
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(1))
    micro_batches = packed(make_samples(prefixes=(3, 3, 4)), objective, 14)
    step(model, micro_batches, objective)
    assert len(ran) == 2 * len(micro_batches) > 2


def test_metrics_of_a_step_do_not_depend_on_the_split():
    objective = objectives.trapo(entropy_coef=0.01)
    results = []
    for max_tokens in (1000, 14):
        micro_batches = packed(make_samples(), objective, max_tokens)
        results.append(step(make_model(), micro_batches, objective))
    whole, split = results
    assert split.pop("micro_batches") > whole.pop("micro_batches") == 1
    assert whole.pop("trsft/weight_histogram") == split.pop("trsft/weight_histogram")
    assert whole == pytest.approx(split, rel=1e-5)


def test_metrics_describe_the_tokens():
    model, objective = make_model(), objectives.trapo(alpha=0.1)
    (micro_batch,) = packed(make_samples(), objective)
    out = policy_forward(model, micro_batch, objective)
    expert, rollout = (micro_batch.batch.role == role for role in (Role.EXPERT, Role.ROLLOUT))
    metrics = step(model, [micro_batch], objective)
    assert metrics["loss"] == pytest.approx(float(out.loss.detach()))
    assert metrics["loss_tokens"] == 4 + 15
    assert metrics["entropy/rollout"] == pytest.approx(float(out.entropy[rollout].mean()), rel=1e-5)
    assert metrics["entropy/expert"] == pytest.approx(float(out.entropy[expert].mean()), rel=1e-5)
    trsft = (out.logprob[expert].exp() / 0.1).clamp(max=1.0)
    assert metrics["trsft/weight_mean"] == pytest.approx(float(trsft.mean()), rel=1e-5)
    assert metrics["trsft/share_below_alpha"] == pytest.approx(float((trsft < 1).float().mean()))
    assert metrics["trsft/weight_histogram"] == torch.histc(trsft, 10, 0, 1).int().tolist()
    assert sum(metrics["trsft/weight_histogram"]) == 4
    assert metrics["rollout/mismatch_kl"] == pytest.approx(-2.0 - float(out.logprob[rollout].mean()), rel=1e-5)
    assert metrics["rollout/mismatch_above_10_percent"] > 0.5
    off = (out.logprob[rollout] + 2.0).abs()
    assert metrics["rollout/mismatch_p95"] == pytest.approx(float(off.quantile(0.95)), rel=1e-5)
    assert metrics["rollout/ratio_max"] == 1.0
    at_half = policy_forward(make_model(), micro_batch, objective, 0.5).loss.item()
    assert step(make_model(), [micro_batch], objective, temperature=0.5)["loss"] == pytest.approx(at_half) != metrics["loss"]


def test_several_updates_do_not_look_like_a_sampler_that_disagrees():
    model, objective = make_model(), objectives.trapo()
    (micro_batch,) = packed(make_samples(), objective)
    old = micro_batch.batch.rollout_logprob + 0.05  # what the policy that sampled gives, wherever training has moved it since
    batch = replace(micro_batch.batch, old_logprob=old)
    metrics = step(model, [replace(micro_batch, batch=batch)], objective)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(-0.05, abs=1e-6)
    assert metrics["rollout/mismatch_p95"] == pytest.approx(0.05, abs=1e-6)


def test_the_histogram_is_of_trsft_alone():
    model, objective = make_model(), objectives.iw_sft_token()
    samples = make_samples()
    (micro_batch,) = packed(samples, objective)
    batch = replace(micro_batch.batch, ref_logprob=micro_batch.batch.rollout_logprob)
    assert "trsft/weight_histogram" not in step(model, [replace(micro_batch, batch=batch)], objective)


def test_sampler_that_agrees_has_no_mismatch():
    model, objective = make_model(), objectives.dr_grpo()
    (micro_batch,) = packed(make_samples(prefixes=(0, 0, 0)), objective)
    agreed = replace(micro_batch.batch, rollout_logprob=policy_forward(model, micro_batch, objective).logprob)
    metrics = step(model, [replace(micro_batch, batch=agreed)], objective)
    assert metrics["rollout/mismatch_kl"] == 0.0
    assert metrics["rollout/mismatch_above_10_percent"] == 0.0


def test_a_role_without_tokens_is_not_reported():
    objective = objectives.trapo()
    metrics = step(make_model(), packed(make_samples(prefixes=(0, 0, 0)), objective), objective)
    assert not [name for name in metrics if "expert" in name or "trsft" in name]
    assert all(math.isfinite(value) for value in metrics.values())


def test_gradients_are_clipped_to_the_norm_and_reported_before():
    objective = objectives.trapo()
    micro_batches = packed(make_samples(), objective)
    config = OptimizerConfig("SGD", learning_rate=1.0, max_grad_norm=1e-3)
    model = make_model()
    before = weights(model)
    metrics = step(model, micro_batches, objective, config)
    assert metrics["grad_norm"] > 1e-2
    assert float((weights(model) - before).norm()) == pytest.approx(1e-3, rel=1e-2)
    free = make_model()
    step(free, micro_batches, objective, replace(config, max_grad_norm=0.0))
    assert float((weights(free) - before).norm()) == pytest.approx(metrics["grad_norm"], rel=1e-2)


def test_non_finite_step_changes_nothing_but_the_schedule():
    model, objective = make_model(), objectives.trapo()
    micro_batches = packed(make_samples(), objective)
    config = OptimizerConfig(learning_rate=1e-2, schedule="linear")
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, steps=10)
    step(model, micro_batches, objective, config, optimizer, scheduler)
    before, state = weights(model), torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()])
    overflow = torch.full_like(micro_batches[0].batch.weight, -1e4)  # a ratio of e^10000
    broken = replace(micro_batches[0].batch, old_logprob=overflow)
    metrics = step(model, [replace(micro_batches[0], batch=broken)], objective, config, optimizer, scheduler)
    assert metrics["skipped_step"] == 1
    assert torch.equal(weights(model), before)
    assert torch.equal(torch.cat([s["exp_avg"].flatten() for s in optimizer.state.values()]), state)
    metrics = step(model, micro_batches, objective, config, optimizer, scheduler)
    assert metrics["skipped_step"] == 0
    assert metrics["learning_rate"] == pytest.approx(1e-2 * 0.8)


def test_an_update_without_a_loss_token_moves_nothing_though_the_optimizer_has_momentum():
    model, objective = make_model(), objectives.dr_grpo()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    assert step(model, packed(make_samples(), objective), objective, optimizer=optimizer)["loss_tokens"] > 0
    moved = [p.detach().clone() for p in model.parameters()]
    assert not all(map(torch.equal, before, moved))
    assert step(model, packed([], objective), objective, optimizer=optimizer)["loss_tokens"] == 0
    assert all(map(torch.equal, moved, model.parameters()))


def test_a_gradient_that_is_not_finite_skips_the_step_of_a_finite_loss():
    model, objective = make_model(), objectives.trapo()
    before = weights(model)
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("inf"))
    metrics = step(model, packed(make_samples(), objective), objective)
    assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    assert metrics["skipped_step"] == 1 and torch.equal(weights(model), before)


def test_a_step_without_any_loss_moves_momentum_only():
    model, objective = make_model(), objectives.dr_grpo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch says that the schedule skipped its first value, which it did not
        metrics = step(model, packed(make_samples((0.0, 0.0, 0.0)), objective), objective)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["loss_tokens"] == 0
    assert metrics["skipped_step"] == 0


def test_a_warning_that_was_shown_is_not_shown_again_at_every_step():
    model, objective = make_model(), objectives.trapo()
    config = OptimizerConfig(learning_rate=1e-2)
    optimizer = build_optimizer(model, config)
    parts = {"optimizer": optimizer, "scheduler": build_scheduler(optimizer, config, steps=4)}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            step(model, packed(make_samples(), objective), objective, config, **parts)
            warnings.warn("said", stacklevel=1)
    assert [str(warning.message) for warning in shown].count("said") == 1


@pytest.mark.parametrize("name", sorted(set(objectives.PRESETS) - {"exgrpo"}))
def test_every_preset_trains_a_step_whatever_the_split(name):
    objective = objectives.PRESETS[name]()
    results, moved = [], []
    for max_tokens in (1000, 14):
        model = make_model()
        before = weights(model)
        micro_batches = packed(make_samples((0.5, -0.5, 0.25), (2, 0, 4)), objective, max_tokens)
        if "ref_logprob" in objective.reads():
            micro_batches = [with_stream(m, "ref_logprob", score(model, m) - 0.1) for m in micro_batches]
        results.append(step(model, micro_batches, objective))
        moved.append(weights(model) - before)
    whole, split = results
    assert whole["skipped_step"] == 0
    assert whole["loss_passes"] == (1 if objective.why_two_passes(on_policy=True) is None else 2)
    assert whole["grad_norm"] > 0
    assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-4)
    assert whole["loss"] == pytest.approx(split["loss"], rel=1e-4, abs=1e-7)
    assert bool(moved[0].abs().max() > 0)


@pytest.mark.parametrize("name", sorted(name for name in objectives.PRESETS if "old_logprob" in objectives.PRESETS[name]().reads()))
def test_presets_with_a_ratio_train_off_policy_too(name):
    objective = objectives.PRESETS[name]()
    results = []
    for max_tokens in (1000, 14):
        model = make_model()
        prefixes = (0, 0, 0) if name == "exgrpo" else (2, 0, 4)
        micro_batches = packed(make_samples((0.5, -0.5, 0.25), prefixes), objective, max_tokens)
        scored = [score(model, m) for m in micro_batches]
        micro_batches = [with_stream(m, "old_logprob", logprob - 1e-4) for m, logprob in zip(micro_batches, scored, strict=True)]
        if "ref_logprob" in objective.reads():
            micro_batches = [with_stream(m, "ref_logprob", x) for m, x in zip(micro_batches, scored, strict=True)]
        results.append(step(model, micro_batches, objective))
    whole, split = results
    assert whole["grad_norm"] > 0 and whole["skipped_step"] == 0
    assert whole["loss_passes"] == (1 if objective.why_two_passes(on_policy=False) is None else 2)
    assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-4)


def test_a_step_reports_the_most_passes_that_one_of_its_micro_batches_took():
    objective = objectives.gspo()
    off_policy, on_policy = packed(make_samples(prefixes=(0, 0, 0))[:2], objective, 8)
    off_policy = with_stream(off_policy, "old_logprob", score(make_model(), off_policy))
    assert step(make_model(), [off_policy, on_policy], objective)["loss_passes"] == 2
    assert step(make_model(), [on_policy], objective)["loss_passes"] == 1


def test_a_missing_stream_is_named():
    objective = objectives.iw_sft()
    with pytest.raises(ValueError, match="ref_logprob"):
        step(make_model(), packed(make_samples(prefixes=(2, 2, 2)), objective), objective)
