"""Rows that cannot contribute reach no GEMM, and rows without a gradient only the forward one; counted on the GEMMs themselves."""

from dataclasses import replace

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import Role, TokenBatch, dispatch, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import sweep
from trapo_kernels.backends.gemm import HeadGemm


@pytest.fixture
def rows_through(monkeypatch):
    """Rows that went through the GEMMs of logits, dHidden and dWeight."""
    rows = {"logits": 0, "grad_hidden": 0, "add_grad_factor": 0}

    def count(name, which):
        run = getattr(HeadGemm, name)

        def counted(self, *arguments):
            x = arguments[which]
            rows[name] += (x.hidden if name == "logits" else x).shape[0]
            return run(self, *arguments)

        monkeypatch.setattr(HeadGemm, name, counted)

    count("logits", 0)
    count("grad_hidden", 0)
    count("add_grad_factor", 0)
    return rows


def _batch_with_a_third_scored(dtype=torch.float32):
    """24 rows: 8 active, 8 scored only, 8 of no use."""
    row = torch.arange(24, device=cases.DEVICE)
    b = cases.batch(24, 40, dtype, roles=(1, 2))
    return replace(
        b,
        role=torch.where(row < 16, b.role, Role.IGNORED),
        weight=torch.where(row < 8, 0.1, 0.0).to(dtype),
        entropy_weight=None,
        scored_rows=row[8:16],
    ).with_active_rows(row[:8], silent_rows=row[:0])


