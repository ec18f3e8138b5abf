"""The torch.library ops: schemas, fakes, torch.compile, double backward."""

import contextlib
import importlib

import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

from tests.trapo_kernels import cases
from trapo_kernels import (
    Role,
    TokenBatch,
    autograd,
    linear_logprob,
    linear_policy_loss,
    objectives,
    policy_loss,
    terms,
    token_logprob,
)
from trapo_kernels.backends import triton_ops
from trapo_kernels.backends.gemm import grad_weight_dtype, operand_dtype


def _policy_arguments(backend):
    hidden, weight, bias = cases.head(6, 5, 20, torch.float32)
    b, objective = cases.batch(6, 20, torch.float32), objectives.trapo()
    streams = terms.pack(terms.streams(b, objective))
    settings = (
        None,
        0.8,
        None,
        *terms.encode(objective),
        True,
        torch.float32,
        False,
        "",
        [True, True, True, False, False],
        torch.float32,
        backend,
    )
    return hidden, weight, bias, None, None, b.target, streams, b.active_rows, None, *settings


def _scaled_out_of_place(grad, upstream, dtype, backend, hooked):
    return (grad * upstream).to(dtype)


@pytest.mark.parametrize("backend", cases.QUICK_BY_DEFAULT)
def test_opcheck(backend, monkeypatch):
    hidden, weight, bias = cases.head(6, 5, 20, torch.float32)
    target = torch.randint(20, (6,), device=cases.DEVICE)
    temperature = torch.rand(6, device=cases.DEVICE) + 0.5
    options = (None, None, temperature, 1.0, 5.0, True, torch.float32, False, "", backend)
    torch.library.opcheck(autograd.linear_logprob, (hidden, weight, bias, None, None, target, *options))
    logits = torch.randn(6, 20, device=cases.DEVICE, requires_grad=True)
    torch.library.opcheck(autograd.token_logprob, (logits, target, None, 1.0, None, True, backend))
    streams = terms.pack(terms.streams(cases.batch(6, 20, torch.float32), objectives.trapo()))
    logprob, entropy = (torch.rand(6, device=cases.DEVICE, requires_grad=True) for _ in range(2))
    torch.library.opcheck(autograd.policy_loss, (logprob, entropy, streams, *terms.encode(objectives.trapo()), backend))
    # Its eager backward scales the saved gradients, outputs of the op, in place, and test_aot_dispatch compares outputs after that.
    monkeypatch.setattr(autograd, "_scaled", _scaled_out_of_place)
    torch.library.opcheck(autograd.linear_policy_loss, _policy_arguments(backend))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=cases.SLOW_ON_A_CPU), torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", *(pytest.param(name, marks=cases.SLOW_ON_A_CPU) for name in cases.CHUNKED)])
def test_compile_fullgraph_gives_the_same_bits(backend, dtype):
    hidden, weight, _ = cases.head(12, 16, 20, dtype)
    b = cases.batch(12, 20, torch.float32)

    def step(h, w):
        scored = linear_logprob(h, w, b.target, with_entropy=True, active_rows=b.active_rows, backend=backend)
        loss = linear_policy_loss(h, w, b, objectives.trapo(), backend=backend).loss
        return loss + scored.logprob.sum() + scored.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = cases.gradients(step(hidden, weight), (hidden, weight))
    for ours, expected in zip(cases.gradients(compiled(hidden, weight), (hidden, weight)), eager, strict=True):
        assert torch.equal(ours, expected)


