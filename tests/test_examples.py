"""The examples run, and what they replace in a framework changes no loss, gradient or metric of it."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset

from trapo_kernels import objectives
from trapo_train.tasks import build_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed (extra [bench])")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sft_example(monkeypatch):
    """examples/trl_sft.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import trl_sft

    yield trl_sft
    del sys.modules["trl_sft"]


@pytest.fixture
def example(monkeypatch):
    """examples/trl_grpo.py as a module, and TRL as it was afterwards."""
    import trl.trainer.grpo_trainer
    import trl.trainer.rloo_trainer

    for trainer in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        monkeypatch.setattr(trainer, "add_fused_lm_head", trainer.add_fused_lm_head)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import trl_grpo

    yield trl_grpo
    del sys.modules["trl_grpo"]


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer and a small random model."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _inputs(vocabulary):
    """Four completions of up to 6 tokens after prompts of 3, padded on the left, as GRPOTrainer hands them to its loss."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]).long()
    return {
        "prompt_ids": torch.randint(3, vocabulary, (4, 3), generator=generator),
        "prompt_mask": (torch.arange(3) >= torch.tensor([0, 1, 2, 0])[:, None]).long(),
        "completion_ids": torch.randint(3, vocabulary, (4, 6), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8]),
        "old_per_token_logps": -3.0 + 0.3 * torch.randn(4, 6, generator=generator),
        "ref_per_token_logps": -3.0 + 0.3 * torch.randn(4, 6, generator=generator),
        "old_logps": torch.tensor([-18.0, -9.0, -3.0, -15.0]),
        "num_items_in_batch": mask.sum(),
    }


def _loss(method, model, settings):
    """Loss, gradients and metrics of TRL's trainer on the same inputs."""
    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[method]
    given = {"output_dir": f"{model}/run", "use_cpu": True, "report_to": "none", "bf16": False, "max_completion_length": 6}
    args = config(per_device_train_batch_size=4, num_generations=4, **given | settings)
    made = trainer(model, reward_funcs=lambda **_: [], args=args, train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}))
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model.train(), _inputs(made.model.config.vocab_size))
    loss.backward()
    return loss.detach(), [weight.grad for weight in made.model.parameters()], dict(made._metrics["train"])


CASES = [
    ("grpo", {"loss_type": "dapo", "beta": 0.04}),
    ("grpo", {"loss_type": "grpo", "temperature": 0.7, "importance_sampling_level": "sequence"}),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.5}),
    ("grpo", {"loss_type": "dr_grpo", "entropy_coef": 0.1, "cast_lm_head_to_fp32": True}),
    ("rloo", {"beta": 0.05}),
]


@pytest.mark.parametrize(("method", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else ", ".join(map(str, x.values())))
def test_trl_s_trainers_have_the_same_loss_gradients_and_metrics_on_our_head(method, settings, example, model):
    theirs = _loss(method, model, settings)
    example.use_trapo_head()
    torch.testing.assert_close(_loss(method, model, settings), theirs, rtol=1e-4, atol=1e-5)


def test_the_trl_example_trains(example, model, tmp_path, monkeypatch, capsys):
    arguments = ["--model", model, "--steps", 2, "--max-completion-length", 5, "--output-dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", *map(str, arguments)])
    example.main()
    assert "train_loss" in capsys.readouterr().out


def test_a_trainer_that_wants_what_the_head_does_not_have_is_refused(example):
    with pytest.raises(ValueError, match=r"outputs must be among \['entropy', 'log_probs'\], got \('log_probs', 'is_top1'\)"):
        example.add_trapo_head(torch.nn.Module(), outputs=("log_probs", "is_top1"))


def _trained(trainer, model, **more):
    """An SFT trainer of TRL's after two steps of two micro-batches of unequal lengths, and its weights."""
    given = {"output_dir": f"{model}/run", "use_cpu": True, "report_to": "none", "bf16": False, "save_strategy": "no"}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = trl.SFTConfig(optim="sgd", learning_rate=0.1, **given, **steps)
    rows = [{"prompt": "ab" * (1 + i % 3), "completion": "cd" * (1 + i % 2)} for i in range(8)]
    made = trainer(model, args=args, train_dataset=Dataset.from_list(rows), **more)
    made.train()
    return made, {name: weight.detach() for name, weight in made.model.named_parameters()}


def test_trl_s_sft_trainer_ends_with_the_same_weights_under_fuse_loss(sft_example, model):
    _, theirs = _trained(trl.SFTTrainer, model)
    made, ours = _trained(sft_example.FusedSFTTrainer, model, objective=objectives.sft())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert made.state.log_history[-1].keys() >= {"train_loss", "expert/logprob"}


def test_the_trl_sft_example_trains(sft_example, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", "--model", model, "--steps", "2", "--output-dir", str(tmp_path / "run")])
    sft_example.main()
    assert "expert/trsft_weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [{"args": {"loss_type": "dft"}}, {"compute_metrics": len}], ids=["loss_type", "compute_metrics"]
)
def test_what_the_sft_example_would_not_do_is_refused(settings, sft_example, model, tmp_path):
    more = dict(settings)
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **more.pop("args", {}))
    rows = Dataset.from_list([{"prompt": "ab", "completion": "cd"}])
    with pytest.raises(ValueError, match="loss_type must be 'nll' and compute_metrics None"):
        sft_example.FusedSFTTrainer(model, args=args, train_dataset=rows, objective=objectives.dft(), **more)
