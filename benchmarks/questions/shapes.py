"""The shapes that several questions share."""

from __future__ import annotations

from benchmarks.problem import Case

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
# (N, D, V) on a CPU: N so that 3 bare GEMMs take one or two seconds at 90 GFLOP/s. A head sees thousands of rows in training; what
# one call costs apart from them, such as fresh memory for dWeight, weighs more here.
CPU_MATRIX = [
    (512, 896, 32768),
    (192, 896, 151936),
    (512, 256, 32768),
    (384, 256, 151936),
    (256, 2048, 32768),
    (96, 2048, 151936),
]
# Every contender at the first shape; at the others those that a user would choose between on a CPU, because of the time.
ON_MORE_SHAPES = ("floor, 1 GEMM", "floor, 3 GEMMs", "eager", "F.linear_cross_entropy", "ours (torch)", "ours (native)")


def main_cases(question: str, job: str, device: str, small: bool, cpu_shapes: int) -> list[Case]:
    """One job at the shapes of its device: TRAPO's micro-batch and two more on a GPU, the first `cpu_shapes` of CPU_MATRIX."""
    if small:
        return [Case(question, job, *SMALL, "float32", with_memory=job == "trapo")]
    if device == "cuda":
        shapes = [TRAPO_MICRO_BATCH, (8192, 4096, 151936), (8192, 4096, 128256)]
        return [Case(question, job, *shape, "bfloat16", with_memory=True) for shape in shapes]
    return [
        Case(question, job, *shape, "float32", with_memory=i == 0, contenders=ON_MORE_SHAPES if i else ())
        for i, shape in enumerate(CPU_MATRIX[:cpu_shapes])
    ]
