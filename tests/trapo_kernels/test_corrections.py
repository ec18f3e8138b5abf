"""Static corrections: factors of the weight from old and sampler logprobs, shares of copies, masks of what was cut off."""

import math

import pytest
import torch

from trapo_kernels import Role, aggregate, corrections

# Two sequences of rollouts (ids 5 and 2, interleaved) and an expert token; log ρ = 0.5, -1, 2, 0 | 0.1, -0.3.
LOG_RATIO = torch.tensor([0.5, 0.1, -1.0, 9.0, 2.0, -0.3, 0.0])
SEQUENCE = torch.tensor([5, 2, 5, 2, 5, 2, 5])
ROLE = torch.tensor([1, 1, 1, 2, 1, 1, 1], dtype=torch.uint8)
ROLLOUT = torch.linspace(-3, -1, 7)
OLD = ROLLOUT + LOG_RATIO
ARGUMENTS = (ROLE, OLD, ROLLOUT)
SUM = {5: 1.5, 2: -0.2}
MEAN = {5: 1.5 / 4, 2: -0.1}


def _spread(per_sequence):
    return torch.tensor([1.0 if i == 3 else math.exp(per_sequence[int(k)]) for i, k in enumerate(SEQUENCE)])


def test_tis_caps_the_ratio_of_tokens_and_of_sequences():
    expected = LOG_RATIO.exp().clamp(max=2.0)
    expected[3] = 1.0
    torch.testing.assert_close(corrections.tis(*ARGUMENTS), expected)
    by_sequence = corrections.tis(*ARGUMENTS, cap=4.0, level="sequence", sequence_id=SEQUENCE)
    torch.testing.assert_close(by_sequence, _spread(SUM).clamp(max=4.0))
    by_mean = corrections.tis(*ARGUMENTS, cap=1.2, level="geometric", sequence_id=SEQUENCE)
    torch.testing.assert_close(by_mean, _spread(MEAN).clamp(max=1.2))


def test_icepop_keeps_the_ratio_inside_the_band_and_nothing_outside():
    factor = corrections.icepop(*ARGUMENTS)
    torch.testing.assert_close(factor, torch.tensor([0.5, 0.1, -math.inf, 0.0, -math.inf, -0.3, 0.0]).exp())
    assert corrections.icepop(*ARGUMENTS, low=0.0, high=8.0)[[2, 4]].tolist() == pytest.approx([math.exp(-1), math.exp(2)])


def test_mis_masks_whole_sequences():
    factor = corrections.mis(*ARGUMENTS, high=2.0, sequence_id=SEQUENCE)
    torch.testing.assert_close(factor, torch.where((SEQUENCE == 5) & (ROLE == 1), 0.0, _spread(SUM)))


def test_sequence_mask_is_zero_or_one_and_can_spare_good_sequences():
    args = (*ARGUMENTS, SEQUENCE)
    assert corrections.sequence_mask(*args, high=1.2).tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert corrections.sequence_mask(*args, low=0.95).tolist() == [1, 0, 1, 1, 1, 0, 1]
    advantage = torch.where(SEQUENCE == 5, 0.0, -1.0)
    assert corrections.sequence_mask(*args, low=0.95, high=1.2, advantage=advantage).tolist() == [1, 0, 1, 1, 1, 0, 1]


def test_where_sampler_and_trainer_agree_every_correction_is_one():
    same = (ROLE, OLD, OLD)
    one = torch.ones(7)
    assert torch.equal(corrections.tis(*same), one) and torch.equal(corrections.icepop(*same), one)
    assert torch.equal(corrections.mis(*same, sequence_id=SEQUENCE), one)
    assert torch.equal(corrections.sequence_mask(*same, SEQUENCE, low=0.99, high=1.01), one)


def test_expert_tokens_are_never_read():
    poisoned = torch.where(ROLE == Role.EXPERT, float("nan"), OLD)
    for correction in (corrections.tis, corrections.icepop):
        torch.testing.assert_close(correction(ROLE, poisoned, ROLLOUT), correction(*ARGUMENTS))
    by_sequence = corrections.mis(ROLE, poisoned, ROLLOUT, sequence_id=SEQUENCE)
    torch.testing.assert_close(by_sequence, corrections.mis(*ARGUMENTS, sequence_id=SEQUENCE))


