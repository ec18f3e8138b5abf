"""The compiled CUDA kernels by themselves, on a GPU: every width, layout and dtype that a launch distinguishes, against fp64.

`make gpu-test` runs this file under compute-sanitizer, too.
"""

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import objectives, terms
from trapo_kernels.backends import native, rows_torch
from trapo_kernels.backends.logits import LogitTransform, RowStatistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.why_not("cuda") is not None, reason=str(native.why_not("cuda"))),
]
ROWS = 5
# One thread's worth, odd, a block, clusters of 1 to 8 blocks with two or one to a multiprocessor, too wide for a cluster.
WIDTHS = [1, 7, 1000, 4099, 28_000, 57_000, 100_000, 152_064, 250_001, 470_000]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float32, torch.float16), (torch.float16, torch.float16)]


def _logits(vocab_size, dtype, aligned):
    """[5, V], every row aligned to 64 bytes as HeadGemm.buffer has them, or packed at an odd stride; row 1 is NaN."""
    stride = -(-vocab_size // 16) * 16 if aligned else vocab_size + 1
    buffer = torch.full((ROWS, stride), float("nan"), device="cuda", dtype=dtype)
    buffer[:, :vocab_size] = 4 * torch.randn(ROWS, vocab_size, device="cuda")
    buffer[1] = float("nan")
    return buffer[:, :vocab_size]


def _transform(vocab_size, plain):
    if plain:
        return LogitTransform()
    bias = torch.randn(vocab_size, device="cuda")
    return LogitTransform(bias, 6.0, torch.rand(ROWS, device="cuda") + 0.5)


def _exact(transform):
    bias = None if transform.bias is None else transform.bias.double()
    temperature = transform.temperature
    return transform._replace(bias=bias, temperature=temperature.double() if isinstance(temperature, torch.Tensor) else temperature)


def _close(ours, truth, dtype):
    """Within four roundings of `dtype`, of the largest element where that is in fp32."""
    eps = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(ours.double(), truth.double(), rtol=4 * eps, atol=eps * max(1e-3, float(truth.abs().max())))


def _batch(vocab_size, dtype):
    role = torch.tensor([1, 0, 2, 1, 2], dtype=torch.uint8)
    target = torch.tensor([0, 0, vocab_size - 1, vocab_size // 2, vocab_size // 3])
    return cases.batch(ROWS, vocab_size, dtype, role=role, target=target)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "bias, softcap, temperatures"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd stride"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_rows_against_fp64(vocab_size, dtype, grad_dtype, aligned, plain):
    logits, transform = _logits(vocab_size, dtype, aligned), _transform(vocab_size, plain)
    objective = objectives.trapo(entropy_coef=0.1)
    streams = [terms.streams(_batch(vocab_size, x), objective, x) for x in (torch.float32, torch.float64)]
    target = _batch(vocab_size, dtype).target
    scored = torch.where(streams[0].role == 0, -100, target)
    exact = logits.double().nan_to_num(0.0)
    truth, grad_truth = rows_torch.policy(exact.clone(), target, _exact(transform), streams[1], objective, True, torch.float64)

    statistics = native.statistics(logits.clone(), scored, transform, True)
    gradient = native.logprob_gradient(
        logits.clone(),
        scored,
        transform,
        RowStatistics(*(part.float() for part in truth)),
        terms.coefficients(truth.logprob, streams[1], objective).grad_logprob.float(),
        streams[0].grad_entropy,
        grad_dtype,
    )
    stats, grad = native.policy(logits, target, transform, streams[0], objective, True, grad_dtype)  # in place
    for ours in (statistics, stats):
        for part, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=2e-5)
    for ours in (gradient, grad):
        assert ours.dtype == grad_dtype and not ours[1].any()
        _close(ours, grad_truth, grad_dtype)


def test_row_kernels_give_the_same_bits_twice():
    logits, streams = _logits(152_064, torch.float32, True), terms.streams(_batch(152_064, torch.float32), objectives.trapo())
    runs = [
        native.policy(
            logits.clone(), _batch(152_064, torch.float32).target, LogitTransform(), streams, objectives.trapo(), True, dtype
        )
        for dtype in (torch.float32, torch.float32)
    ]
    for first, second in zip([*runs[0][0], runs[0][1]], [*runs[1][0], runs[1][1]], strict=True):
        assert torch.equal(first, second)


hopper = pytest.mark.skipif(
    cases.DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="the scoring kernel is for sm_90"
)


@hopper
@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "shape", [(1, 8, 1), (64, 64, 256), (129, 72, 257), (300, 200, 5000), (128 * 12 + 1, 128, 1000), (70, 3584, 33_000)], ids=str
)
def test_scoring_against_fp64(shape, scale):
    hidden, weight, _ = (x.detach() for x in cases.head(*shape, torch.bfloat16, scale))
    target = torch.randint(shape[2], (shape[0],), device="cuda")
    target[::2] = (hidden[::2].float() @ weight.float().T).argmax(-1)
    target[::7] = -100
    temperature = torch.rand(shape[0], device="cuda") + 0.5
    runs = [native.fused_scoring(hidden, weight, target, LogitTransform(temperature=temperature)) for _ in range(2)]
    logprob, entropy = cases.eager_statistics(hidden.double(), weight.double(), target, temperature=temperature.double())
    counted = target != -100
    spacing = 4 * torch.finfo(torch.float32).eps * (hidden.double() @ weight.double().T).abs().amax(-1) / temperature
    bound = torch.maximum(spacing, 2e-6 * logprob.abs()).clamp(min=1e-5)[counted]
    assert ((runs[0].logprob - logprob)[counted].abs() <= bound).all()
    assert ((runs[0].entropy - entropy)[counted].abs() <= bound).all()
    assert all(not part[~counted].any() for part in runs[0])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@hopper
def test_scoring_of_a_target_outside_the_vocabulary_is_nan():
    hidden, weight, _ = (x.detach() for x in cases.head(3, 64, 300, torch.bfloat16))
    stats = native.fused_scoring(hidden, weight, torch.tensor([5, 300, -1], device="cuda"), LogitTransform())
    assert stats.logprob.isnan().tolist() == [False, True, True]


@hopper
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "neither bias nor softcap"),
        ({"dtype": torch.float32}, "must be torch.bfloat16"),
        ({"hidden_size": 63}, "multiples of 16 bytes"),
    ],
)
def test_what_scoring_refuses(change, message):
    hidden, weight, bias = cases.head(3, change.get("hidden_size", 64), 300, change.get("dtype", torch.bfloat16))
    transform = LogitTransform(bias=bias if "bias" in change else None)
    with pytest.raises(RuntimeError, match=message):
        native.fused_scoring(hidden, weight, torch.zeros(3, dtype=torch.int64, device="cuda"), transform)


def test_arguments_on_the_wrong_device_are_refused():
    logits = torch.zeros(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match="target must be on the GPU"):
        torch.ops.trapo_native.row_statistics(logits, torch.zeros(2, dtype=torch.int64), None, None, 1.0, 0.0, True)