@pytest.mark.parametrize("name", ["trapo", "gmpo"])  # one pass, two passes
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_scored_rows_skip_the_backward_alone(backend, name, rows_through):
    hidden, weight, _ = cases.head(24, 6, 40, torch.float32)
    b = _batch_with_a_third_scored()
    poisoned = hidden.detach().clone()
    poisoned[16:] = float("nan")
    poisoned.requires_grad_()
    out = linear_policy_loss(poisoned, weight, b, objectives.PRESETS[name](entropy_coef=0.1), backend=backend)
    grads = cases.gradients(out.loss, (poisoned, weight))
    recomputed = 8 if out.passes == 2 else 0
    assert rows_through == {"logits": 16 + recomputed, "grad_hidden": 8, "add_grad_factor": 8}

    scored = linear_logprob(hidden[:16], weight, b.target[:16], with_entropy=True, backend="reference")
    torch.testing.assert_close(out.logprob[:16], scored.logprob)
    torch.testing.assert_close(out.entropy[:16], scored.entropy)
    assert not out.logprob[16:].any()
    unscored = replace(b, scored_rows=None).with_active_rows(b.active_rows, silent_rows=b.scored_rows)
    without = linear_policy_loss(poisoned, weight, unscored, objectives.PRESETS[name](entropy_coef=0.1), backend=backend)
    assert torch.equal(out.loss, without.loss)
    for ours, expected in zip(grads, cases.gradients(without.loss, (poisoned, weight)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_rows_that_are_only_scored_keep_their_values_where_all_rows_pass_through(backend, monkeypatch):
    """As on a GPU that is not told which rows are active."""
    hidden, weight, _ = cases.head(24, 6, 40, torch.float32)
    b = _batch_with_a_third_scored()
    told = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend)
    monkeypatch.setattr(sweep, "_active_rows", lambda active: None)
    rows = b._rows()._replace(active=None)
    monkeypatch.setattr(TokenBatch, "_rows", lambda batch: rows)
    untold = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend)
    assert told.logprob[8:16].all() and not told.logprob[16:].any()
    results = [[o.logprob, o.entropy, o.loss, *cases.gradients(o.loss, (hidden, weight))] for o in (untold, told)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU would have to ask the device which targets are -100")
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_rows_without_a_target_reach_no_gemm_whatever_comes_down_to_them(backend, rows_through):
    hidden, weight, _ = cases.head(20, 6, 40, torch.float32)
    target = torch.where(torch.arange(20) % 4 == 0, cases.batch(20, 40).target, -100)
    for with_entropy in (False, True):
        out = linear_logprob(hidden, weight, target, with_entropy=with_entropy, backend=backend)
        cases.gradients(out.logprob.sum() + (out.entropy.sum() if with_entropy else 0.0), (hidden, weight))
    assert rows_through == {"logits": 4 * 5, "grad_hidden": 2 * 5, "add_grad_factor": 2 * 5}


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU would have to ask the device which gradients are zero")
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_rows_whose_upstream_gradient_is_zero_skip_the_backward(backend, rows_through):
    hidden, weight, _ = cases.head(20, 6, 40, torch.float32)
    out = linear_logprob(hidden, weight, cases.batch(20, 40).target, with_entropy=True, backend=backend)
    upstream = torch.zeros(20)
    upstream[[3, 11]] = 1.0
    loss = (out.logprob * upstream).sum() + (out.entropy * upstream.roll(1)).sum()
    grad_hidden, _ = cases.gradients(loss, (hidden, weight))
    assert rows_through == {"logits": 24, "grad_hidden": 4, "add_grad_factor": 4}
    assert grad_hidden.abs().sum(1).nonzero().squeeze(1).tolist() == [3, 4, 11, 12]


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_gradient_of_logprobs_alone_takes_the_statistics_that_are_known(backend, monkeypatch):
    hidden, weight, _ = cases.head(9, 6, 40, torch.float32)
    out = linear_logprob(hidden, weight, cases.batch(9, 40).target, with_entropy=True, backend=backend)
    monkeypatch.setattr(dispatch.rows(backend), "policy", None)  # which would find them anew
    assert all(grad.any() for grad in cases.gradients(out.logprob.sum(), (hidden, weight)))


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_a_loss_of_which_no_gradient_is_asked_makes_no_gradient_of_logits(backend, rows_through, monkeypatch):
    hidden, weight, _ = cases.head(24, 6, 40, torch.float32)
    rows, asked = dispatch.rows(backend), []
    policy = rows.policy
    monkeypatch.setattr(rows, "policy", lambda *arguments: asked.append(arguments[-1]) or policy(*arguments))
    with torch.no_grad():
        out = linear_policy_loss(hidden, weight, _batch_with_a_third_scored(), objectives.trapo(), backend=backend)
    assert asked == [None] and out.loss != 0 and rows_through == {"logits": 16, "grad_hidden": 0, "add_grad_factor": 0}


@pytest.mark.parametrize("backend", ["reference", *cases.CHUNKED, "triton_fused"])
def test_rows_that_are_not_named_are_ignored_whatever_they_hold(backend):
    hidden, weight, _ = cases.head(20, 6, 40, torch.float32)
    rows = torch.tensor([2, 3, 11, 17], device=cases.DEVICE)
    named = torch.zeros(20, dtype=torch.bool, device=cases.DEVICE).index_fill(0, rows, True)
    target = torch.randint(40, (20,), device=cases.DEVICE)
    poisoned = torch.where(named[:, None], hidden.detach(), float("nan")).requires_grad_()
    temperature = torch.where(named, 0.7, float("nan"))
    found = []
    for given, options in ((torch.where(named, target, -100), {}), (torch.where(named, target, 10**6), {"active_rows": rows})):
        out = linear_logprob(poisoned, weight, given, with_entropy=True, temperature=temperature, backend=backend, **options)
        found.append([*out, *cases.gradients((out.logprob - out.entropy).sum(), (poisoned, weight))])
    for ignored, told in zip(*found, strict=True):
        torch.testing.assert_close(told, ignored)  # on a GPU GEMMs of other shapes
    assert found[1][0].nonzero().squeeze(1).tolist() == rows.tolist()


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what the rows are")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([2, 3], r"must be int64 of shape \[K\] on cpu, got list"),
        (torch.tensor([2.0]), r"must be int64 of shape \[K\] on cpu, got torch.float32 \[1\] on cpu"),
        (torch.tensor([3, 2]), r"must ascend in \[0, N\) = \[0, 5\), got \[3, 2\]"),
        (torch.tensor([2, 2]), r"must ascend in \[0, N\)"),
        (torch.tensor([2, 5]), r"must ascend in \[0, N\)"),
        (torch.tensor([-1, 2]), r"must ascend in \[0, N\)"),
        (torch.tensor([0, 1]), r"must have targets, got -100 at row 1\. Pass \(target != -100\)\.nonzero"),
    ],
)
def test_bad_active_rows(rows, message):
    hidden, weight, _ = cases.head(5, 6, 40, torch.float32)
    with pytest.raises(ValueError, match=f"linear_logprob: active_rows {message}"):
        linear_logprob(hidden, weight, torch.tensor([0, -100, 2, 3, 4]), active_rows=rows)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what the rows are")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([2]), "must have a target and no part in the loss.*got row 2"),
        (torch.tensor([24]), r"must lie in \[0, N\) = \[0, 24\), got 24"),
        (torch.tensor([9.0]), r"must be int64 of shape \[K\]"),
    ],
)
def test_bad_scored_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        replace(_batch_with_a_third_scored(), scored_rows=rows)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what the rows are")
def test_a_scored_row_needs_a_target():
    b = _batch_with_a_third_scored()
    with pytest.raises(ValueError, match="must have a target and no part in the loss.*got row 9"):
        replace(b, target=b.target.index_fill(0, torch.tensor([9]), -100))