def test_corrections_are_a_graph_without_breaks():
    """So without a host sync either."""

    def factors(role, old, rollout, sequence_id):
        one = corrections.mis(role, old, rollout, sequence_id=sequence_id)
        other = corrections.sequence_mask(role, old, rollout, sequence_id, high=1.2)
        kept = corrections.drop_overlong(role, sequence_id, old > -1.0)
        return one * other * corrections.duplicate_share(sequence_id, role.long()) * kept

    compiled = torch.compile(factors, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*ARGUMENTS, SEQUENCE), factors(*ARGUMENTS, SEQUENCE))


def test_copies_of_a_prefix_share_one_weight():
    # Prefix 8 in sequences 0, 1 and 3, several tokens each; prefix 9 in sequence 2 alone; -1 is no prefix.
    prefix = torch.tensor([8, 8, -1, 8, -1, 9, 9, 8, 8, -1])
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3])
    expected = torch.tensor([1 / 3, 1 / 3, 1, 1 / 3, 1, 1, 1, 1 / 3, 1 / 3, 1])
    torch.testing.assert_close(corrections.duplicate_share(prefix, sequence), expected)
    order = torch.randperm(10)
    torch.testing.assert_close(corrections.duplicate_share(prefix[order], sequence[order]), expected[order])


def test_a_sequence_that_ends_in_the_prefix_and_one_that_begins_in_it_are_two_copies():
    prefix, sequence = torch.tensor([5, 5, -1, 5, 5]), torch.tensor([0, 0, 0, 1, 1])
    assert corrections.duplicate_share(prefix, sequence).tolist() == [0.5, 0.5, 1.0, 0.5, 0.5]
    prefix = torch.tensor([5, 5, 6, 6])  # side by side in one sequence: each is a prefix of its own
    assert corrections.duplicate_share(prefix, torch.zeros(4, dtype=torch.int64)).tolist() == [1.0] * 4


def test_overlong_rollouts_leave_loss_and_denominator():
    finished = torch.tensor([0, 0, 0, 0, 1, 0, 0], dtype=torch.bool)  # sequence 5 ends, sequence 2 was cut off
    role = corrections.drop_overlong(ROLE, SEQUENCE, finished)
    assert role.tolist() == [1, 0, 1, 2, 1, 0, 1] and role.dtype == torch.uint8
    weight = aggregate(role, SEQUENCE, mode="token_mean")
    torch.testing.assert_close(weight, (role != 0) / 5.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: corrections.tis(*ARGUMENTS, cap=0.0), r"tis: cap must lie in \(0, inf\], got 0.0"),
        (lambda: corrections.tis(*ARGUMENTS, level="word"), "tis: level must be one of 'token'.*got 'word'"),
        (lambda: corrections.mis(*ARGUMENTS), 'mis: level "sequence" needs sequence_id .* got None'),
        (lambda: corrections.icepop(*ARGUMENTS, low=2.0, high=1.0), r"high must lie in \(2, inf\], got 1.0"),
        (lambda: corrections.tis(ROLE, OLD[:3], ROLLOUT), r"old_logprob must have shape \[N\] = \[7\], got \[3\]"),
        (lambda: corrections.mis(*ARGUMENTS, sequence_id=SEQUENCE[:2]), r"mis: sequence_id must have shape \[N\] = \[7\]"),
        (lambda: corrections.icepop(ROLE, OLD, ROLLOUT.log()), r"mis: rollout_logprob must be finite, got .* at row"),
        (lambda: corrections.sequence_mask(*ARGUMENTS, SEQUENCE, advantage=OLD[:, None]), r"advantage must have shape \[N\]"),
        (lambda: corrections.drop_overlong(ROLE, SEQUENCE, ROLE[:4] > 0), r"drop_overlong: finished must have shape \[N\]"),
        (lambda: corrections.duplicate_share(SEQUENCE, SEQUENCE[:4]), r"duplicate_share: sequence_id must have shape"),
    ],
)
def test_bad_input_says_the_rule_and_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("correct", [corrections.tis, corrections.icepop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_have_the_dtype_of_old_logprob(correct, dtype):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    role = torch.tensor([1, 2], dtype=torch.uint8)
    assert correct(role, torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=other)).dtype == dtype
