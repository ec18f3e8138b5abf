"""Predicted and measured peak memory of training steps: `trapo-train plan-memory` against real runs, each in a process of its own.

    python -m benchmarks.memory_plan --device cpu             # writes results/<cpu>/memory.md
    python -m benchmarks.memory_plan --device cuda            # a 0.5B model at 32k tokens, eager head and fused head

On a CPU every allocation of a tensor is counted (torch's profiler, which sees those inside operations too), with the resident set
of the process beside it, which counts alone where there are several ranks; on a GPU the caching allocator keeps the peak. A step is
measured whole, and its generation alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import isolate
from benchmarks.provenance import ROOT, environment, folder
from trapo_kernels import free_kept_memory

MIB = 2**20
TOLERANCE = 0.10  # of the measured peak; the largest error measured is in the table
_SMALL = {"hidden_size": 192, "num_layers": 5, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 768}
_NARROW = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}
_QWEN_05B = {
    "hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2, "intermediate_size": 4864,
    "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One configuration to measure."""

    name: str
    shape: dict[str, Any]
    vocab_size: int
    prompt_tokens: int
    context: int
    overrides: list[str] = field(default_factory=list)
    ranks: int = 1
    heads: tuple[str, ...] = ("fused",)
    traces: bool = False
    """Whether a step takes expert traces of full length instead of generating."""


def runs(device: str) -> list[Run]:
    """What is measured on a device; bf16 is narrow on a CPU, whose bf16 GEMMs are slow."""
    both = ("fused", "eager")
    if device == "cuda":
        common = ["model.dtype=bfloat16", "model.gradient_checkpointing=true"]
        shape = (_QWEN_05B, 151936, 1024)
        return [
            Run("Qwen2.5-0.5B shape, 32k tokens", *shape, 16384, [*common, "packing.max_tokens=32768"], heads=both, traces=True),
            Run("Qwen2.5-0.5B shape, 8k tokens", *shape, 8192, [*common, "packing.max_tokens=8192"], heads=both, traces=True),
        ]
    wide, narrow = (_SMALL, 16000, 8, 256), (_NARROW, 16000, 8, 256)
    checkpointing = "model.gradient_checkpointing=true"
    tied = {**_SMALL, "tie_word_embeddings": True}
    reference = "objective={name: grpo, options: {beta: 0.1, entropy_coef: 0.001}}"
    return [
        Run("float32", *wide),
        Run("float32, gradient checkpointing", *wide, [checkpointing]),
        Run("float32, 64k vocabulary, SGD", _SMALL, 64000, 8, 256, ["optimizer.name=SGD"]),
        Run("float32, tied head, KL to a reference", tied, *wide[1:], [reference]),
        Run("float32, LoRA of rank 8", *wide, ["model.lora={rank: 8}"]),
        Run("float32, expert traces alone", *wide, heads=both, traces=True),
        Run("bfloat16", *narrow, ["model.dtype=bfloat16"]),
        Run("bfloat16, gradient checkpointing", *narrow, ["model.dtype=bfloat16", checkpointing]),
        Run("bfloat16, LoRA of rank 8", *narrow, ["model.dtype=bfloat16", "model.lora={rank: 8}"]),
        Run("float32, 2 ranks", *wide, ranks=2),
        Run("bfloat16, gradient checkpointing, 2 ranks", *narrow, ["model.dtype=bfloat16", checkpointing], ranks=2),
        Run("float32, 2 ranks, vocabulary-parallel head", *wide, ["parallel.vocab_parallel_head=true"], ranks=2),
    ]  # fmt: skip


