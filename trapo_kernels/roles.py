"""What a token is to the loss, and the target of a row that is in none."""

from __future__ import annotations

IGNORE_INDEX = -100


class Role:
    """What a token is to the loss; plain integers, because torch.compile cannot compare a tensor with an enum member."""

    IGNORED = 0  # in no loss; its hidden state is read only if `scored_rows` names it
    ROLLOUT = 1  # sampled by the policy: the ratio loss
    EXPERT = 2  # written by an expert: the imitation loss
