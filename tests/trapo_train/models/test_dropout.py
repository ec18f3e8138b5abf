"""What a model draws in training is switched off wherever it is held, and a model that draws all the same is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trapo_train.models.attention import PACKED_IMPLEMENTATION, segment_arguments
from trapo_train.models.dropout import check_one_policy
from trapo_train.models.model import ModelConfig, prepare

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DRAWING = {
    "persimmon": {"attention_dropout": 0.5},  # which reads its configuration in every pass
    "opt": {"layerdrop": 0.9, "dropout": 0.1, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {},  # of whose 0.1 its configuration has three
    "mixtral": {"router_jitter_noise": 0.5, "num_local_experts": 4, "num_key_value_heads": 2},
    "minimax_m2": {
        "router_jitter_noise": 0.5, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def build(name, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_IMPLEMENTATION)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", DRAWING)
def test_passes_in_training_are_those_of_evaluation(name):
    model, told = build(name, **DRAWING[name]), []
    with pytest.raises(ValueError, match="a training pass must compute what an evaluation computes"):
        check_one_policy(model)
    prepare(model, ModelConfig(name_or_path="none"), device=torch.device("cpu"), tell=told.append)
    assert any("own dropout and noise are switched off" in text for text in told)
    of_draws = {key: value for key, value in model.config.to_dict().items() if "drop" in key or "jitter" in key}
    assert of_draws and set(of_draws.values()) == {0.0}
    row = segment_arguments(model, [9, 5], torch.device("cpu")) | {"input_ids": torch.arange(14)[None], "use_cache": False}
    row["position_ids"] = torch.cat([torch.arange(9), torch.arange(5)])[None]
    assert torch.equal(*(model.train(mode).base_model(**row).last_hidden_state for mode in (False, True)))


def test_a_router_that_draws_experts_is_refused():
    """PhiMoE's; its threshold router_jitter_noise is one of evaluation, too, and is left alone."""
    model = build("phimoe", num_local_experts=4, num_key_value_heads=2)
    threshold = model.model.layers[0].mlp.router.router_jitter_noise
    with pytest.raises(ValueError, match=r"PhimoeForCausalLM is off by .* largest hidden state\. Choose another model"):
        prepare(model, ModelConfig(name_or_path="none"), device=torch.device("cpu"))
    assert model.model.layers[0].mlp.router.router_jitter_noise == threshold > 0
    prepare(model, ModelConfig(name_or_path="none"), device=torch.device("cpu"), check_logits=False)  # as for a plan of memory


def test_a_model_without_any_is_left_as_it_is():
    model, told = build("llama"), []
    prepare(model.train(), ModelConfig(name_or_path="none"), device=torch.device("cpu"), tell=told.append)
    assert model.training and not told