def coin(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that differs within a group."""
    return [float(i % 2) for i in range(len(completions))]


def write_inputs(run: Run, directory: Path) -> list[str]:
    """A tokenizer of words, problems and the configuration of a run; returns the configuration file and its overrides."""
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *(f"t{i}" for i in range(2, run.vocab_size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory / "tokenizer")
    rows = [" ".join(f"t{2 + (7 * i + j) % 1000}" for j in range(run.prompt_tokens)) for i in range(8)]
    expert = " ".join(f"t{2 + i % 1000}" for i in range(run.context - run.prompt_tokens - 1))  # and the end of the sequence
    records = [{"prompt": row, "solution": "t5", "expert": expert if run.traces else None} for row in rows]
    (directory / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {
        "output_dir": str(directory / "run"),
        "steps": 2,
        "prompts_per_step": 8 if run.traces else 2 * run.ranks,
        "reward": "benchmarks.memory_plan:coin",
        "model": {
            "scratch": {"architecture": "qwen2", "max_position": run.context, **run.shape},
            "tokenizer": str(directory / "tokenizer"),
        },
        "data": {"path": str(directory / "train.jsonl"), "max_prompt_tokens": run.prompt_tokens},
        "plan": {"name": "sft"} if run.traces else {"name": "grpo", "num_samples": 4},
        "objective": {"name": "trapo" if run.traces else "dr_grpo", "options": {"entropy_coef": 0.001}},
        "rollout": {"max_response_tokens": run.context - run.prompt_tokens, "max_batch_tokens": 8 * run.context},
        "packing": {"max_tokens": 4 * run.context},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    return [str(directory / "run.yaml"), *run.overrides]


def allocated_peak(call: Callable[[], object]) -> int:
    """Most bytes that tensors on the CPU held during a call, above those before it, in memory of its own."""
    free_kept_memory()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure(arguments: list[str], head: str) -> dict[str, float]:
    """Peaks of the second training step in this process, MiB, and its tokens per second."""
    from trapo_train.config import load_config
    from trapo_train.rollouts.rollout import run_plans
    from trapo_train.trainer import Trainer

    file, *overrides = arguments
    trainer = Trainer(load_config(file, overrides))
    on_gpu = trainer.world.device.type == "cuda"

    def rollout() -> None:
        problems = trainer.world.share(trainer.problems[: trainer.config.prompts_per_step])
        with trainer.ready_to_generate():
            run_plans(problems, trainer.plan, trainer.engine, trainer.reward, trainer.tokenizer, trainer.config.rollout)

    with _head(head):
        trainer.train_step()  # makes the optimizer's state
        free_kept_memory()
        before = 0.0 if on_gpu else isolate.status_kib("VmRSS") / 1024 - _held_mib(trainer)
        metrics = trainer.train_step()
        peaks = {"update_tokens_per_s": metrics["response_tokens"] / metrics["time/update_s"]}
        if not on_gpu:
            peaks["resident_mib"] = isolate.status_kib("VmHWM") / 1024 - before
        if trainer.config.plan.largest_request:
            peaks["rollout_mib"] = _peak(trainer, rollout)
        peaks["step_mib"] = _peak(trainer, trainer.train_step)
        while trainer.last_metrics.get("finished_share"):  # a response that ended early needed less than was planned
            peaks["step_mib"] = _peak(trainer, trainer.train_step)
    if trainer.world.size > 1 and not on_gpu:
        peaks["step_mib"] = peaks["resident_mib"]  # gloo's threads free memory that the profiler, kept by thread, never sees go
    peaks = {name: max(values) for name, values in _by_name(trainer.world.gather(peaks)).items()}
    trainer.world.close()
    return peaks


def _by_name(parts: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [part[name] for part in parts] for name in parts[0]}


def _peak(trainer: Any, call: Callable[[], object]) -> float:
    """MiB held by this rank's tensors at their peak, those of weights and optimizer included."""
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / MIB
    return _held_mib(trainer) + allocated_peak(call) / MIB


def _held_mib(trainer: Any) -> float:
    """MiB of this rank's weights and optimizer state between two steps."""
    models = [model for model in (trainer.model, trainer.reference) if model is not None]
    tensors = {id(p): p for model in models for p in model.parameters()}
    tensors |= {id(x): x for entry in trainer.optimizer.state.values() for x in entry.values() if isinstance(x, torch.Tensor)}
    return sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in tensors.values()) / MIB


