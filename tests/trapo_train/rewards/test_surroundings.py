"""What a reward finds around it: the dtypes of its own and the GPU of its rank, whichever thread it is called in."""

import threading

import pytest
import torch

from tests.trapo_train.rewards.test_rewards import problems
from tests.trapo_train.rollouts.test_rollout import CONFIG, TOKENIZER
from trapo_train.records import Sample
from trapo_train.rewards import functions
from trapo_train.rewards.functions import judge
from trapo_train.rewards.judging import Judging


def test_a_reward_computes_in_its_own_dtype():
    weight = torch.rand(1, 512)

    def reward(completions, **columns):
        return [(weight @ torch.ones(512)).item()] * len(completions)

    expected = judge(reward, problems(1), ["a"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert judge(reward, problems(1), ["a"]) == expected
        assert (weight @ torch.ones(512)).dtype == torch.bfloat16


async def asynchronous(completions, **columns):
    return [float(torch.cuda.current_device())] * len(completions)


def overlapping(completions, **columns):
    return [float(torch.cuda.current_device())] * len(completions)


overlapping.may_overlap = True


@pytest.mark.parametrize("reward", [asynchronous, overlapping])
def test_a_reward_in_a_thread_of_its_own_finds_the_gpu_of_its_rank(reward, monkeypatch):
    current = threading.local()  # as CUDA's: each thread begins with the first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "index", index))
    torch.cuda.set_device(3)
    functions._event_loop.cache_clear()
    sample = Sample(problems(1)[0], 1, 0.0, (), (5,), (0.0,), "stop")
    with Judging(reward, TOKENIZER, CONFIG) as judging:
        judging.start("owner", [sample])
        assert judging.take(wait=True) == ["owner"] and sample.reward == 3.0
    functions._event_loop.cache_clear()
