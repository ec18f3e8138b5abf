"""SFT covers the modes of an expert, TrSFT and reverse KL seek one: a student too small for its expert, and the closed form.

    python -m benchmarks.trsft_modes            # writes benchmarks/results/trsft_modes.png and prints the numbers in it

A student with a 2-dimensional hidden state and a frozen head, p_v = softmax(θ₁ x_v - θ₂ x_v²), cannot hold the expert's modes.
A student with a free logit per token can hold anything, so that its optimum is known in closed form (`fixed_point`).
All losses are the project's own, summed over the vocabulary with the expert's probabilities as weights: no sampling, no noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trapo_kernels import Objective, Role, TokenBatch, linear_logprob, linear_policy_loss, objectives, policy_loss

RESULT = Path(__file__).parent / "results" / "trsft_modes.png"
LINE = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)  # what the tokens stand for, [V]
MODES = ((0.5, -0.55), (0.3, 0.15), (0.2, 0.7))  # mass and place of the expert's modes
MODE_WIDTH = 0.08
FREE_EXPERT = (0.30, 0.20, 0.15, 0.10, 0.08, 0.06, 0.045, 0.03, 0.018, 0.01, 0.005, 0.002)
FREE_ALPHAS = (0.1, 0.2)
FITS: dict[str, Objective | None] = {  # None: reverse KL, whose loss is written out
    "SFT": objectives.sft(),
    "TrSFT, α = 0.003": objectives.trsft(0.003),
    "TrSFT, α = 0.01": objectives.trsft(0.01),
    "TrSFT, α = 0.1": objectives.trsft(0.1),
    "DFT (α = 1)": objectives.dft(),
    "reverse KL": None,
}


def expert_on_the_line() -> Tensor:
    """The multi-modal expert [V]."""
    bumps = [mass * torch.softmax(-(((LINE - place) / MODE_WIDTH) ** 2) / 2, 0) for mass, place in MODES]
    return torch.stack(bumps).sum(0)


def expert_loss(hidden: Tensor, head: Tensor, expert: Tensor, objective: Objective) -> Tensor:
    """Σ_v expert(v) · token loss(v): every token of the vocabulary once, weighted by the expert's probability. 0-d."""
    num_tokens = len(expert)
    role = torch.full((num_tokens,), Role.EXPERT, dtype=torch.uint8)
    batch = TokenBatch(torch.arange(num_tokens), role, torch.ones_like(expert), expert)
    return linear_policy_loss(hidden.expand(num_tokens, -1), head, batch, objective).loss


def reverse_kl(hidden: Tensor, head: Tensor, expert: Tensor) -> Tensor:
    """Σ_v p(v) log(p(v)/expert(v)), 0-d."""
    logprob = linear_logprob(hidden.expand(len(expert), -1), head, torch.arange(len(expert))).logprob
    return (logprob.exp() * (logprob - expert.log())).sum()


def fit_small_student(objective: Objective | None, expert: Tensor) -> Tensor:
    """The best student of the form softmax(θ₁ x - θ₂ x²), [V]: the lowest loss from six starts; None means reverse KL."""
    head = torch.stack([LINE, -(LINE**2)], 1)  # [V, 2], frozen

    def loss(hidden: Tensor) -> Tensor:
        return reverse_kl(hidden, head, expert) if objective is None else expert_loss(hidden, head, expert, objective)

    starts = [(place / width**2, 0.5 / width**2) for place in (-0.6, 0.0, 0.6) for width in (0.5, 0.15)]
    found = [_minimise(loss, torch.tensor(start, dtype=torch.float64)) for start in starts]
    return torch.softmax(head @ min(found, key=lambda hidden: loss(hidden).item()), 0)


def fit_free_student(alpha: float, expert: Tensor, steps: int = 2000) -> Tensor:
    """TrSFT's student with a logit of its own for every token, [V], from uniform.

    By natural gradient, dL/dlogit divided by p: the plain one vanishes with p, and a token once overshot would never come back.
    """
    one = torch.ones(1, dtype=torch.float64)  # hidden state; the head [V, 1] is what is learned
    objective, logits = objectives.trsft(alpha), torch.zeros_like(expert, requires_grad=True)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(expert_loss(one, logits[:, None], expert, objective), logits)
        with torch.no_grad():
            logits -= alpha / expert.max() * grad / torch.softmax(logits, 0).clamp(min=1e-9)
    return torch.softmax(logits.detach(), 0)


