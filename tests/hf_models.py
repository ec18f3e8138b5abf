"""Small random models of transformers that do different things to their logits."""

import torch
import transformers

_GEMMA = {"head_dim": 8, "final_logit_softcapping": 0.5, "layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER = {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
_MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
MODELS = {
    "Qwen2": {},
    "Phi": {},  # a bias
    "Gemma2": _GEMMA | {"attn_implementation": "eager"},
    "Gemma3nText": _GEMMA | _PER_LAYER | {"laurel_rank": 4, "activation_sparsity_pattern": None, "altup_num_inputs": 2},
    "Gemma4": _GEMMA | _PER_LAYER | {"global_head_dim": 8},  # the cap is in the configuration of its text
    "Granite": {"logits_scaling": 0.5},
    "HyperCLOVAX": {"logits_scaling": 4.0},  # multiplies by it
    "Cohere": {"logit_scale": 4.0},
    "FalconH1": _MAMBA | {"lm_head_multiplier": 4.0},
}


def small_model(name):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    given = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | shape | MODELS[name]
    if name == "Gemma4":
        given = {"text_config": transformers.Gemma4TextConfig(**given), "vision_config": None, "audio_config": None}
    config = getattr(transformers, f"{name}Config")(**given)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # logits that a cap and a scale change
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias, std=0.2)
    return model
