"""A CPU keeps the memory of the last dWeight and of the last chunk of logits, and hands it out once nobody holds it."""

import io
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.trapo_kernels import cases
from trapo_kernels import LoraHead, TokenBatch, free_kept_memory, linear_logprob, linear_policy_loss, objectives
from trapo_kernels.backends import in_weight, kept_memory

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="torch keeps a GPU's memory")
CPU = torch.device("cpu")
ROWS, HIDDEN_SIZE, VOCAB_SIZE = 40, 48, 1003


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    free_kept_memory()
    monkeypatch.setattr(kept_memory, "LEAST_BYTES", 1)
    yield
    free_kept_memory()


@pytest.fixture(params=["in dWeight", "in chunks"])
def sweep(request, monkeypatch):
    least = {"in dWeight": 0, "in chunks": 2**40}[request.param]
    for name, value in {"_LEAST_LOGITS": least, "_LEAST_VOCABULARY": least, "_BLOCK": 96}.items():
        monkeypatch.setattr(in_weight, name, value)


def _problem(dtype, rows=ROWS):
    hidden, weight, _ = cases.head(rows, HIDDEN_SIZE, VOCAB_SIZE, dtype)
    return hidden, weight, cases.batch(rows, VOCAB_SIZE, torch.float32)


def _gradients(hidden, weight, batch, backend="native", **options):
    loss = linear_policy_loss(hidden, weight, batch, objectives.trapo(entropy_coef=0.03), backend=backend, **options).loss
    return torch.autograd.grad(loss, (hidden, weight))


def _poison():
    """Whatever is kept now holds NaN."""
    for kept in (kept_memory.GRADIENT, kept_memory.LOGITS):
        if kept._storage is not None:
            torch.empty(0, dtype=torch.uint8).set_(kept._storage).fill_(255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [name for name in cases.CHUNKED if name != "triton"])  # whose rows take long when interpreted
@pytest.mark.parametrize("rows", [0, 1, ROWS, 100])
def test_what_the_memory_held_leaves_no_trace(rows, backend, dtype, sweep):
    hidden, weight, batch = _problem(dtype, rows)

    def everything():
        single = _gradients(hidden, weight, batch, backend)
        out = linear_logprob(hidden, weight, batch.target, with_entropy=True, backend=backend)
        two_phase = torch.autograd.grad((out.logprob + out.entropy).sum(), (hidden, weight)) if rows else single
        return [x.clone() for x in (*single, *two_phase, out.logprob, out.entropy)]

    first = everything()
    _poison()
    assert all(map(torch.equal, everything(), first))
    assert kept_memory.GRADIENT._storage is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_and_a_bias_leave_none_either(dtype):
    hidden, weight, bias = cases.head(ROWS, HIDDEN_SIZE, VOCAB_SIZE, dtype)
    factors = [torch.randn(shape, requires_grad=True) for shape in ((2, HIDDEN_SIZE), (VOCAB_SIZE, 2))]
    batch = cases.batch(ROWS, VOCAB_SIZE, torch.float32)

    def everything():
        loss = linear_policy_loss(hidden, weight, batch, objectives.trapo(), bias=bias, lora=LoraHead(*factors)).loss
        return torch.autograd.grad(loss, (hidden, weight, bias, *factors))

    first = [x.clone() for x in everything()]
    _poison()
    assert all(map(torch.equal, everything(), first))


def test_it_is_used_again_as_soon_as_nobody_holds_it():
    problem = _problem(torch.float32)
    places = {_gradients(*problem)[1].data_ptr() for _ in range(3)}
    assert len(places) == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda grad: grad,
        lambda grad: grad[3:4],
        lambda grad: grad.numpy(),
        lambda grad: grad.untyped_storage(),
        lambda grad: memoryview(grad.numpy()),
        lambda grad: torch.nn.Parameter(grad),
        lambda grad: torch.from_dlpack(grad),
    ],
    ids=["the gradient", "a view", "numpy", "the storage", "a buffer", "a parameter", "dlpack"],
)
def test_who_holds_it_keeps_it(hold):
    problem = _problem(torch.float32)
    mine = hold(_gradients(*problem)[1])
    before = bytes(mine) if isinstance(mine, memoryview) else mine.tolist() if hasattr(mine, "tolist") else None
    other = _gradients(*_problem(torch.float32, 7))[1]
    other.fill_(float("nan"))
    after = bytes(mine) if isinstance(mine, memoryview) else mine.tolist() if hasattr(mine, "tolist") else None
    assert after == before


def test_a_retained_graph_holds_it():
    hidden, weight, batch = _problem(torch.float32)
    loss = linear_policy_loss(hidden, weight, batch, objectives.trapo()).loss
    expected = cases.gradients(loss, (hidden, weight))[1].clone()
    _gradients(*_problem(torch.float32, 7))[1].fill_(float("nan"))
    assert torch.equal(cases.gradients(loss, (hidden, weight))[1], expected)