@cases.SLOW_ON_A_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph_of_as_many_rows_as_have_a_target(dtype):
    """Their number is in the data, so no rule may branch on it; nor in token_logprob, whose logits are of those rows."""
    hidden, weight, _ = cases.head(12, 10, 20, dtype)  # where a CPU's rule for 16 bits, N ≤ D, is undecided
    target = torch.arange(12, device=cases.DEVICE)
    target[::3] = -100

    def step(h, w, target):
        rows = (target != -100).nonzero().squeeze(1)
        h, target = h[rows], target[rows]
        role = torch.full_like(target, Role.EXPERT, dtype=torch.uint8)
        batch = TokenBatch(target, role, None, torch.ones_like(target, dtype=torch.float32))
        loss = linear_policy_loss(h, w, batch, objectives.sft()).loss
        return loss + linear_logprob(h, w, target).logprob.sum() + token_logprob(h @ w.T, target).logprob.sum()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        ours = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, target)
        found = torch.autograd.grad(ours, (hidden, weight))
    eager = step(hidden, weight, target)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(found, torch.autograd.grad(eager, (hidden, weight)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trapo", "gspo"])  # one pass, two passes
def test_inductor_gives_the_same_loss_and_gradients(name):
    """The promise of bits is the ops': what surrounds them, the arithmetic on tokens of two passes too, Inductor may reorder."""
    hidden, weight, _ = cases.head(12, 5, 20, torch.float32)
    b, objective = cases.batch(12, 20, torch.float32), objectives.PRESETS[name](entropy_coef=0.1)

    def step(h, w):
        return linear_policy_loss(h, w, b, objective).loss

    torch._dynamo.reset()
    ours, eager = torch.compile(step, fullgraph=True)(hidden, weight), step(hidden, weight)
    assert torch.equal(ours, eager) if name == "trapo" else cases.error(ours, eager) <= 1e-6 * abs(eager.item())
    for found, expected in zip(cases.gradients(ours, (hidden, weight)), cases.gradients(eager, (hidden, weight)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@cases.SLOW_ON_A_CPU
def test_compile_of_fewer_and_of_more_rows_than_a_chunk_gives_the_same_bits():
    """One chunk of 16-bit operands hands out dWeight in their dtype, several in fp32."""
    weight = cases.head(1, 16, 20, torch.bfloat16)[1]

    def step(hidden, target):
        batch = TokenBatch(target, torch.full_like(target, Role.EXPERT, dtype=torch.uint8), None, torch.ones_like(target).float())
        return linear_policy_loss(hidden, weight, batch, objectives.sft()).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 12, 20, 16, 17):
        hidden, target = cases.head(rows, 16, 20, torch.bfloat16)[0], torch.arange(rows, device=cases.DEVICE) % 20
        ours, expected = (torch.autograd.grad(f(hidden, target), (hidden, weight)) for f in (compiled, step))
        assert all(map(torch.equal, ours, expected))


def test_double_backward_raises_a_clear_error():
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    b = cases.batch(6, 20, torch.float32)
    logits = torch.randn(6, 20, device=cases.DEVICE, requires_grad=True)
    logprob = torch.zeros(6, device=cases.DEVICE, requires_grad=True)
    losses = {
        "linear_logprob": (linear_logprob(hidden, weight, b.target).logprob.sum(), hidden),
        "linear_policy_loss": (linear_policy_loss(hidden, weight, b, objectives.trapo()).loss, hidden),
        "token_logprob": (token_logprob(logits, b.target).logprob.sum(), logits),
        "policy_loss": (policy_loss(logprob, logprob, b, objectives.trapo()).loss, logprob),
    }
    for name, (loss, x) in losses.items():
        with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_auto_says_its_choice_once(caplog):
    from trapo_kernels import dispatch

    dispatch._say_once.cache_clear()
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    with caplog.at_level("INFO", logger="trapo_kernels"):
        for _ in range(3):
            linear_logprob(hidden, weight, torch.zeros(6, dtype=torch.int64, device=cases.DEVICE))
    assert len(caplog.records) == 1 and 'backend="auto" chose' in caplog.text


@pytest.mark.parametrize(
    ("op", "frozen", "gemms"), [("policy", False, 3), ("policy", True, 2), ("logprob", False, 4), ("logprob", True, 3)]
)
def test_flop_are_counted(op, frozen, gemms):
    hidden, weight, bias = cases.head(6, 5, 20, torch.float32)
    weight.requires_grad_(not frozen)
    assert bias.requires_grad  # and takes no GEMM
    b = cases.batch(6, 20, torch.float32)
    with FlopCounterMode(display=False) as counter:
        if op == "policy":
            linear_policy_loss(hidden, weight, b, objectives.trapo(), bias=bias).loss.backward()
        else:
            linear_logprob(hidden, weight, b.target, bias=bias).logprob.sum().backward()
    assert counter.get_total_flops() == gemms * 2 * 6 * 5 * 20


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_forward_mode_is_refused_and_reference_has_it(backend):
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    b, target, tangent = cases.batch(6, 20, torch.float32), torch.zeros(6, dtype=torch.int64, device=cases.DEVICE), torch.ones(6, 5)
    ops = {
        "linear_logprob": lambda h, name: linear_logprob(h, weight, target, backend=name).logprob,
        "linear_policy_loss": lambda h, name: linear_policy_loss(h, weight, b, objectives.sft(), backend=name).loss,
        "token_logprob": lambda h, name: token_logprob(h @ weight.t(), target, backend=name).logprob,
        "policy_loss": lambda h, name: policy_loss(h.sum(1), None, b, objectives.sft(), backend=name).loss,
    }
    for op, run in ops.items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(hidden.detach(), tangent.to(cases.DEVICE))
            with pytest.raises(RuntimeError, match=f"^{op}: forward-mode differentiation is not supported by backend"):
                run(dual, backend)
            assert torch.autograd.forward_ad.unpack_dual(run(dual, "reference")).tangent.abs().sum() > 0
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(lambda h: ops["linear_logprob"](h, backend), (hidden.detach(),), (tangent.to(cases.DEVICE),))


@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_torch_func_and_batches_of_gradients_are_refused_and_reference_has_them(backend):
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    b, target = cases.batch(6, 20, torch.float32), torch.zeros(6, dtype=torch.int64, device=cases.DEVICE)
    ops = {
        "linear_logprob": lambda h, name: linear_logprob(h, weight, target, backend=name).logprob.sum(),
        "linear_policy_loss": lambda h, name: linear_policy_loss(h, weight, b, objectives.sft(), backend=name).loss,
        "token_logprob": lambda h, name: token_logprob(h @ weight.t(), target, backend=name).logprob.sum(),
        "policy_loss": lambda h, name: policy_loss(h.sum(1), None, b, objectives.sft(), backend=name).loss,
    }
    for op, run in ops.items():
        with pytest.raises(RuntimeError, match=f"^{op}: gradients inside of torch.func are not supported by backend"):
            torch.func.grad(run)(hidden.detach(), backend)
        loss, several = run(hidden, backend), torch.tensor([1.0, -2.0], device=cases.DEVICE)
        (reference,) = torch.autograd.grad(run(hidden, "reference"), hidden, several, is_grads_batched=True)
        torch.testing.assert_close(torch.func.grad(run)(hidden.detach(), "reference"), reference[0])
        refused = pytest.raises(RuntimeError, match=f"^{op}: backward of a batch of gradients is not supported")
        with contextlib.nullcontext() if op == "policy_loss" else refused:
            (ours,) = torch.autograd.grad(loss, hidden, several, is_grads_batched=True)
            torch.testing.assert_close(ours, reference)
        with contextlib.nullcontext() if op == "policy_loss" else refused:
            loss = run(hidden, backend)
            torch.func.vmap(lambda grad, loss=loss: torch.autograd.grad(loss, hidden, grad)[0])(several)
    with torch.no_grad():  # what asks for no gradient is not refused
        assert torch.func.vmap(lambda h: ops["linear_logprob"](h, backend))(hidden[None]).isfinite()
        for op in ("linear_policy_loss", "policy_loss"):
            with pytest.raises(RuntimeError, match=f'^{op}: torch.func.vmap is not supported by backend "{backend}"'):
                torch.func.vmap(lambda h, op=op: ops[op](h, backend))(hidden[None])
            assert torch.func.vmap(lambda h, op=op: ops[op](h, "reference"))(hidden[None]).isfinite()


def test_fakes_of_strided_inputs_have_the_strides_of_the_real_outputs():
    arguments = list(_policy_arguments("torch"))
    arguments[0] = arguments[0].detach().t().contiguous().t().requires_grad_()
    arguments[1] = arguments[1].detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(autograd.linear_policy_loss, tuple(arguments), test_utils=("test_faketensor",))
    scoring = (*arguments[:6], *(None,) * 3, 1.0, None, True, torch.float32, False, "", "torch")
    torch.library.opcheck(autograd.linear_logprob, scoring, test_utils=("test_faketensor",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fakes_have_the_dtypes_and_strides_of_the_real_outputs_in_both_directions(dtype):
    hidden, weight, bias = (x.detach().t().contiguous().t() if x.ndim == 2 else x.detach() for x in cases.head(6, 5, 20, dtype))
    b, vector = cases.batch(6, 20, torch.float32), torch.rand(6, device=cases.DEVICE)
    vector = vector.double() if dtype == torch.float64 else vector
    inputs, mode = (hidden, weight, bias, None, None, b.target), (torch.float32, False, "")
    needs, logits = [True, True, True, False, False], torch.randn(20, 6, device=cases.DEVICE).to(dtype).t()
    policy = list(_policy_arguments("torch"))
    policy[:3], policy[6] = inputs[:3], terms.pack(terms.streams(b, objectives.trapo(), vector.dtype))
    policy[-2] = grad_weight_dtype(6, 5, 20, dtype, operand_dtype(dtype, cases.DEVICE), cases.DEVICE)
    statistics = [vector] * 4
    for op, arguments in (
        (autograd.linear_logprob, (*inputs, None, None, None, 1.0, None, True, *mode, "torch")),
        (autograd.linear_logprob_backward, (vector, vector, *inputs, None, None, statistics, 1.0, None, *mode, needs, "torch")),
        (autograd.linear_policy_loss, tuple(policy)),
        (autograd.token_logprob, (logits, b.target, None, 1.0, None, True, "torch")),
        (autograd.token_logprob_backward, (vector, vector, logits, b.target, None, statistics, 1.0, None, "torch")),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


def test_triton_launches_where_its_tensors_are(monkeypatch):
    """Triton launches on the current GPU, which need not be that of the tensors: every launch is made in a context that sets it."""
    inside, launched = [], {}

    @contextlib.contextmanager
    def device_of(x):
        inside.append(x.device)
        yield
        inside.pop()

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched[self.name] = list(inside)
            return self.kernel[grid]

    kernels = ("row_statistics", "row_gradient", "row_policy", "token_coefficient", "scale", "fused_scoring")
    for name in kernels:
        module = importlib.import_module(f"{triton_ops.__name__}.{name}")
        monkeypatch.setattr(module, f"{name}_kernel", Spy(name, getattr(module, f"{name}_kernel")))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    b = cases.batch(6, 20, torch.float32)
    out = linear_logprob(hidden, weight, b.target, with_entropy=True, backend="triton_fused")
    linear_logprob(hidden, weight, b.target, backend="triton").logprob.sum().backward()
    policy_loss(out.logprob, out.entropy, b, objectives.trapo(), backend="triton")
    linear_policy_loss(hidden, weight, b, objectives.trapo(), backend="triton")
    triton_ops.scale_to(grad := torch.ones(3, device=cases.DEVICE), torch.tensor(2.0, device=cases.DEVICE), grad)
    assert launched == {name: [hidden.device] for name in kernels}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_tensors_on_a_gpu_that_is_not_the_current_one(backend):
    results = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight = (x.detach().to(device).requires_grad_() for x in cases.head(64, 32, 500, torch.bfloat16)[:2])
        loss = linear_policy_loss(
            hidden, weight, cases.batch(64, 500, torch.float32).to(device), objectives.trapo(), backend=backend
        ).loss
        results.append([x.cpu() for x in (loss, *torch.autograd.grad(3.0 * loss, (hidden, weight)))])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", cases.CHUNKED)
def test_cuda_graph_capture_replays_the_same_bits(backend):
    hidden, weight, _ = cases.head(256, 64, 4000, torch.bfloat16)
    b = cases.batch(256, 4000, torch.float32)

    def step():
        scored = linear_logprob(hidden, weight, b.target, with_entropy=True, backend=backend)
        loss = linear_policy_loss(hidden, weight, b, objectives.trapo(), backend=backend).loss + scored.logprob.sum()
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, eager in zip(captured, expected, strict=True):
        assert torch.equal(ours, eager)
