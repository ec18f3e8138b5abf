"""A reduction of one's own: the example of the docs, and what it may return."""

import pickle
import textwrap
from dataclasses import dataclass, replace

import pytest
import torch

from tests.trapo_kernels import cases
from tests.trapo_kernels.test_sequence import sequence_batch
from trapo_kernels import Objective, Term, TokenBatch, objectives, policy_loss, sequence
from trapo_kernels.gates import Clip
from trapo_kernels.sequence import MeanRatio, Reduced, Reduction


def test_a_reduction_of_ones_own_may_return_fp64():
    class Own(Reduction):
        def reduce(self, tokens):
            mean = tokens.sequences.mean(tokens.log_ratio)
            return Reduced(mean, 2 * torch.ones_like(mean), mean == mean)

    b, logprob = sequence_batch(torch.float32), torch.full((30,), -2.0, device=cases.DEVICE)
    loss, half = (
        policy_loss(logprob, None, b, Objective(rollout=Term(Clip(1.0, 1e9), "old", "advantage", reduction=reduction))).loss
        for reduction in (Own(), MeanRatio())
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, 2 * half)


def test_the_reduction_of_the_docs_leaves_far_sequences_out():
    """The example in `Reduction`'s docstring, run as it stands."""
    scope = vars(sequence) | {"Objective": Objective, "Term": Term, "Clip": Clip, "dataclass": dataclass}
    exec(textwrap.dedent(Reduction.__doc__.split("two passes:\n")[1]), scope)
    b, objective = sequence_batch(torch.float32), scope["objective"]
    far = b.sequence_id == b.sequence_id[0]
    logprob = torch.where(far, -9.0, b.old_logprob + 0.01)
    ours = policy_loss(logprob, None, b, objective).loss
    near = replace(b, weight=torch.where(far, 0.0, b.weight))
    expected = policy_loss(logprob, None, near, Objective(rollout=Term(Clip(), "old", "advantage"))).loss
    torch.testing.assert_close(ours, expected)
    assert str(scope["Near"](2.0)) == "only sequences whose mean |log r| is below 2" and scope["Near"]() == scope["Near"]()


def test_a_part_that_cuts_a_sequence_is_refused_where_an_objective_pools():
    labels = torch.tensor([5, 5, 5, 7, 7, 9, 9, 9])
    role = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0], dtype=torch.uint8)
    ones = torch.ones(8)
    b = TokenBatch(torch.zeros(8, dtype=torch.int64), role, ones, ones, -ones, sequence_id=labels)
    logprob = -ones
    for index in (slice(0, 4), torch.tensor([0, 1, 3, 4]), slice(4, 8)):
        part = b.rows(index)
        for cut in (part, part.to("cpu"), part.with_active_rows(None)):
            with pytest.raises(ValueError, match=r"'gspo' pools .* whole .*, got some tokens of sequence [57], .* Split a"):
                policy_loss(logprob[: len(part)], None, cut, objectives.gspo())
        policy_loss(logprob[: len(part)], None, part, objectives.grpo())
        assert pickle.loads(pickle.dumps(part)).cut_sequence() is None  # the whole batch stays where it was
    whole = [b.rows(index) for index in (slice(0, 3), slice(1, 5), slice(5, 7))]  # what has no role counts nowhere
    assert [part.cut_sequence() for part in whole] == [None] * 3
    assert whole[1].rows(slice(0, 3)).cut_sequence() == 7 and whole[1].rows(slice(0, 2)).cut_sequence() is None
    policy_loss(logprob[:4], None, whole[1], objectives.gspo())
    twice = [b.rows(slice(0, 4)).rows(index).rows(slice(None)) for index in (slice(0, 3), torch.tensor([3]), slice(3, 4))]
    assert [part.cut_sequence() for part in twice] == [None, 7, 7]
    with torch.device("meta"):  # a default device that is not the batch's
        assert b.rows(slice(0, 4)).cut_sequence() == 7


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("flows", lambda d: torch.ones_like(d), r"Own: flows must be torch\.bool, got torch\.float32"),
        ("factor", lambda d: d > 0, r"Own: factor must be torch\.float32 or torch\.float64, got torch\.bool"),
        ("log_ratio", lambda d: d[1:], r"Own: log_ratio must have shape \[N\] = \[30\], got \[29\]"),
    ],
)
def test_what_a_reduction_returns_is_checked(field, value, message):
    class Own(Reduction):
        def reduce(self, tokens):
            d = tokens.log_ratio
            return Reduced(d, torch.ones_like(d), torch.ones_like(d, dtype=torch.bool))._replace(**{field: value(d)})

    b, logprob = sequence_batch(torch.float32), torch.full((30,), -2.0, device=cases.DEVICE)
    with pytest.raises((TypeError, ValueError), match=message):
        policy_loss(logprob, None, b, Objective(rollout=Term(Clip(), "old", "advantage", reduction=Own())))
