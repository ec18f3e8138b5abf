"""Dynamic sampling: further problems in place of those whose samples teach nothing (`plan.refill`).

Source: arXiv 2503.14476 (DAPO), section 3.2, with a limit to the rounds. DAPO samples problems until enough of them teach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from trapo_kernels import Objective
from trapo_train.data.dataset import ProblemOrder
from trapo_train.records import Sample
from trapo_train.rollouts.rollout import RolloutResult, chain_results
from trapo_train.step.advantages import AdvantageConfig, assign_advantages, assign_prefix_weights


def teaches(group: Sequence[Sample], objective: Objective) -> bool:
    """Whether a policy term of the objective has a gradient on one of the samples, whose advantages and prefix weights are set.

    An entropy bonus and a KL do not count: they teach nothing about the problem. `Objective.lives_by_advantage` is the same rule
    for a role, where a KL counts.
    """
    for sample in group:
        imitated = sample.guided and sample.prefix_weight != 0
        own = len(sample.completion_ids) > 0 and not sample.masked
        terms = [*(objective.expert_terms if imitated else ()), *(objective.rollout_terms if own else ())]
        if any(term.signal != "advantage" or sample.advantage != 0 for term in terms):
            return True
    return False


def sample_with_refill(
    positions: list[int],
    sample: Callable[[list[int]], RolloutResult],
    order: ProblemOrder,
    rounds: int,
    advantage: AdvantageConfig,
    objective: Objective,
) -> tuple[list[int], RolloutResult]:
    """Sample the problems at `positions`; then, in at most `rounds` further rounds, as many problems of `order` as are missing
    until len(positions) of them teach. None is sampled twice, so all of them at most once.

    A problem must teach by its samples' verdicts, too (rollout.correct_by): wrong answers alone whose lengths a penalty tells apart
    have a gradient, and it says nothing about the problem. DAPO's filter is on accuracy as well.

    Returns: the positions of all problems that were sampled, and the result: its groups are those that teach; its metrics,
        `sampled` and `deferred` are of all. With rounds = 0 every group stays.
    """
    taken, results, kept = list(positions), [sample(positions)], []
    if rounds == 0:
        return taken, results[0]
    while True:
        groups = results[-1].groups
        assign_advantages(groups, advantage)  # of each group by itself: a deviation of the step would only scale them
        for group in groups:
            assign_prefix_weights(group)
        judged = [[replace(sample, reward=sample.verdict) for sample in group] for group in groups]
        assign_advantages(judged, advantage)
        pairs = zip(groups, judged, strict=True)
        kept += [group for group, by_verdict in pairs if teaches(group, objective) and teaches(by_verdict, objective)]
        missing = min(len(positions) - len(kept), order.num_problems - len(set(taken)))
        if missing < 1 or len(results) > rounds:
            return taken, replace(chain_results(results), groups=kept)
        more = order.next(missing, avoid=taken)
        results.append(sample(more))
        taken += more
