"""What changes from call to call in compiled code: numbers, shapes, parts of a batch. `test_ops` compares bits."""

import pytest
import torch
import torch._dynamo.testing

from tests.trapo_kernels import cases
from trapo_kernels import TokenBatch, aggregate, linear_logprob, linear_policy_loss, objectives, token_logprob


def test_a_temperature_tensor_that_changes_compiles_once():
    hidden, weight, _ = cases.head(12, 5, 20, torch.float32)
    b = cases.batch(12, 20, torch.float32)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w, t: linear_policy_loss(h, w, b, objectives.trapo(), temperature=t).loss, fullgraph=True, backend=counter
    )
    for temperature in (0.5, 0.7, 1.0, 1.3):
        rows = torch.full((12,), temperature, device=cases.DEVICE)
        expected = linear_policy_loss(hidden, weight, b, objectives.trapo(), temperature=rows).loss
        assert torch.equal(compiled(hidden, weight, rows), expected)
    assert counter.frame_count == 1


def test_a_longest_response_that_changes_compiles_once_more_at_most():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    role, sequence_id = torch.ones(6, dtype=torch.uint8), torch.arange(6) // 2
    weight = torch.compile(lambda longest: aggregate(role, sequence_id, mode="constant", max_tokens=longest), backend=counter)
    for longest in (10, 11, 12, 13):
        assert torch.equal(weight(longest), aggregate(role, sequence_id, mode="constant", max_tokens=longest))
    assert counter.frame_count <= 2


def _compiled(function, **how):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", **how)


@pytest.mark.parametrize("function", [linear_logprob, token_logprob])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_temperature_that_is_a_number_may_change_in_compiled_code(function, dynamic):
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    target, x = torch.arange(6, device=cases.DEVICE), (hidden, weight) if function is linear_logprob else (hidden @ weight.t(),)

    def scored(temperature):
        return function(*x, target, temperature=temperature).logprob

    compiled = _compiled(scored, dynamic=dynamic)
    for temperature in (0.9, 0.8, 0.7):
        assert torch.equal(compiled(temperature), scored(temperature))


def test_a_compiled_step_builds_a_batch_of_any_shape_from_padded_tensors():
    def weight(target, mask, old_logprob):
        return TokenBatch.from_padded(target, mask, aggregation="sequence_mean", old_logprob=old_logprob).weight

    compiled = _compiled(weight)
    for shape in ((3, 4), (5, 7), (4, 6)):
        given = torch.ones(shape, dtype=torch.int64), torch.rand(shape).round(), -torch.rand(shape)
        assert torch.equal(compiled(*given), weight(*given))


def test_a_part_of_a_batch_goes_into_compiled_code_that_pools_over_sequences():
    hidden, weight, _ = cases.head(8, 5, 20, torch.float32)
    b = cases.batch(12, 20, torch.float32, sequence_id=torch.arange(12, device=cases.DEVICE) // 4).rows(slice(0, 8))

    def loss(h):
        return linear_policy_loss(h, weight, b, objectives.gspo()).loss

    torch.testing.assert_close(_compiled(loss)(hidden), loss(hidden))
