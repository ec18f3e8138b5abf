"""Kill and resume: a run that SIGKILL hits at random moments, many times, must end with the bits of a run that nothing hit.

    python -m benchmarks.soak --kills 20            # writes results/<cpu>/soak.md
    python -m benchmarks.soak --kills 20 --ranks 2  # one rank dies, the others must end by themselves

A process is killed while it starts or resumes, while it trains, evaluates or saves. It starts again with checkpoint.resume=true
until its run is finished; then the next run begins, until the kills are used up. Compared are the exported weights and every row
of metrics.jsonl, except for what a clock or the memory said.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import ROOT, environment, folder

STEPS = 24
CONFIG = {
    "prompts_per_step": 3,
    "reward": "pointer_chasing",
    "data": {"task": "pointer_chasing", "num_problems": 8, "task_options": {"depths": [1, 2]}},
    "eval_data": {
        name: {"task": "pointer_chasing", "split": "test", "num_problems": 4, "task_options": {"depths": [depth]}}
        for name, depth in (("near", 1), ("far", 3))
    },
    "evaluation": {"every": 3, "samples_per_prompt": {"near": 1, "far": 2}, "responses_per_call": 4},
    "model": {
        "scratch": {
            "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24, "max_position": 80,
        },
    },
    "rollout": {"max_response_tokens": 16, "paragraph_break": "|"},
    "packing": {"max_tokens": 200},
    "updates": {"mini_batches": 2},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "checkpoint": {"every": 1, "resume": True},
    "parallel": {"timeout_s": 60},
}  # fmt: skip
_GIVE_UP_S = 300  # without a new row of metrics, or until the other ranks have ended


class Run:
    """One run in its own directory, which processes work on one after the other."""

    def __init__(self, directory: Path, ranks: int, steps: int) -> None:
        self.directory, self.ranks = directory, ranks
        directory.mkdir(parents=True)
        (directory / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "steps": steps, "output_dir": str(directory / "out")}))

    @property
    def out(self) -> Path:
        """Where the run writes."""
        return self.directory / "out"

    @property
    def finished(self) -> bool:
        """Whether the trained model is there."""
        return (self.out / "model").exists()

    def start(self) -> list[subprocess.Popen]:
        """A process for each rank, all going on where the last ones stopped."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(self.ranks):
            variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
            if self.ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, "-m", "trapo_train", "run", str(self.directory / "run.yaml")]
            log = (self.directory / f"rank_{rank}.log").open("ab")
            processes.append(subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log))
        return processes

    def rows(self) -> list[dict[str, Any]]:
        """What the run recorded, without events and without what was measured."""
        from trapo_train.reports.metrics_log import read_metrics

        recorded = [row for row in read_metrics(self.out) if row["kind"] != "event"]
        return [{name: value for name, value in row.items() if not _is_measured(name)} for row in recorded]

    def digest(self) -> str:
        """SHA-256 of the exported weights."""
        return hashlib.sha256((self.out / "model" / "model.safetensors").read_bytes()).hexdigest()

    def progress(self) -> int:
        """Bytes of metrics so far."""
        metrics = self.out / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def unfinished(self) -> set[tuple[int, int]]:
        """Identities of the directories that are being written, or were when a process died."""
        found = [*self.out.glob("checkpoints/.unfinished_*"), *self.out.glob(".unfinished_*")]
        return {(status.st_ino, status.st_ctime_ns) for path in found if (status := _status(path))}


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # it has got its name meanwhile
        return None


def _is_measured(name: str) -> bool:
    """Whether a clock or the memory said it."""
    return name.startswith("time/") or name.endswith("_per_s") or name == "peak_memory_mib"


def finish(run: Run) -> None:
    """Let a run go on to its end."""
    for process in run.start():
        code = process.wait(timeout=_GIVE_UP_S)
        if code:
            raise RuntimeError(f"soak: a process ended with exit code {code}: {_last_lines(run)}")


