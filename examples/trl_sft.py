"""TRL's SFTTrainer with TrSFT, DFT or plain SFT computed without logits: TRL's data handling, our loss.

    pip install 'trl>=1.16,<1.17' && python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B-Instruct --objective trsft

`fuse_loss` puts the loss into the model's forward, and `transformers.Trainer.compute_loss` asks the model for it, with the
normaliser of the whole optimizer step. TRL's own metrics, entropy and token accuracy, give way to those of the loss.
"""

import argparse

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from trapo_kernels import Objective, fuse_loss, objectives

OBJECTIVES = {"sft": objectives.sft(), "trsft": objectives.trsft(alpha=0.1), "dft": objectives.dft()}


class FusedSFTTrainer(SFTTrainer):
    """An SFTTrainer whose loss is `objective`, asked of the model itself."""

    compute_loss = Trainer.compute_loss

    def __init__(self, *args, objective: Objective, **settings):
        super().__init__(*args, **settings)
        if self.args.loss_type != "nll" or self.compute_metrics is not None:
            raise ValueError(
                f"loss_type must be 'nll' and compute_metrics None, got {self.args.loss_type!r} and {self.compute_metrics}: the "
                "objective is the loss, without logits. Leave both out, and choose the loss by objective=."
            )
        fuse_loss(self.model, objective)  # after TRL has put its own head into the model, which would come between

    def log(self, logs: dict[str, float], *args) -> None:
        """With the metrics of the last micro-batch."""
        model = self.accelerator.unwrap_model(self.model)
        model = getattr(model, "get_base_model", lambda: model)()  # PEFT's
        prefix = "" if self.model.training else "eval_"
        metrics = getattr(model, "loss_metrics", {})
        super().log(logs | {prefix + name: float(x) for name, x in metrics.items() if name.startswith("expert/")}, *args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a name on the hub, or a folder")
    parser.add_argument("--objective", choices=OBJECTIVES, default="trsft")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output-dir", default="runs/trl_sft")
    args = parser.parse_args()
    settings = SFTConfig(
        output_dir=args.output_dir,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    sums = Dataset.from_list([{"prompt": f"How much is {a} + {a + 1}?", "completion": f" {2 * a + 1}."} for a in range(64)])
    FusedSFTTrainer(args.model, args=settings, train_dataset=sums, objective=OBJECTIVES[args.objective]).train()


if __name__ == "__main__":
    main()
