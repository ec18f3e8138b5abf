"""Batches of at most D rows on a CPU: their logits lie where dWeight will."""

import itertools

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, Role, linear_logprob, linear_policy_loss, objectives, terms
from trapo_kernels.backends import in_weight, native
from trapo_kernels.backends.gemm import HeadGemm
from trapo_kernels.backends.logits import LogitTransform

pytestmark = [
    pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu"))),
    pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU sweeps in chunks"),
]
ROWS, HIDDEN_SIZE, VOCAB_SIZE = 40, 48, 1003
SETTINGS = {"temperature": torch.linspace(0.5, 2.0, ROWS), "softcap": 4.0}


@pytest.fixture(autouse=True)
def small_batches_too(monkeypatch):
    for name, value in {"_LEAST_LOGITS": 0, "_LEAST_VOCABULARY": 0, "_BLOCK": 96, "_GRAD_ROWS": 16}.items():
        monkeypatch.setattr(in_weight, name, value)


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the sweep had."""
    seen, own = [], in_weight.add_gradients

    def counted(gemm, hidden, *args):
        seen.append(len(hidden))
        return own(gemm, hidden, *args)

    monkeypatch.setattr(in_weight, "add_gradients", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab_size"), itertools.product((1, 40, 48), (48, 64), (17, 96, 97, 1003, 5000)))
def test_no_gradient_is_written_over_logits_that_are_still_needed(rows, hidden_size, vocab_size, dtype):
    weight = torch.zeros(vocab_size, hidden_size, dtype=dtype)
    blocks = in_weight._blocks(vocab_size)
    assert [token for block in blocks for token in range(block.start, block.stop)] == list(range(vocab_size))
    parts = in_weight._room(weight, blocks, rows)
    for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        assert part.shape == (rows, block.stop - block.start)
        part.fill_(number + 1)
    for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        assert (part == number + 1).all()
        weight[block] = -1
    assert (weight == -1).all()
    first = weight.untyped_storage().data_ptr()
    end = first + weight.untyped_storage().nbytes()
    outside = sum(part.numel() for part in parts if not first <= part.data_ptr() < end)
    assert outside == in_weight.spare_logits(rows, hidden_size, vocab_size, dtype)
    no_room = max(0, 1 - hidden_size * dtype.itemsize / (4 * rows))  # of every logit, where dWeight is narrower
    assert outside <= rows * (no_room * vocab_size + 2 * max(16, -(-vocab_size // 8) + 15))


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("setting", [{}, SETTINGS], ids=["plain", "transformed"])
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset_is_as_close_to_fp64_as_fp32_eager(name, setting, scale, calls):
    exact_inputs, exact_batch = cases.head(ROWS, HIDDEN_SIZE, VOCAB_SIZE, scale=scale), cases.batch(ROWS, VOCAB_SIZE)
    inputs, b = cases.head(ROWS, HIDDEN_SIZE, VOCAB_SIZE, torch.float32, scale), cases.batch(ROWS, VOCAB_SIZE, torch.float32)

    def eager(hidden, weight, bias, of):
        loss = cases.eager_loss(name, *cases.eager_statistics(hidden, weight, of.target, bias, **setting), of, entropy_coef=0.03)
        return loss, *cases.gradients(loss, (hidden, weight, bias))

    objective = objectives.PRESETS[name](entropy_coef=0.03, **({"beta": 0.0} if name == "uft" else {}))
    out = linear_policy_loss(*inputs[:2], b, objective, bias=inputs[2], backend="native", **setting)
    found = [out.loss, *cases.gradients(out.loss, inputs)]
    cases.check_as_close_as_eager(found, eager(*inputs, b), eager(*exact_inputs, exact_batch))
    assert calls == [int((b.role != Role.IGNORED).sum())] or out.passes == 2


@pytest.mark.parametrize("rows", [1, HIDDEN_SIZE])
@pytest.mark.parametrize(
    "of", [(0, 1, 2), (1, 2), (0, 1), (1,)], ids=lambda of: " ".join(("hidden", "weight", "bias")[i] for i in of)
)
def test_any_gradients_beside_that_of_the_weight(of, rows, calls, monkeypatch):
    """The GEMMs of what nobody wants are skipped."""
    done, own = [], HeadGemm.add_grad_rows
    monkeypatch.setattr(HeadGemm, "add_grad_rows", lambda *args, **kwargs: done.append(1) or own(*args, **kwargs))
    inputs = cases.head(rows, HIDDEN_SIZE, VOCAB_SIZE, torch.float32)
    b, exact_batch = (cases.batch(rows, VOCAB_SIZE, dtype, roles=(1, 2)) for dtype in (torch.float32, torch.float64))
    given = [x if i in of else x.detach() for i, x in enumerate(inputs)]
    loss = linear_policy_loss(given[0], given[1], b, objectives.trapo(), bias=given[2], backend="native").loss
    ours = cases.gradients(loss, [given[i] for i in of])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = linear_policy_loss(*exact[:2], exact_batch, objectives.trapo(), bias=exact[2], backend="reference").loss
    for grad, expected in zip(ours, cases.gradients(truth, [exact[i] for i in of]), strict=True):
        assert cases.error(grad, expected) <= 2e-6 * expected.abs().max()
    assert calls == [rows] and bool(done) == (0 in of)


@pytest.mark.parametrize(
    ("dtype", "units"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        pytest.param(
            torch.bfloat16, True, marks=pytest.mark.skipif(not native.BF16_UNITS, reason="this processor does not multiply bf16")
        ),
    ],
    ids=["fp32", "bf16 by fp32 GEMMs", "bf16 by its own GEMMs"],
)
@pytest.mark.parametrize("of", ["logprob", "entropy", "both"])
def test_arbitrary_gradients_of_logprob_and_entropy(of, dtype, units, calls, monkeypatch):
    monkeypatch.setattr(native, "BF16_UNITS", native.BF16_UNITS if units else "")
    inputs, target = cases.head(ROWS, HIDDEN_SIZE, VOCAB_SIZE, dtype), torch.arange(ROWS)
    upstream = torch.linspace(-1.0, 1.0, 2 * ROWS).view(2, ROWS) * torch.tensor([of != "entropy", of != "logprob"])[:, None]

    def gradients(backend, inputs):
        hidden, weight, bias = inputs
        out = linear_logprob(hidden, weight, target, bias=bias, with_entropy=True, backend=backend, **SETTINGS)
        given = [(part, grad.to(part)) for part, grad in zip((out.logprob, out.entropy), upstream, strict=True) if grad.any()]
        return torch.autograd.grad([part for part, _ in given], inputs, [grad for _, grad in given])

    exact = gradients("reference", [x.detach().double().requires_grad_() for x in inputs])
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    for ours, truth in zip(gradients("native", inputs), exact, strict=True):
        assert (ours.double() - truth).norm() <= bound * truth.norm()
    assert calls == [ROWS]


def test_rows_that_are_selected_are_those_that_count(calls):
    inputs, b = cases.head(4 * ROWS, HIDDEN_SIZE, VOCAB_SIZE, torch.float32), cases.batch(4 * ROWS, VOCAB_SIZE, torch.float32)
    role = torch.where(torch.arange(4 * ROWS) % 5 == 0, b.role, Role.IGNORED)
    b = cases.batch(4 * ROWS, VOCAB_SIZE, torch.float32, role=role)
    hidden = torch.where((role == Role.IGNORED)[:, None], float("nan"), inputs[0].detach()).requires_grad_()
    out = linear_policy_loss(hidden, inputs[1], b, objectives.trapo(entropy_coef=0.03), backend="native")
    ours = cases.gradients(out.loss, (hidden, inputs[1]))
    active = int((role != Role.IGNORED).sum())
    assert calls == [active] and 0 < active <= HIDDEN_SIZE < 4 * ROWS
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    b = cases.batch(4 * ROWS, VOCAB_SIZE, role=role)
    truth = cases.gradients(linear_policy_loss(*exact, b, objectives.trapo(entropy_coef=0.03), backend="reference").loss, exact)
    for grad, expected in zip(ours, truth, strict=True):
        assert cases.error(grad, expected) <= 1e-6 * expected.abs().max()


def test_it_is_repeatable(calls):
    inputs, b = cases.head(ROWS, HIDDEN_SIZE, VOCAB_SIZE, torch.float32), cases.batch(ROWS, VOCAB_SIZE, torch.float32)
    first, second = (linear_policy_loss(*inputs[:2], b, objectives.trapo(), backend="native").loss for _ in range(2))
    for one, two in zip(cases.gradients(first, inputs[:2]), cases.gradients(second, inputs[:2]), strict=True):
        assert torch.equal(one, two)
    assert len(calls) == 2
    loss = linear_logprob(*inputs[:2], b.target, backend="native").logprob.sum()
    once, again = (cases.gradients(loss, inputs[:2]) for _ in range(2))  # of a retained graph
    assert all(map(torch.equal, once, again)) and calls[2:] == [ROWS, ROWS]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_invariant": True},
        {"logits_dtype": torch.bfloat16, "dtype": torch.bfloat16},
        {"backend": "torch"},
        {"lora": LoraHead(torch.ones(2, HIDDEN_SIZE), torch.ones(VOCAB_SIZE, 2))},
        {"frozen": True},
        {"rows": HIDDEN_SIZE + 1},
        {"process_group": "of this process alone"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_does_not_do_is_swept_in_chunks(change, calls, one_rank):
    change = {"backend": "native"} | change | ({"process_group": one_rank} if "process_group" in change else {})
    rows, dtype, frozen = change.pop("rows", ROWS), change.pop("dtype", torch.float32), change.pop("frozen", False)
    hidden, weight, _ = cases.head(rows, HIDDEN_SIZE, VOCAB_SIZE, dtype)
    b = cases.batch(rows, VOCAB_SIZE, torch.float32, roles=(1, 2))
    linear_policy_loss(hidden, weight.detach() if frozen else weight, b, objectives.trapo(), **change).loss.backward()
    assert calls == []


def _policy(logits, grad_dtype):
    rows = len(logits[0])
    one, role = torch.ones(rows), torch.full((rows,), Role.EXPERT, dtype=torch.uint8)
    role[3] = Role.IGNORED
    grads = [part.view(grad_dtype)[:, : part.shape[1]] for part in logits]
    target, bias = 61 * torch.arange(rows), torch.linspace(-1, 1, sum(part.shape[1] for part in logits))
    streams, gates = (role, 0 * one, one, one, None, None, -0.1 * one), ([1, 1, 0], [0.0] * terms.NUM_SCALARS)
    stats = torch.ops.trapo_native.row_policy(logits, target, bias, one + 0.5, 1.0, 5.0, *streams, *gates, grads)
    return *stats, torch.cat(grads, 1)


def _gradient(logits, grad_dtype):
    rows, target = len(logits[0]), torch.where(torch.arange(len(logits[0])) == 3, -100, 61 * torch.arange(len(logits[0])))
    bias, one = torch.linspace(-1, 1, sum(part.shape[1] for part in logits)), torch.ones(rows)
    stats = native.statistics(torch.cat(logits, 1), target, LogitTransform(bias, 5.0, one + 0.5), True)
    grads = [part.view(grad_dtype)[:, : part.shape[1]] for part in logits]
    torch.ops.trapo_native.row_gradient(logits, target, bias, one + 0.5, 1.0, 5.0, *stats, one, -0.1 * one, grads)
    return (torch.cat(grads, 1),)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(4096, 904), (904, 4096), (1, 4999), (1000, 1000, 1000, 2000)])
def test_rows_in_parts_are_rows(widths, grad_dtype):
    """Bit for bit where parts begin with a block of the sweep; a row that does not count gets zeros."""
    logits = 3 * torch.randn(80, sum(widths))
    logits[3] = float("nan")
    for of_rows in (_policy, _gradient):
        parts = [part.contiguous() for part in logits.split(list(widths), 1)]
        for ours, expected in zip(of_rows(parts, grad_dtype), of_rows([logits.clone()], grad_dtype), strict=True):
            if widths == (4096, 904):
                assert torch.equal(ours, expected)
            torch.testing.assert_close(ours, expected, rtol=2e-5 if grad_dtype == torch.float32 else 1e-2, atol=1e-6)
            assert not ours[3].any()


@pytest.mark.parametrize(
    ("logits", "grad", "message"),
    [
        ([], [], r"logits must be one tensor or more, got none\. Pass all columns"),
        (
            [(2, 3), (3, 3)],
            [],
            r"parts of logits must have as many rows as the first, 2, got \[3, 3\]\. Pass the columns",
        ),
        ([(2, 3), (2, 4)], [(2, 3)], r"grad must have as many parts as logits, 2, got 1\. Pass one for each"),
        ([(2, 3), (2, 4)], [(2, 3), (2, 3)], r"grad must have the shape of logits, \[2, 4\], got \[2, 3\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(logits, grad, message):
    logits, grad = ([torch.zeros(shape) for shape in shapes] for shapes in (logits, grad))
    rows, role = torch.ones(2), torch.ones(2, dtype=torch.uint8)
    streams, gates = (role, rows, rows, rows, None, None, None), ([1, 1, 0], [0.0] * terms.NUM_SCALARS)
    with pytest.raises(RuntimeError, match=f"row_policy: {message}"):
        torch.ops.trapo_native.row_policy(logits, torch.zeros(2).long(), None, None, 1.0, 0.0, *streams, *gates, grad)
    mixed = [torch.zeros(2, 3), torch.zeros(2, 3).bfloat16()]
    with pytest.raises(RuntimeError, match=r"row_policy: grad must be torch.float32, got torch.bfloat16"):
        fp32 = [torch.zeros(2, 3) for _ in mixed]
        torch.ops.trapo_native.row_policy(fp32, torch.zeros(2).long(), None, None, 1.0, 0.0, *streams, *gates, mixed)
