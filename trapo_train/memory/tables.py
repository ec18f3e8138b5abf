"""A memory plan as tables and sentences, for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from trapo_train.memory.plan import GIB, PHASES, MemoryPlan


def memory_table(plan: MemoryPlan) -> Table:
    """What each GPU holds in each phase, GiB, with the peak marked."""
    title = f"memory of each of {plan.gpus} GPUs, GiB" if plan.gpus > 1 else "memory, GiB"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for name, sizes in plan.components.items():
        table.add_row(name, *(_gib(sizes[phase]) if phase in sizes else "" for phase in PHASES))
    totals = [f"[reverse]{_gib(plan.total(phase))}[/]" if phase == plan.peak_phase else _gib(plan.total(phase)) for phase in PHASES]
    table.add_section()
    table.add_row("together", *totals, style="bold")
    return table


def memory_summary(plan: MemoryPlan, device_type: str) -> str:
    """The peak in a sentence, with what it was reckoned for and what is not in it."""
    generated = (
        f", {plan.sequences} responses of at most {plan.generated} tokens, prompt included, generated together on a rank (those of "
        f"{plan.generated_by})"
    )
    outside = "the CUDA context" if device_type == "cuda" else "Python and its libraries"
    return (
        f"peak {plan.peak_bytes / GIB:.2f} GiB in {plan.peak_phase}: context {plan.context} tokens, micro-batches of "
        f"{plan.micro_batch_tokens} tokens{generated if plan.sequences else ''}. Before that, the first rank takes "
        f"{plan.loading_bytes / GIB:.2f} GiB of host memory to load the model in float32. Not counted: {outside}, the allocator's "
        "fragmentation."
    )


def changes_table(found: Sequence[tuple[str, MemoryPlan]], limit_gib: float) -> Table:
    """Settings that lower the peak, with what it would be, and which of them are enough."""
    enough = any(plan.peak_bytes <= limit_gib * GIB for _, plan in found)
    table = Table(title=f"one change at a time{'' if enough else ', none of which is enough'}", title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("peak, GiB", justify="right")
    table.add_column("peak in")
    if enough:
        table.add_column("")
    for setting, plan in found:
        fits = plan.peak_bytes <= limit_gib * GIB
        verdict = ["fits" if fits else ""] if enough else []
        table.add_row(setting, _gib(plan.peak_bytes), plan.peak_phase, *verdict, style="green" if fits else "")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
