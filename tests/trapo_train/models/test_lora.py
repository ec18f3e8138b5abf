"""LoRA: only adapters are trained and saved, the model without them is the reference, and the export is a plain model."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.trapo_train.step.test_optimizer_step import make_model
from tests.trapo_train.test_train import build_config, exported, train_to_end
from trapo_train import extras
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.checkpoints.export import export_adapter, export_model
from trapo_train.checkpoints.model_state import whole_weights
from trapo_train.config import load_config
from trapo_train.extras import check_packages
from trapo_train.memory import plan as memory
from trapo_train.memory.plan import load_architecture
from trapo_train.memory.trace import weigh
from trapo_train.models.lora import (
    LoraConfig,
    adapted_layers,
    add_lora,
    has_lora,
    hold_frozen,
    names_as_they_are,
    other_layers,
    without_lora,
)
from trapo_train.models.model import ModelConfig, body_autocast, install_policy_head, load_model_and_tokenizer
from trapo_train.schema import ConfigError, MissingPackage
from trapo_train.tasks import build_tokenizer
from trapo_train.train import Trainer

peft = pytest.importorskip("peft", reason="PEFT is not installed (extra [peft])")
IDS = torch.tensor([[1, 5, 2, 7]])
# A reward that an untrained model earns half of the time, and an objective that reads the reference model.
RUN = (
    "model.lora={rank: 4, target_modules: [q_proj, down_proj]}",
    "reward='tests.trapo_train.step.test_updates:coin'",
    "objective={name: grpo, options: {beta: 0.1}}",
    "plan.name=grpo",
)


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def _perturbed(model):
    """The model with adapters that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def experts_config(name, has_experts=True):
    """A tiny model of the architecture, with experts."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_local_experts": 2}
    return AutoConfig.for_model(name, vocab_size=8, **shape, **(experts if has_experts else {}))


def test_a_new_adapter_changes_nothing_and_is_all_that_trains():
    model = make_model()
    before = model(input_ids=IDS).logits
    add_lora(model, LoraConfig(rank=3))
    assert torch.equal(model(input_ids=IDS).logits, before) and has_lora(model) and not has_lora(make_model())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_without_its_adapters_the_model_is_what_it_was():
    model = make_model()
    before = model(input_ids=IDS).logits
    add_lora(model, LoraConfig())
    _perturbed(model)
    with without_lora(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
        # FSDP2 looks in its first pass, which may be this one, at what is trained and how its gradients are to be reduced.
        assert any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_export_is_a_plain_model_with_the_same_logits(tmp_path, rank_stabilised):
    model = make_model()
    add_lora(model, LoraConfig(rank=3, alpha=5.0, rank_stabilised=rank_stabilised))
    _perturbed(model)
    export_model(model, build_tokenizer(), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert not has_lora(plain)
    torch.testing.assert_close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_export_of_a_tied_model_holds_its_head_once(tmp_path):
    """A state dict names it twice, and who writes that doubles the file's largest tensor."""
    config = Qwen2Config(
        vocab_size=len(build_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    add_lora(model, LoraConfig(rank=3))
    export_model(_perturbed(model), build_tokenizer(), tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_frozen_weights_are_held_in_the_type_of_their_gemms_and_give_the_same_bits(tied, tmp_path):
    """A cast weight is a cast weight, whether it was cast once or for every pass."""
    logits, gradients = {}, {}
    for hold in (False, True):
        torch.manual_seed(0)
        model = make_model()
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        add_lora(model, LoraConfig(rank=3, target_modules=["q_proj", "down_proj"]))
        install_policy_head(model, compute_dtype=torch.bfloat16, check_logits=False)
        _perturbed(model)
        if hold:
            hold_frozen(model, torch.bfloat16)
        with body_autocast(model):
            logits[hold] = model(input_ids=IDS).logits
            logits[hold].float().logsumexp(-1).sum().backward()
        gradients[hold] = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert torch.equal(logits[True], logits[False])
    assert gradients[True] and all(map(torch.equal, gradients[True], gradients[False]))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    float32 = ("lora_", "norm")
    assert {torch.float32, torch.bfloat16} == set(dtypes.values()) and dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all((dtype == torch.float32) == any(part in name for part in float32) for name, dtype in dtypes.items())
    exported = load_file(export_model(model, build_tokenizer(), tmp_path / "model") / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_saves_adapters_alone_and_resumes_to_the_same_bits(configure):
    whole = configure("whole", *RUN)
    train_to_end(whole)
    saved = load_adapters(whole)
    assert saved and all("lora_" in name for name in saved)
    for steps in (2, 6):
        train_to_end(configure("parts", *RUN, f"steps={steps}", f"checkpoint.resume={str(steps > 2).lower()}"))
    assert exported(whole) == exported(configure("parts", *RUN))


def load_adapters(config):
    store = CheckpointStore(f"{config.output_dir}/checkpoints", 2)
    (file,) = (store.path(store.steps()[-1]) / "tensors").iterdir()
    return [name for name in load_file(file) if name.startswith("model.")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"]}, "must not name the output head 'lm_head'"),
        ({"target_modules": ["q_proj", "qkv"]}, "must name layers of the model, it has no qkv"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "must name linear layers, model.embed_tokens is of type Embedding"),
        ({"target_modules": ["norm"]}, r"must name linear layers, got \['norm'\], of which PEFT refuses one"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"target_modules": []}, "target_modules must be all-linear or a list of names"),
        (
            {"target_modules": "q_proj"},
            r"target_modules must be all-linear or a list of names such as \[q_proj, v_proj\], got 'q_proj'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make_model(), LoraConfig(**settings))


def test_frozen_experts_are_held_in_the_type_of_their_gemms_and_give_the_same_bits():
    outputs = {}
    for keeps in (False, True):
        config = of_experts_and_dense_layers("glm4_moe") if keeps else experts_config("qwen3_moe")
        for hold in (False, True):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            model._keep_in_fp32_modules_strict = {"mlp.gate.weight"} if keeps else set()
            add_lora(model, LoraConfig(rank=2))
            install_policy_head(model, compute_dtype=torch.bfloat16, check_logits=False)
            if hold:
                hold_frozen(_perturbed(model), torch.bfloat16)
            with body_autocast(_perturbed(model)):
                outputs[hold] = model(input_ids=IDS % 8).logits
        assert torch.equal(outputs[True], outputs[False])
        dtypes = {
            name: parameter.dtype for name, parameter in model.named_parameters() if parameter.ndim >= 2 and "lora_" not in name
        }
        float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert any("experts" in name for name in dtypes)
        assert float32 == ({"model.layers.1.mlp.gate.weight"} if keeps else set())
        handed_over = {name for name, weight in whole_weights(model, torch.bfloat16) if weight.dtype == torch.float32}
        assert handed_over == float32, "a sampler would route tokens to other experts"
        held = sum(parameter.nbytes for parameter in model.parameters())
        planned = weigh(ModelConfig(name_or_path="none", dtype="bfloat16", lora=LoraConfig(rank=2)), config)
        assert planned.held_bytes == held or keeps


@pytest.mark.parametrize(
    ("name", "without"),
    [("qwen3_moe", "Qwen3MoeExperts, Qwen3MoeTopKRouter"), ("mixtral", "MixtralExperts, MixtralTopKRouter"), ("qwen2", None)],
)
def test_all_linear_takes_the_linear_layers_and_tells_what_has_none(name, without):
    """Routers and fused experts are no linear layers."""
    model, told = AutoModelForCausalLM.from_config(experts_config(name, has_experts=without is not None)), []
    add_lora(model, LoraConfig(rank=2), told.append)
    adapted = {path.split(".")[-1] for path, _ in adapted_layers(model)}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted == (attention if without else attention | {"gate_proj", "up_proj", "down_proj"})
    assert told == (
        [f"model.lora: all-linear puts no adapter beside the weights of {without}, which are no torch.nn.Linear"] if without else []
    )


def of_experts_and_dense_layers(name):
    """One layer of fused experts, with a shared one where the architecture has those, after a dense layer."""
    shape = {"vocab_size": len(build_tokenizer()), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_experts": 2, "mlp_only_layers": [0]}
    if name == "glm4_moe":
        experts = experts | {
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        }
    return AutoConfig.for_model(name, **shape, **heads, **experts)


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"]])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_moe"])
def test_dense_and_shared_layers_beside_fused_experts_get_adapters_that_can_be_exported(name, targets, tmp_path):
    """PEFT would take their names for those that experts had in transformers 4."""
    AutoModelForCausalLM.from_config(of_experts_and_dense_layers(name)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_lora(model, LoraConfig(rank=2, target_modules=targets))
    adapted = {path.split("layers.")[1] for path, _ in adapted_layers(model) if "mlp" in path}
    places = ["0.mlp", "1.mlp.shared_experts"] if name == "glm4_moe" else ["0.mlp"]
    parts = ["gate_proj", "up_proj", "down_proj"] if targets == "all-linear" else targets
    assert adapted == {f"{place}.{part}" for place in places for part in parts}
    expected = _perturbed(model).eval()(input_ids=IDS).logits
    export_model(model, build_tokenizer(), tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    export_adapter(model, build_tokenizer(), tmp_path / "adapter")
    with names_as_they_are():
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
    assert "Load it inside `with trapo_train.models.lora.names_as_they_are():`" in other_layers(model)


def test_an_adapter_that_peft_reads_as_it_is_needs_no_word():
    model = make_model()
    add_lora(model, LoraConfig(rank=2))
    assert other_layers(model) is None


def test_an_older_peft_is_named(monkeypatch, configure):
    monkeypatch.setattr(extras, "version", lambda package: "0.19.1")
    words = r"model.lora needs PEFT 0.20 or newer, got 0.19.1: pip install -U 'trapo\[peft\]'"
    with pytest.raises(MissingPackage, match=words):
        add_lora(make_model(), LoraConfig(rank=2))
    with pytest.raises(MissingPackage, match=words):  # before anything is read
        check_packages(configure("run", *RUN))
    assert f'peft = ["peft>={extras.OLDEST_PEFT}"]' in Path("pyproject.toml").read_text()


def test_a_model_without_linear_layers_is_refused_for_what_it_is():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=8))
    with pytest.raises(ValueError, match=r"needs layers of torch.nn.Linear, .* those of GPT2LMHeadModel are Conv1D"):
        add_lora(model, LoraConfig())


def test_the_seed_decides_the_adapters_whatever_was_drawn_before(configure):
    """Or the replicas of HSDP would train different models."""
    models = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        models.append(Trainer(configure("run", *RUN, f"seed={seed}")).model.state_dict())
    adapters = [{name: value for name, value in model.items() if "lora_A" in name} for model in models]
    assert adapters[0] and all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not any(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


@pytest.mark.parametrize("updates", ["{epochs: 2}", "{mini_batches: 2}", "{correction: {name: tis}}"])
def test_dropout_is_refused_where_two_passes_must_agree(configure, updates):
    overrides = ("model.lora={dropout: 0.1}", f"updates={updates}")
    with pytest.raises(ConfigError, match=r"model.lora.dropout must be 0 .*got 0\.1: ratios would compare"):
        configure("run", *overrides)
    assert configure("run", "model.lora={dropout: 0.1}").model.lora.dropout == 0.1


def test_a_model_that_comes_with_an_adapter_is_refused(configure, tmp_path, monkeypatch):
    """It would be trained with the adapter inside, or with another one in its place, and neither would show."""
    from peft import get_peft_model

    build_tokenizer().save_pretrained(tmp_path / "base")
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    message = (
        "must be a whole model, got a LoRA adapter to one, .*adapter'. Give the model with the adapter added: `trapo-train export"
    )
    config = configure("run", "model.scratch=null", f"model.name_or_path={tmp_path / 'adapter'}")
    with pytest.raises(ValueError, match=message):
        Trainer(config)
    for load in (lambda: load_model_and_tokenizer(config.model), lambda: load_architecture(config)):
        # As for a name on the hub, of which no file is looked at before; it need not have a tokenizer.
        monkeypatch.setattr(memory, "check_places", lambda config: None)
        with pytest.raises(ValueError, match=message):
            load()


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'trapo\[peft\]'"):
        add_lora(make_model(), LoraConfig())


def test_a_section_of_the_configuration(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "{output_dir: o, steps: 1, prompts_per_step: 1, reward: exact_match, data: {path: d}, model: {name_or_path: m, lora: {}}}"
    )
    assert load_config(tmp_path / "run.yaml").model.lora == LoraConfig()