def fixed_point(expert: Tensor, alpha: float) -> Tensor:
    """TrSFT's optimum in closed form, [V]: p_E/λ where p_E > αλ, else 0, with λ such that the mass is 1.

    Often no λ makes it exactly 1: then the token at p_E = αλ, on the linear part of the potential, takes what is left, at most α.
    From Σ p_E V(p) with V' = 1/max(p, α), which is concave: p_E/max(p, α) = λ wherever p > 0.
    """
    mass, order = expert.sort(descending=True)
    total = mass.cumsum(0)
    kept = next(k for k in range(1, len(mass) + 1) if k == len(mass) or mass[k] <= alpha * total[k - 1])
    lagrange = torch.minimum(total[kept - 1], mass[kept - 1] / alpha)
    p = torch.zeros_like(expert)
    p[order[:kept]] = mass[:kept] / lagrange
    p[order[kept - 1]] = 1.0 - p[order[: kept - 1]].sum()
    return p


def push(objective: Objective, p: Tensor) -> Tensor:
    """|dL/dp| [N] of expert tokens with probability p [N]: how hard the loss pulls on the probability itself."""
    logprob = p.log().requires_grad_()
    role = torch.full(p.shape, Role.EXPERT, dtype=torch.uint8)
    batch = TokenBatch(torch.zeros(p.shape, dtype=torch.int64), role, torch.ones_like(p), torch.ones_like(p))
    (grad,) = torch.autograd.grad(policy_loss(logprob, None, batch, objective).loss, logprob)
    return grad.abs() / p


