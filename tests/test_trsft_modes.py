"""The demonstration: SFT covers the modes of an expert, TrSFT seeks one, ends at its closed form, and pulls within its bound."""

import math

import pytest
import torch

from benchmarks import trsft_modes as demo
from trapo_kernels import Role, TokenBatch, linear_policy_loss, objectives


@pytest.fixture(scope="module")
def students():
    expert = demo.expert_on_the_line()
    return {name: demo.fit_small_student(objective, expert) for name, objective in demo.FITS.items()}


@pytest.mark.slow
def test_sft_covers_every_mode_and_puts_mass_between_them(students):
    student = students["SFT"]
    assert (demo.mode_mass(student) > 0.1).all()
    gap = (demo.LINE > -0.3) & (demo.LINE < -0.1)
    assert student[gap].sum() > 0.05 > 50 * demo.expert_on_the_line()[gap].sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TrSFT, α = 0.01", "TrSFT, α = 0.1", "DFT (α = 1)", "reverse KL"])
def test_the_others_seek_the_largest_mode(students, name):
    largest, *rest = demo.mode_mass(students[name]).tolist()
    assert largest > 0.98 and max(rest) < 1e-6


def test_a_tiny_alpha_is_sft_and_a_larger_one_is_narrower(students):
    torch.testing.assert_close(students["TrSFT, α = 0.003"], students["SFT"], rtol=1e-4, atol=1e-6)
    peaks = [students[name].max().item() for name in ("SFT", "TrSFT, α = 0.01", "TrSFT, α = 0.1", "DFT (α = 1)")]
    assert peaks == sorted(peaks) and peaks[-1] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_a_free_student_ends_at_the_closed_form(alpha):
    expert = torch.tensor(demo.FREE_EXPERT, dtype=torch.float64)
    student = demo.fit_free_student(alpha, expert, steps=400)
    torch.testing.assert_close(student, demo.fixed_point(expert, alpha), rtol=0, atol=5e-5)


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
def test_the_closed_form_is_the_optimum(alpha):
    """p_E/λ above αλ and 0 below, with one token at the border; and no mixture with another distribution is better."""
    expert = torch.tensor(demo.FREE_EXPERT, dtype=torch.float64)
    p = demo.fixed_point(expert, alpha)
    assert p.sum().item() == pytest.approx(1.0) and (p >= 0).all()
    kept = p > 0
    pull = expert / p.clamp(min=alpha)
    lagrange = pull[kept].max().item()
    torch.testing.assert_close(pull[kept], torch.full_like(pull[kept], lagrange))
    assert (expert[~kept] <= alpha * lagrange).all()
    assert (expert[kept] >= alpha * lagrange * (1 - 1e-12)).all()
    above = expert > alpha * lagrange * (1 + 1e-12)
    torch.testing.assert_close(p[above], expert[above] / lagrange)

    def value(q):
        return (expert * objectives.trsft(alpha).expert.gate.value(q.clamp(min=1e-300).log(), q)).sum()

    for q in torch.distributions.Dirichlet(torch.full((len(expert),), 0.5, dtype=torch.float64)).sample((50,)):
        assert value(0.99 * p + 0.01 * q) <= value(p) + 1e-12


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_gradients_of_unlikely_tokens_are_bounded_by_the_trust_region(alpha):
    p = torch.logspace(-9, 0, 60, dtype=torch.float64)
    assert demo.push(objectives.sft(), p).max().item() == pytest.approx(1e9)
    assert demo.push(objectives.trsft(alpha), p).max().item() <= (1 + 1e-12) / alpha
    assert (demo.push(objectives.dft(), p) <= 1 + 1e-12).all()


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_the_logit_gradient_of_a_token_vanishes_with_its_probability(alpha):
    """‖dL/dlogits‖ ≤ √2 · min(p/α, 1), where SFT's is about √2 at every p that is small."""
    for p in (1e-8, 1e-4, 1e-2, 0.5):
        logits = torch.tensor([p, 1 - p], dtype=torch.float64).log().requires_grad_()
        role, one = torch.full((1,), Role.EXPERT, dtype=torch.uint8), torch.ones(1)
        one_token = TokenBatch(torch.zeros(1, dtype=torch.int64), role, one, one)
        norms = []
        for objective in (objectives.trsft(alpha), objectives.sft()):
            loss = linear_policy_loss(torch.ones(1, 1, dtype=torch.float64), logits[:, None], one_token, objective).loss
            norms.append(torch.autograd.grad(loss, logits)[0].norm().item())
        assert norms[0] <= math.sqrt(2) * min(p / alpha, 1) * (1 + 1e-9)
        assert norms[1] == pytest.approx(math.sqrt(2) * (1 - p))


def test_the_figure_is_written_as_a_picture(students, tmp_path):
    expert = torch.tensor(demo.FREE_EXPERT, dtype=torch.float64)
    free = {alpha: demo.fixed_point(expert, alpha) for alpha in demo.FREE_ALPHAS}
    path = tmp_path / "modes.png"
    demo.figure(students, free).savefig(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
