"""TRL's GRPOTrainer with the logprobs and entropies of trapo_kernels: TRL's losses and metrics; what is not computed is refused.

    pip install 'trl>=1.16,<1.17' && python examples/trl_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct

TRL 1.16 gives a model its head through one function, `add_fused_lm_head`, on which GRPO and RLOO do the rest of their work. This
file replaces it: `use_trapo_head()` before the trainer is made is all that a script of yours needs. Four GEMMs; a loss that is
`linear_policy_loss` itself takes three (trapo_kernels/README.md has that step, and what TRL's normalisers are there).
"""

import argparse
import contextlib
import functools

import torch
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from datasets import Dataset
from torch import nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from trapo_kernels import IGNORE_INDEX, head_options, linear_logprob, unsharded

FIELDS = {"log_probs", "entropy"}  # of the output, that the kernels compute


def use_trapo_head() -> None:
    """Let GRPO and RLOO trainers made from now on take their logprobs and entropies from trapo_kernels."""
    for trainer in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        trainer.add_fused_lm_head = add_trapo_head


def add_trapo_head(
    model: nn.Module, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """In place of TRL's `add_fused_lm_head`, whose arguments these are: a forward that scores labels where it is asked to."""
    if not set(outputs) <= FIELDS:
        raise ValueError(f"outputs must be among {sorted(FIELDS)}, got {outputs}. Leave this trainer with TRL's own head.")
    own = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, labels=None, **given):
        if not fused_lm_head:
            return own(*args, **given) if labels is None else own(*args, labels=labels, **given)
        if given.get("output_router_logits"):
            raise ValueError("router_aux_loss_coef must be 0, got a router's auxiliary loss. Leave this model with TRL's own head.")
        hidden = self.base_model(*args, **given | {"use_cache": False}).last_hidden_state[:, :-1].flatten(0, 1)
        target = labels[:, 1:]
        scored = target != IGNORE_INDEX
        options = head_options(self) | {"active_rows": scored.flatten().nonzero().squeeze(1), "with_entropy": "entropy" in outputs}
        options["temperature"] *= temperature
        weight, precision = unsharded(self.get_output_embeddings().weight), contextlib.nullcontext()
        if cast_lm_head_to_fp32:
            hidden, precision = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with precision:
            out = linear_logprob(hidden, weight, target.flatten(), **options)
        entropy = out.entropy.view_as(target) if "entropy" in outputs else None
        return FusedCausalLMOutput(log_probs=out.logprob.view_as(target), entropy=entropy, label_mask=scored)

    model.forward = forward.__get__(model)


def shorter(completions: list, **_) -> list[float]:
    """A reward to see something move: fewer characters."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [-len(text) / 100 for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-completion-length", type=int, default=64)
    parser.add_argument("--output-dir", default="runs/trl_grpo")
    args = parser.parse_args()
    use_trapo_head()
    settings = GRPOConfig(
        output_dir=args.output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=args.steps,
        max_completion_length=args.max_completion_length,
        per_device_train_batch_size=8,
        num_generations=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    prompts = Dataset.from_dict({"prompt": [f"How much is {a} + {a + 1}?" for a in range(64)]})
    GRPOTrainer(args.model, reward_funcs=shorter, args=settings, train_dataset=prompts).train()


if __name__ == "__main__":
    main()
