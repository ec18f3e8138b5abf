"""What the CUDA kernels of csrc must compute, against fp64: on a GPU (test_native_gpu.py) and on the host (test_native_on_host.py).

`kernels` has the functions of `trapo_kernels.backends.native`.
"""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import objectives, terms
from trapo_kernels.backends import rows_torch
from trapo_kernels.backends.logits import LogitTransform, RowStatistics

ROWS = 5
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float32, torch.float16), (torch.float16, torch.float16)]


def logits(vocab_size, dtype, aligned):
    """[5, V], every row aligned to 64 bytes as HeadGemm.buffer has them, or packed at an odd stride; row 1 is NaN."""
    stride = -(-vocab_size // 16) * 16 if aligned else vocab_size + 1
    buffer = torch.full((ROWS, stride), float("nan"), device=cases.DEVICE, dtype=dtype)
    buffer[:, :vocab_size] = 4 * torch.randn(ROWS, vocab_size, device=cases.DEVICE)
    buffer[1] = float("nan")
    return buffer[:, :vocab_size]


def transform(vocab_size, plain):
    if plain:
        return LogitTransform()
    bias = torch.randn(vocab_size, device=cases.DEVICE)
    return LogitTransform(bias, 6.0, torch.rand(ROWS, device=cases.DEVICE) + 0.5)


def batch(vocab_size, dtype=torch.float64):
    """Row 1, whose logits are NaN, is ignored; targets at both ends of the vocabulary and inside."""
    role = torch.tensor([1, 0, 2, 1, 2], dtype=torch.uint8)
    target = torch.tensor([0, 0, vocab_size - 1, vocab_size // 2, vocab_size // 3])
    return cases.batch(ROWS, vocab_size, dtype, role=role, target=target)


def _exact(t):
    bias = None if t.bias is None else t.bias.double()
    return t._replace(bias=bias, temperature=t.temperature.double() if isinstance(t.temperature, torch.Tensor) else t.temperature)


def _copy(x):
    """The same values at the same strides: what clone() does not promise for a part of a buffer."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _close(ours, truth, dtype):
    """Within four roundings of `dtype`, of the largest element where that is in fp32."""
    eps = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(ours.double(), truth.double(), rtol=4 * eps, atol=eps * max(1e-3, float(truth.abs().max())))


def check_rows(kernels, vocab_size, dtype, grad_dtype, aligned, plain):
    """Statistics, the gradient from given statistics, and both at once over the logits themselves."""
    given, t = logits(vocab_size, dtype, aligned), transform(vocab_size, plain)
    objective = objectives.trapo(entropy_coef=0.1)
    streams = [terms.streams(batch(vocab_size, x), objective, x) for x in (torch.float32, torch.float64)]
    target = batch(vocab_size).target
    scored = torch.where(streams[0].role == 0, -100, target)
    exact = given.double().nan_to_num(0.0)
    truth, grad_truth = rows_torch.policy(exact, scored, _exact(t), streams[1], objective, True, torch.float64)

    read = _copy(given)
    statistics = kernels.statistics(read, scored, t, True)
    assert not kernels.statistics_overwrite(given)  # so that nobody copies them first
    torch.testing.assert_close(read, given, rtol=0, atol=0, equal_nan=True)
    known = RowStatistics(*(part.float() for part in truth))
    slope = terms.coefficients(truth.logprob, streams[1], objective).float()
    gradient = kernels.logprob_gradient(_copy(given), scored, t, known, slope, streams[0].grad_entropy, grad_dtype)
    stats, grad = kernels.policy(_copy(given), target, t, streams[0], objective, True, grad_dtype)
    for ours in (statistics, stats):
        for part, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=2e-5)
    for ours in (gradient, grad):
        assert ours.dtype == grad_dtype and not ours[1].any()
        _close(ours, grad_truth, grad_dtype)


FAR = 2**30 + 16  # elements; the third of such rows begins beyond 2^31


def far_size(vocab_size):
    """Elements of the memory that `check_far_rows` takes."""
    return 2 * FAR + vocab_size


def check_far_rows(kernels, vocab_size, grad_dtype, directory):
    """Rows that are `FAR` apart have the bits of neighbours. On a CPU they lie in a mapped file in `directory`, of which only their
    own pages ever exist."""
    if cases.DEVICE == "cpu":
        space = torch.from_file(str(directory / "sparse"), shared=True, size=far_size(vocab_size), dtype=torch.float32)
    else:
        space = torch.empty(far_size(vocab_size), device=cases.DEVICE)
    far, objective = space.as_strided((3, vocab_size), (FAR, 1)), objectives.trapo(entropy_coef=0.1)
    # As far from a multiple of 16 elements as those, or kernels are compiled to another order of summation.
    near = torch.randn(3, -(-vocab_size // 16) * 16, device=cases.DEVICE)[:, :vocab_size]
    b = cases.batch(3, vocab_size, torch.float32, roles=(1, 2))
    streams, t = terms.streams(b, objective, torch.float32), LogitTransform(temperature=0.7)
    known = kernels.statistics(_copy(near), b.target, t, True)
    settings = (known, known.logprob, known.entropy, grad_dtype)
    for run in (
        lambda logits: kernels.statistics(logits, b.target, t, True),
        lambda logits: [kernels.logprob_gradient(logits, b.target, t, *settings)],
        lambda logits: [*(out := kernels.policy(logits, b.target, t, streams, objective, True, grad_dtype))[0], out[1]],
    ):
        for here, there in zip(run(_copy(near)), run(far.copy_(near)), strict=True):
            assert torch.equal(here, there)


def check_softcap(kernels, temperature):
    """Gradients where a softcap of Gemma's size bends have at most twice eager's error, and are 0 where it is saturated."""
    cap, (bins, rows) = 30.0, (2, 100)
    of_cap = torch.cat([torch.linspace(low, high, rows) for low, high in ((2.0, 5.0), (5.0, 9.0))])
    x = (cap * of_cap).to(cases.DEVICE)[:, None].expand(bins * rows, 2)  # of equal logits, p is exactly 1/2
    target, one = torch.arange(bins * rows, device=cases.DEVICE) % 2, torch.ones(bins * rows, device=cases.DEVICE)
    found = []
    for dtype in (torch.float32, torch.float64):
        raw = x.to(dtype, copy=True).requires_grad_()
        log_p = (cap * (raw / cap).tanh() / temperature).log_softmax(-1)
        found.append(torch.autograd.grad(log_p.gather(1, target[:, None]).sum(), raw)[0])
    eager, exact = found
    t = LogitTransform(softcap=cap, temperature=temperature)
    stats = kernels.statistics(x.clone(), target, t, False)
    ours = kernels.logprob_gradient(x.clone(), target, t, stats, one, None, torch.float32)
    error, of_eager = ((grad - exact).square().view(bins, -1).mean(1).sqrt() for grad in (ours, eager))
    assert (error <= 2 * of_eager).all(), error / of_eager
    x = torch.tensor([[1e3, -1e3, 900.0, -900.0]], device=cases.DEVICE)
    stats = kernels.statistics(x.clone(), target[:1], t, False)
    assert not kernels.logprob_gradient(x.clone(), target[:1], t, stats, one[:1], None, torch.float32).any()


def check_huge_divisors(kernels):
    """A softcap that caps nothing changes nothing, and a temperature at which all logits are equal makes them equally likely."""
    x = torch.tensor([[0.5, -3.0, 20.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]], device=cases.DEVICE)
    target, one = torch.tensor([1, 2], device=cases.DEVICE), torch.ones(2, device=cases.DEVICE)

    def run(given, t):
        stats = kernels.statistics(given.clone(), target, t, True)
        return *stats, kernels.logprob_gradient(given.clone(), target, t, stats, one, None, torch.float32)

    for softcap in (1e38, 3e38):
        for ours, plain in zip(run(x[:, :3], LogitTransform(softcap=softcap)), run(x[:, :3], LogitTransform()), strict=True):
            torch.testing.assert_close(ours, plain)
    for temperature in (1e38, 3e38):
        logprob, entropy, *_ = run(x, LogitTransform(temperature=temperature))
        uniform = torch.tensor([3.0, 4.0], device=cases.DEVICE).log()
        torch.testing.assert_close((-logprob, entropy), (uniform, uniform))


def policy_bits(kernels, vocab_size, given):
    """All results of one `policy` call on a copy of these logits, for comparison bit by bit."""
    objective, b = objectives.trapo(entropy_coef=0.1), batch(vocab_size, torch.float32)
    streams = terms.streams(b, objective, torch.float32)
    stats, grad = kernels.policy(_copy(given), b.target, LogitTransform(), streams, objective, True, torch.float32)
    return [*stats, grad]


def check_scoring(runs, shape, scale):
    """The same bits from every one of `runs`, and the statistics of bf16 operands [N, D] and [V, D] within fp32's reach."""
    hidden, weight, _ = (x.detach() for x in cases.head(*shape, torch.bfloat16, scale))
    target = torch.randint(shape[2], (shape[0],), device=cases.DEVICE)
    target[::2] = (hidden[::2].float() @ weight.float().T).argmax(-1)
    target[::7] = -100
    temperature = torch.rand(shape[0], device=cases.DEVICE) + 0.5
    stats = [kernels.fused_scoring(hidden, weight, target, LogitTransform(temperature=temperature)) for kernels in runs]
    for other in stats[1:]:
        assert all(torch.equal(first, second) for first, second in zip(stats[0], other, strict=True)), "not close to each other"
    logprob, entropy = cases.eager_statistics(
        hidden.double(), weight.double(), target.clamp(min=0), temperature=temperature.double()
    )
    counted = target != -100
    # A tensor core cuts its sums off, an error in one direction, once for every 16 of D; the emulator rounds them.
    cut_off = shape[1] / 32 if cases.DEVICE == "cuda" else 0
    spacing = (4 + cut_off) * torch.finfo(torch.float32).eps * (hidden.double() @ weight.double().T).abs().amax(-1) / temperature
    bound = torch.maximum(spacing, 2e-6 * logprob.abs()).clamp(min=1e-5)[counted]
    for ours, truth in ((stats[0].logprob, logprob), (stats[0].entropy, entropy)):
        assert ((ours - truth)[counted].abs() <= bound).all(), "not close to fp64"
    assert all(not part[~counted].any() for part in stats[0])


def check_targets_outside(kernels):
    """A target that the vocabulary does not have gives NaN, and only there."""
    hidden, weight, _ = (x.detach() for x in cases.head(3, 64, 300, torch.bfloat16))
    stats = kernels.fused_scoring(hidden, weight, torch.tensor([5, 300, -1], device=cases.DEVICE), LogitTransform())
    assert stats.logprob.isnan().tolist() == [False, True, True]


def check_scoring_of_nan(kernels):
    """A NaN logit makes its row NaN, whether it is the target's or another's; ignored rows stay zeros."""
    hidden, weight, _ = (x.detach() for x in cases.head(4, 64, 300, torch.bfloat16))
    hidden[2] = float("nan")
    weight[5] = float("nan")
    stats = kernels.fused_scoring(hidden, weight, torch.tensor([5, 299, 0, -100], device=cases.DEVICE), LogitTransform())
    for part in (stats.logprob, stats.entropy):
        assert part.isnan().tolist() == [True, True, True, False]
        assert part[3] == 0


def check_refused_scoring(kernels, message, hidden_size=64, dtype=torch.bfloat16):
    """The op raises with this message."""
    hidden, weight, _ = (x.detach() for x in cases.head(3, hidden_size, 300, dtype))
    target = torch.zeros(3, dtype=torch.int64, device=cases.DEVICE)
    with pytest.raises(RuntimeError, match=message):
        kernels.fused_scoring(hidden, weight, target, LogitTransform())


def check_refused_arguments(ops):
    """Gradients and weights of another shape are refused, before anything is read or written there."""
    logits, target = torch.zeros(2, 3, device=cases.DEVICE), torch.zeros(2, dtype=torch.int64, device=cases.DEVICE)
    rows, role, transform = logits[:, 0].contiguous(), torch.ones_like(target, dtype=torch.uint8), (None, None, 1.0, 0.0)
    for shape in ((2, 2), (3, 3), (6,)):
        grad = torch.zeros(shape, device=cases.DEVICE)
        message = rf"grad must have the shape of logits, \[2, 3\], got \{list(shape)}\. Pass the logits or"
        with pytest.raises(RuntimeError, match=f"row_gradient: {message}"):
            ops.row_gradient([logits], target, *transform, rows, rows, rows, rows, None, None, [grad])
        with pytest.raises(RuntimeError, match=f"row_policy: {message}"):
            streams = role, rows, rows, rows, None, None, None
            ops.row_policy([logits], target, *transform, *streams, [1, 1, 0], [0.0] * terms.NUM_SCALARS, [grad])
    hidden, weight = (torch.zeros(2, size, dtype=torch.bfloat16, device=cases.DEVICE) for size in (64, 72))
    message = r"scoring: weight must have shape \[V, D\] with the D of hidden, 64, got \[2, 72\]\. Pass the head"
    with pytest.raises(RuntimeError, match=message):
        ops.scoring(hidden, weight, target, None, 1.0)


def check_scale(kernels, dtype, elements, offset):
    """`offset`: of the first element from 16-byte alignment. In its place, and fp32 to each dtype, with out at any alignment."""
    given = torch.randn(offset + elements).to(dtype).to(cases.DEVICE)
    narrower = [torch.float32, torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    for factor in (1.0, 3.0):
        grad, by = given.clone()[offset:], torch.tensor(factor, device=cases.DEVICE)
        exact = grad.float() * factor
        for to in narrower:
            for first in {0, offset}:
                out = torch.full((first + elements,), torch.nan, dtype=to, device=cases.DEVICE)
                kernels.scale_to(grad, by, out[first:])
                assert torch.equal(out[first:], exact.to(to)) and torch.equal(grad, given[offset:])
                assert out[:first].isnan().all()
        kernels.scale_to(grad, by, grad)
        assert torch.equal(grad, exact.to(dtype))
