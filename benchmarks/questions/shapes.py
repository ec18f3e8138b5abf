"""The shapes that several questions share."""

from __future__ import annotations

from benchmarks.problem import Case
from benchmarks.summary import NEW_GRADIENTS

TRAPO_MICRO_BATCH = (32768, 3584, 152064)  # Qwen2.5-Math-7B, the authors' micro-batch: the first shape of every GPU table
MODELS = {  # name: (D, V)
    "Qwen2.5-Math-7B": (3584, 152064),
    "Qwen3-8B": (4096, 151936),
    "Llama-3.1-8B": (4096, 128256),
    "Gemma-2-9B": (3584, 256000),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen2.5-72B": (8192, 152064),
    "DeepSeek-V3": (7168, 129280),
}
SMALL = (48, 32, 264)  # a dry run of every code path
# (N, D, V) on a CPU: two vocabularies, three widths. The first is what a micro-batch looks like: several chunks, and dWeight's
# fresh memory weighs little. The others have as many rows as leave 3 bare GEMMs at 3 s or less on 2 cores.
CPU_LONG = (2048, 896, 32768)
CPU_MAIN = (512, 896, 32768)
CPU_WIDE = (1024, 2048, 32768)
CPU_LARGE_VOCAB = (512, 256, 151936)
CPU_MATRIX = [
    CPU_MAIN,
    (512, 896, 151936),
    (512, 256, 32768),
    CPU_LARGE_VOCAB,
    CPU_WIDE,
    (256, 2048, 151936),
]
CPU_FLOORS = ("floor, 3 GEMMs", NEW_GRADIENTS)
# Every contender at CPU_MAIN; elsewhere those that a user would choose between on a CPU, because of the time.
CPU_CHOICE = (*CPU_FLOORS, "eager", "torch.compile", "ours (native)", "ours, nothing kept (native)")
# Inactive rows and the longest context, where torch.compile would compile for every case, and TRL's chunks are of interest.
CPU_UNCOMPILED = ("floor, 3 GEMMs", "eager", "TRL chunked logprob", "ours (native)")
CPU_CROSS_ENTROPY = (*CPU_FLOORS, "eager", "F.linear_cross_entropy", "ours (native)")


def main_cases(question: str, job: str, device: str, small: bool) -> list[Case]:
    """One job at the first shapes of its device, all contenders: TRAPO's micro-batch and two more on a GPU, CPU_MAIN on a CPU."""
    if small:
        return [Case(question, job, *SMALL, "float32", with_memory=job == "trapo")]
    if device == "cuda":
        shapes = [TRAPO_MICRO_BATCH, (8192, 4096, 151936), (8192, 4096, 128256)]
        return [Case(question, job, *shape, "bfloat16", with_memory=True) for shape in shapes]
    return [Case(question, job, *CPU_MAIN, "float32", with_memory=job in ("trapo", "score"))]


def cpu_cases(question: str, job: str, shapes: list[tuple[int, int, int]], contenders: tuple[str, ...]) -> list[Case]:
    """Timed cases with some contenders; of TRAPO's, where the logits outweigh dWeight, the peak memory too."""
    weighed = (CPU_LONG, CPU_WIDE, CPU_LARGE_VOCAB) if job == "trapo" else ()
    return [Case(question, job, *shape, "float32", with_memory=shape in weighed, contenders=contenders) for shape in shapes]