def test_gradients_that_are_accumulated_are_summed():
    hidden, weight, batch = _problem(torch.float32)
    for index in (slice(0, 13), slice(13, 20), slice(20, ROWS)):
        linear_policy_loss(hidden[index], weight, batch.rows(index), objectives.trapo(entropy_coef=0.03)).loss.backward()
    for grad, whole in zip((hidden.grad, weight.grad), _gradients(hidden, weight, batch), strict=True):
        torch.testing.assert_close(grad, whole)


def test_memory_that_another_process_may_see_is_not_used_again():
    problem = _problem(torch.float32)
    grad = _gradients(*problem)[1].share_memory_()
    place = grad.data_ptr()
    del grad
    assert _gradients(*problem)[1].data_ptr() != place


def test_a_gradient_is_no_part_of_a_larger_memory():
    """`torch.save` writes a tensor's whole storage."""
    for vocab_size in (VOCAB_SIZE, VOCAB_SIZE // 2):
        hidden, weight, _ = cases.head(ROWS, HIDDEN_SIZE, vocab_size, torch.float32)
        grad = _gradients(hidden, weight, cases.batch(ROWS, vocab_size, torch.float32))[1]
        saved = io.BytesIO()
        torch.save(grad, saved)
        assert grad.nbytes <= len(saved.getvalue()) <= grad.nbytes + 4096


def test_logits_use_what_is_large_enough():
    room = kept_memory.KeptMemory(exact=False)
    places = []
    for rows in (40, 20, 40, 41, 30):
        places.append(room.empty((rows, 96), torch.float32, CPU).data_ptr())
    assert places[0] == places[1] == places[2] and places[3] == places[4]


def test_what_is_over_twice_as_large_as_needed_is_given_back(monkeypatch):
    """Or the logits of a first pass would stay beside a backward pass that needs few."""
    room = kept_memory.KeptMemory(exact=False)
    monkeypatch.setattr(kept_memory, "LEAST_BYTES", 4 * 96 * 10)
    for rows, kept in ((40, 40), (20, 40), (19, 19), (10, 19), (9, 0)):
        room.empty((rows, 96), torch.float32, CPU)
        assert (0 if room._storage is None else room._storage.nbytes()) == 4 * 96 * kept


def test_two_threads_have_memory_of_their_own():
    problems, start = [_problem(torch.float32, rows) for rows in (40, 39)], Barrier(2)
    expected = [_gradients(*problem)[1].clone() for problem in problems]

    def work(which):
        start.wait()
        return [torch.equal(_gradients(*problems[which])[1], expected[which]) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(found) for found in pool.map(work, (0, 1)))


def test_small_tensors_are_left_to_malloc_and_all_can_be_given_back(monkeypatch):
    problem = _problem(torch.float32)
    _gradients(*problem)
    assert kept_memory.GRADIENT._storage is not None
    free_kept_memory()
    monkeypatch.setattr(kept_memory, "LEAST_BYTES", 2**25)
    _gradients(*problem)
    assert kept_memory.GRADIENT._storage is kept_memory.LOGITS._storage is None


def test_a_torch_that_counts_no_holders_keeps_nothing(monkeypatch):
    monkeypatch.setattr(kept_memory, "_COUNT", "a function that a later torch may drop")
    inputs = _problem(torch.float32)
    assert torch.equal(_gradients(*inputs)[1], _gradients(*inputs)[1])
    assert kept_memory.GRADIENT._storage is None and kept_memory.LOGITS._storage is None


def test_memory_from_inference_mode_serves_training():
    hidden, weight, batch = _problem(torch.float32, 100)
    with torch.inference_mode():
        linear_logprob(hidden, weight, batch.target)
    expected = [x.clone() for x in _gradients(hidden, weight, batch)]
    weight.grad = None
    linear_policy_loss(hidden, weight, batch, objectives.trapo(entropy_coef=0.03)).loss.backward()
    assert torch.equal(weight.grad, expected[1])


def test_another_batch_gets_the_place_of_a_gradient_that_is_gone():
    hidden, weight, batch = _problem(torch.float32)
    weight.grad = _gradients(hidden, weight, batch)[1]
    place = weight.grad.data_ptr()
    other = TokenBatch(batch.target.flip(0), batch.role, batch.advantage, batch.weight, batch.old_logprob, batch.ref_logprob)
    assert _gradients(hidden, weight, other)[1].data_ptr() != place
    weight.grad = None  # what took its place is kept now
    assert len({_gradients(hidden, weight, other)[1].data_ptr() for _ in range(2)}) == 1