def mode_mass(p: Tensor) -> Tensor:
    """Probability within 2.5 widths of each mode, [3]."""
    return torch.stack([p[(LINE - place).abs() < 2.5 * MODE_WIDTH].sum() for _, place in MODES])


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 1000) -> Tensor:
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def figure(students: dict[str, Tensor], free: dict[float, Tensor]) -> Any:
    """Six small students, the free student against its closed form, and the pull of each loss."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from trapo_train.reports.figures import GREY, INK, PALETTE, STYLE

    with rc_context(STYLE | {"font.size": 11}):
        whole = Figure(figsize=(9, 8.2), dpi=200, facecolor="white")
        grid = whole.add_gridspec(3, 6, left=0.085, right=0.975, top=0.85, bottom=0.075, hspace=0.5, wspace=0.9)
        expert = expert_on_the_line()
        for i, (name, student) in enumerate(students.items()):
            axis = whole.add_subplot(grid[i // 3, 2 * (i % 3) : 2 * (i % 3) + 2])
            _draw_student(axis, name, student, expert, PALETTE[1] if "TrSFT" in name else PALETTE[0], GREY)
        _draw_closed_form(whole.add_subplot(grid[2, :3]), free, PALETTE, GREY)
        _draw_push(whole.add_subplot(grid[2, 3:]), PALETTE, GREY)
        whole.text(0.02, 0.965, "SFT covers the expert's modes, TrSFT seeks one", fontsize=15, fontweight="bold", color=INK)
        lines = (
            "Above: a two-parameter student (line) at its optimum for a three-mode expert (grey), by loss.\n"
            "Below: a student with one logit per token against its closed form; how hard each loss pulls on a token."
        )
        whole.text(0.02, 0.908, lines, fontsize=11, color=GREY, linespacing=1.35)
    return whole


def _draw_student(axis: Any, name: str, student: Tensor, expert: Tensor, colour: str, grey: str) -> None:
    top = 0.27
    axis.fill_between(LINE, expert, color=grey, alpha=0.35, linewidth=0)
    axis.plot(LINE, student.clamp(max=1.5 * top), color=colour, linewidth=2)
    axis.set_ylim(0, top)
    axis.set_xlim(-1, 1)
    axis.set_xticks([-1, 0, 1])
    axis.set_yticks([0, 0.1, 0.2])
    axis.grid(axis="x", visible=False)
    axis.set_title(name, fontsize=11.5, fontweight="bold", color=colour, loc="left")
    shares = " / ".join(f"{share:.0%}" for share in mode_mass(student))
    axis.text(0.98, 0.97, f"mass at the modes\n{shares}", transform=axis.transAxes, ha="right", va="top", fontsize=9.5)
    if student.max() > top:
        place = LINE[student.argmax()]
        axis.annotate(f"p = {student.max():.2f}", (place, 0.2), (place + 0.12, 0.15), fontsize=9.5, color=colour)


def _draw_closed_form(axis: Any, free: dict[float, Tensor], palette: tuple[str, ...], grey: str) -> None:
    expert = torch.tensor(FREE_EXPERT)
    ranks = torch.arange(1, len(expert) + 1)
    axis.bar(ranks, expert, width=0.75, color=grey, alpha=0.35, label="expert = SFT")
    for (alpha, student), colour in zip(free.items(), (palette[1], palette[3]), strict=True):
        closed = fixed_point(torch.tensor(FREE_EXPERT, dtype=torch.float64), alpha)
        axis.plot(ranks, closed, "o", markersize=8, markerfacecolor="none", markeredgecolor=colour)
        axis.plot(ranks, student, ".", markersize=6, color=colour, label=f"TrSFT, α = {alpha:g}")
    axis.plot([], [], "o", markersize=8, markerfacecolor="none", markeredgecolor=grey, label="closed form")
    axis.set_xticks([1, 4, 8, 12])
    axis.set_xlabel("token, by the expert's probability")
    axis.set_ylabel("probability")
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False, fontsize=9.5, loc="upper right")
    axis.text(0.97, 0.3, "closed form: p = p_E/λ above αλ", transform=axis.transAxes, ha="right", fontsize=9.5, color=grey)
    axis.set_title("Expert tokens below αλ are dropped", fontsize=11.5, fontweight="bold", loc="left")


def _draw_push(axis: Any, palette: tuple[str, ...], grey: str) -> None:
    p = torch.logspace(-5, 0, 200, dtype=torch.float64)
    curves = (
        ("SFT: 1/p", objectives.sft(), grey, 2.5e-4),
        ("TrSFT, α = 0.01: ≤ 1/α", objectives.trsft(0.01), palette[2], 1.3e-5),
        ("TrSFT, α = 0.1: ≤ 1/α", objectives.trsft(0.1), palette[1], 1.3e-5),
        ("DFT: 1", objectives.dft(), palette[0], 1.3e-5),
    )
    for label, objective, colour, x in curves:
        axis.loglog(p, push(objective, p), color=colour, linewidth=2)
        y = push(objective, torch.tensor([x], dtype=torch.float64)).item()
        axis.text(x, y * 1.45, label, color=colour, fontsize=9.5)
    axis.set_xlabel("probability p of the expert's token")
    axis.set_ylabel("pull |dL/dp|")
    axis.set_ylim(0.5, 3e5)
    axis.grid(axis="x", visible=False)
    axis.set_title("The pull on unlikely tokens is bounded", fontsize=11.5, fontweight="bold", loc="left")


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.trsft_modes`."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    expert = expert_on_the_line()
    students = {name: fit_small_student(objective, expert) for name, objective in FITS.items()}
    free_expert = torch.tensor(FREE_EXPERT, dtype=torch.float64)
    free = {alpha: fit_free_student(alpha, free_expert) for alpha in FREE_ALPHAS}
    print("| student | mass at the modes | largest probability |\n|---|---|---|")
    for name, student in students.items():
        print(f"| {name} | {' / '.join(f'{share:.3f}' for share in mode_mass(student))} | {student.max():.3f} |")
    for alpha, student in free.items():
        print(f"free student, α = {alpha:g}: off its closed form by {(student - fixed_point(free_expert, alpha)).abs().max():.1e}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    figure(students, free).savefig(RESULT)
    print(f"wrote {RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