def strike(run: Run, randomness: random.Random, seconds_per_step: float) -> str | None:
    """Start the run, kill a process of it at a random moment, and say what it was doing; None if the run ended before."""
    leftover, before, started = run.unfinished(), run.progress(), time.monotonic()
    processes = run.start()
    moment = randomness.choice(["start", "save", "any", "any"])
    while moment != "start" and run.progress() == before and all(process.poll() is None for process in processes):
        if time.monotonic() - started > _GIVE_UP_S:
            raise RuntimeError(f"soak: no progress within {_GIVE_UP_S} s: {_last_lines(run)}")
        time.sleep(0.005)
    time.sleep(randomness.uniform(0, 6.0 if moment == "start" else 4 * seconds_per_step))
    if moment == "save":  # too short to be hit by chance
        while not run.unfinished() - leftover and all(process.poll() is None for process in processes):
            time.sleep(0.0002)
        time.sleep(randomness.uniform(0, 0.005))
    victim = randomness.choice(processes)
    alive = victim.poll() is None
    victim.kill()
    victim.wait()
    doing = "saving" if run.unfinished() - leftover else "training or evaluating"
    if run.progress() == before:
        doing = "starting or resuming"
    for process in processes:  # without the victim the others must end by themselves
        code = process.wait(timeout=_GIVE_UP_S)
        if code not in (0, 2, -9):
            raise RuntimeError(f"soak: a process ended with exit code {code}: {_last_lines(run)}")
    return doing if alive else None


def soak(directory: Path, kills: int, ranks: int, seed: int, steps: int = STEPS, say: Any = print) -> dict[str, Any]:
    """Kill `kills` times in runs of `steps` steps; returns the counts.

    Raises: RuntimeError for a run that ends with other bits than the untouched one.
    """
    randomness = random.Random(seed)
    untouched = Run(directory / "untouched", ranks, steps)
    started = time.monotonic()
    finish(untouched)
    seconds_per_step = (time.monotonic() - started) / steps / 2  # half of it is the start
    counts: Counter[str] = Counter()
    runs = 0
    while counts.total() < kills:
        run = Run(directory / f"killed_{runs}", ranks, steps)
        while not run.finished and counts.total() < kills:
            doing = strike(run, randomness, seconds_per_step)
            if doing is not None:
                counts[doing] += 1
                say(f"kill {counts.total()}: {doing}, {run.progress()} bytes of metrics")
        if not run.finished:
            finish(run)
        if run.digest() != untouched.digest() or run.rows() != untouched.rows():
            raise RuntimeError(
                f"soak: {run.directory} differs from {untouched.directory} after {counts.total()} kills, seed {seed}."
            )
        runs += 1
        say(f"run {runs} ended with the same bits")
    return {"kills": counts.total(), "runs": runs, "by": dict(counts), "ranks": ranks, "seed": seed}


def _last_lines(run: Run) -> str:
    return "".join(path.read_text(errors="replace")[-1500:] for path in sorted(run.directory.glob("rank_*.log")))


def report(results: Sequence[dict[str, Any]]) -> str:
    """The counts as Markdown."""
    where = environment("cpu")
    kinds = sorted({kind for result in results for kind in result["by"]})
    lines = [
        "# Killed and resumed",
        "",
        f"Runs of {STEPS} steps with two evaluation sets and a checkpoint at every step. Every run that was killed ended with the "
        "weights and the metrics of one that was not, bit for bit.",
        "",
        f"| ranks | kills | while {' | while '.join(kinds)} | runs | seed |",
        "|" + "---|" * (4 + len(kinds)),
    ]
    for result in results:
        cells = [result["ranks"], result["kills"], *(result["by"].get(kind, 0) for kind in kinds), result["runs"], result["seed"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    place = f"{where['device']}, torch {where['versions']['torch']}, revision {where['revision']}"
    return "\n".join([*lines, "", f"{place}: `{where['command'].replace('benchmarks ', 'benchmarks.soak ', 1)}`", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each number of ranks (20)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1], help="processes of a run; several numbers are soaked in turn (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args(argv)
    results = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            results.append(soak(Path(directory), args.kills, ranks, args.seed))
    text = report(results)
    print(text)
    path = ROOT / "benchmarks" / "results" / folder("cpu") / "soak.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