def _head(name: str) -> AbstractContextManager[Any]:
    """The trainer's step with this head: fused as it is, or eager PyTorch on whole logits."""
    if name == "fused":
        return nullcontext()
    from trapo_kernels import policy_loss

    def eager(model: Any, micro_batch: Any, objective: Any, temperature: float = 1.0) -> Any:
        def loss_fn(hidden: torch.Tensor, weight: torch.Tensor, **_: Any) -> Any:
            logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype)).float() / temperature
            logprobs = torch.log_softmax(logits, dim=-1)
            logprob = logprobs.gather(1, micro_batch.batch.target[:, None])[:, 0]
            return policy_loss(logprob, -(logprobs.exp() * logprobs).sum(-1), micro_batch.batch, objective)

        return model.run_head(micro_batch, loss_fn)

    return mock.patch("trapo_train.step.optimizer_step.policy_forward", eager)


def in_a_process(run: Run, head: str, arguments: list[str], device: str) -> dict[str, float]:
    """`measure` in fresh processes, one for each rank; nothing where the GPU's memory did not suffice."""
    module = ["-m", "benchmarks.memory_plan", "--child", head, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}"] if run.ranks > 1 else []
    variables = isolate.MALLOC | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *module],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (variables if device == "cpu" else {}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "OutOfMemoryError" in done.stderr:
        return {}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{run.name}, {head}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(lines[-1])


def compare(run: Run, device: str) -> list[dict[str, Any]]:
    """One row per head: predicted and measured."""
    from trapo_train.config import load_config
    from trapo_train.memory.plan import plan_memory

    with tempfile.TemporaryDirectory() as directory:
        file, *overrides = write_inputs(run, Path(directory))
        config = load_config(file, overrides)
        plan = plan_memory(config, gpus=run.ranks, context=run.context, device_type=device)
        rows = []
        for head in run.heads:
            row: dict[str, Any] = {"name": run.name, "head": head, "peak_phase": plan.peak_phase}
            row |= {"predicted_step_mib": plan.peak_bytes / MIB, "predicted_rollout_mib": plan.total("rollout") / MIB}
            rows.append(row | in_a_process(run, head, [file, *overrides], device))
        return rows


def table(rows: Sequence[dict[str, Any]], device: str) -> str:
    """The report as Markdown."""
    where = environment(device)
    resident = ["process grew by MiB"] if device == "cpu" else ["update tokens/s"]
    heading = [
        "run",
        "head",
        "peak in",
        "step: predicted MiB",
        "measured",
        "error",
        "generation: predicted MiB",
        "measured",
        "error",
    ]
    lines = [
        "# Peak memory, predicted and measured",
        "",
        "`trapo-train plan-memory` before the run, then the run: the most that tensors held; on a CPU with several ranks, by how "
        f"much the process grew. Tolerance of the test: {TOLERANCE:.0%} of the measured peak.",
        "",
        f"| {' | '.join([*heading, *resident])} |",
        "|" + "---|" * (len(heading) + 1),
    ]
    for row in rows:
        known = row["head"] == "fused"
        cells = [row["name"], row["head"], row["peak_phase"] if known else "–"]
        for what in ("step", "rollout"):
            predicted, measured = row[f"predicted_{what}_mib"], row.get(f"{what}_mib")
            generates = what == "step" or measured is not None
            cells.append(f"{predicted:.0f}" if known and generates else "–")
            cells.append(f"{measured:.0f}" if measured is not None else "out of memory" if what == "step" else "–")
            cells.append(f"{predicted / measured - 1:+.1%}" if known and measured is not None else "–")
        last = row.get("resident_mib" if device == "cpu" else "update_tokens_per_s")
        cells.append("–" if last is None else f"{last:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    versions = where["versions"]
    place = f"{where['device']}, torch {versions['torch']}, revision {where['revision']}"
    return "\n".join([*lines, "", f"{place}: `python -m benchmarks.memory_plan --device {device}`", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table; `--child` measures in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        head, *arguments = args.child
        peaks = measure(arguments, head)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(peaks), flush=True)
        os._exit(0)  # as the trainer's command: no teardown under torchrun
    chosen = [run for run in runs(args.device) if not args.only or args.only in run.name]
    rows = [row for run in chosen for row in compare(run, args.device)]
    text = table(rows, args.device)
    print(text)
    if not args.only:
        path = ROOT / "benchmarks" / "results" / folder(args.device) / "memory.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
