"""TRL's SFTTrainer with TrSFT, DFT or plain SFT computed without logits: TRL's data handling, our loss.

    pip install trl && python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B-Instruct --objective trsft

`fuse_loss` puts the loss into the model's forward, and `transformers.Trainer.compute_loss` asks the model for it, with the
normaliser of the whole optimizer step. TRL's own metrics, entropy and token accuracy, give way to those of the loss.
"""

import argparse

import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from trapo_kernels import fuse_loss, objectives

OBJECTIVES = {"sft": objectives.sft(), "trsft": objectives.trsft(alpha=0.1), "dft": objectives.dft()}


class FusedSFTTrainer(SFTTrainer):
    """An SFTTrainer of a model after `fuse_loss`."""

    compute_loss = Trainer.compute_loss

    def log(self, logs: dict[str, float], *args) -> None:
        model = self.accelerator.unwrap_model(self.model)
        model = getattr(model, "get_base_model", lambda: model)()  # PEFT's
        metrics = getattr(model, "loss_metrics", {})
        super().log(logs | {name: float(value) for name, value in metrics.items() if name.startswith("expert/")}, *args)


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
    trainer = FusedSFTTrainer(args.model, args=settings, train_dataset=sums)
    fuse_loss(trainer.model, OBJECTIVES[args.objective])
    trainer.train()


if __name__ == "__main__":
    main()
