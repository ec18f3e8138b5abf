"""Plans go on one by one: nothing waits for another problem, the samples stay the same, and the engine takes fewer steps."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import FIRST_COMPLETED, wait
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trapo_train.engines.test_stream import ConstantModel
from tests.trapo_train.rollouts.test_rollout import CONFIG, RIGHT, TOKENIZER, WRONG, ids, iter_requests, problem
from tests.trapo_train.scripted import Rounds, ScriptedEngine, ScriptedStream
from trapo_train.engines.engine import TransformersEngine
from trapo_train.records import Request, Sample
from trapo_train.rewards.functions import RewardError, WeightedSum, may_overlap
from trapo_train.rewards.judging import Judging
from trapo_train.rollouts.plans import PlanConfig, build_plan
from trapo_train.rollouts.rollout import RolloutConfig, run_plans
from trapo_train.tasks import pointer_chasing_reward

PROBLEMS = [problem(i, f"ab,bc?a{1 + i % 8}:") for i in range(10)]
LADDER = build_plan(PlanConfig("paper"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **shape))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def ladder(engine, reward=pointer_chasing_reward, problems=PROBLEMS, config=CONFIG):
    return run_plans(problems, LADDER, engine, reward, TOKENIZER, config)


def embedded(model, max_batch_tokens=4096):
    return TransformersEngine(model, TOKENIZER, seed=5, max_batch_tokens=max_batch_tokens)


def content(result):
    return [[(s.micro_group, s.prefix_ids, s.completion_ids, s.reward) for s in group] for group in result.sampled]


class Clock(ScriptedStream):
    """Takes as many ticks for a request as its answer is long; records when what was handed in and done."""

    def __init__(self, engine, in_order=False):
        super().__init__(engine)
        self.in_order, self.now, self.log = in_order, 0, []

    def submit(self, prompt, budget, key):
        ticket = super().submit(prompt, budget, key)
        request = self.waiting[-1]
        (request.completion,) = self.engine.answer([prompt], [budget])
        request.due = self.now + len(request.completion.token_ids)
        self.log.append((self.now, TOKENIZER.decode(list(prompt))))
        return ticket

    def advance(self, others=()):
        if not self.waiting:
            wait(others, return_when=FIRST_COMPLETED)
            return []
        self.now = min(request.due for request in self.waiting)
        done = [request for request in self.waiting if request.due == self.now]
        self.waiting = [request for request in self.waiting if request.due > self.now]
        return [(request.ticket, request.completion) for request in done]


def clocked(script, in_order=False):
    engine = ScriptedEngine(TOKENIZER, script)
    stream = Clock(engine, in_order)
    return SimpleNamespace(stream=lambda params: stream), stream


def test_a_quick_problem_climbs_its_whole_ladder_beside_a_slow_one():
    engine, stream = clocked(lambda text: "a" * 20 if text.startswith("ab,bc?a1:") else "#a$")
    ladder(engine, problems=PROBLEMS[:2])
    quick = [(now, text) for now, text in stream.log if text.startswith("ab,bc?a2:")]
    assert quick == [(0, "ab,bc?a2:")] * 4 + [(3, "ab,bc?a2:ab|")] * 2 + [(6, "ab,bc?a2:ab|bc|cd|")]
    assert (20, "ab,bc?a1:ab|") in stream.log  # the slow one still is in its first micro-group


def test_samples_do_not_depend_on_barriers_nor_on_the_room_in_the_batch(model):
    free, rounds = ladder(embedded(model)), ladder(Rounds(embedded(model)))
    assert content(free) == content(rounds) == content(ladder(embedded(model, 100)))
    logprobs = [[list(s.completion_logprobs) for group in result.sampled for s in group] for result in (free, rounds)]
    for one, other in zip(*logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert len({s.completion_ids for group in free.sampled for s in group}) > 20
    again = embedded(model)
    assert content(ladder(again)) == content(free) != content(ladder(again))  # another call draws anew


@pytest.mark.slow
@pytest.mark.parametrize(("max_batch_tokens", "share"), [(10**9, 0.8), (128 * 1100, 0.75)])
def test_without_barriers_a_ladder_takes_fewer_engine_steps(max_batch_tokens, share):
    """64 problems, 7 generated samples each, lengths geometric with mean 200, at most 1000 tokens: 2171 steps instead of 2887, and
    with room for about 128 rows 2182 instead of 3151."""
    logits = torch.full((len(TOKENIZER),), -torch.inf)
    logits[TOKENIZER.eos_token_id], logits[5] = torch.tensor([1 / 200, 199 / 200]).log()
    problems = [problem(i, f"ab,bc?a{1 + i % 8}:") for i in range(64)]
    config = RolloutConfig(max_response_tokens=1000, paragraph_break="|")
    model = ConstantModel(logits)
    model.config.max_position_embeddings = 2000
    results = [ladder(kind(embedded(model, max_batch_tokens)), problems=problems, config=config) for kind in (Rounds, lambda e: e)]
    assert content(results[0]) == content(results[1])
    rounds, free = (result.metrics for result in results)
    assert free["rollout/engine_steps"] < share * rounds["rollout/engine_steps"]
    assert share * free["rollout/rows_in_flight"] > rounds["rollout/rows_in_flight"]


def delayed(seconds):
    """An async reward that takes `seconds(completion)`."""

    async def reward(prompts, completions, **columns):
        await asyncio.sleep(max(map(seconds, completions)))
        return pointer_chasing_reward(prompts, completions, **columns)

    return reward


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [lambda text: 0, lambda text: 0.002 * (len(text) % 7), lambda text: 0.02 if "a" in text else 0])
def test_what_runs_together_does_not_depend_on_how_long_a_reward_takes(model, monkeypatch, seconds):
    """Equal shapes of all passes, hence equal bits."""
    traces = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: traces[-1].append(tuple(kw["input_ids"].shape)) or forward(**kw))
    results = []
    for reward in (pointer_chasing_reward, delayed(seconds)):
        traces.append([])
        results.append(ladder(embedded(model, 300), reward))
    assert traces[0] == traces[1] and len(traces[0]) > 20
    assert content(results[0]) == content(results[1])
    logprobs = [[s.completion_logprobs for group in result.sampled for s in group] for result in results]
    assert logprobs[0] == logprobs[1]


def test_an_async_reward_runs_beside_the_generation():
    """The reward of the quick problem waits for an event that the slow problem's generation sets."""
    reached = threading.Event()

    def script(text):
        return "#a$" if text.startswith("ab,bc?a1:") else "a" * 20

    engine, stream = clocked(script)
    advance = stream.advance

    def advancing(others=()):
        if stream.waiting and min(request.due for request in stream.waiting) == 20:
            reached.set()
        return advance(others)

    stream.advance = advancing

    async def reward(completions, **columns):
        if any("#" in text for text in completions):
            assert await asyncio.to_thread(reached.wait, 10)
        return [0.0] * len(completions)

    plan = lambda problem: iter_requests([Request(1), Request(1)])  # noqa: E731
    result = run_plans(PROBLEMS[:2], plan, engine, reward, TOKENIZER, CONFIG)
    assert [len(group) for group in result.groups] == [2, 2]


def test_a_plan_goes_on_while_another_ones_reward_is_under_way():
    engine, _ = clocked(lambda text: WRONG)
    release = threading.Event()

    async def reward(prompts, completions, **columns):
        if prompts[0] == PROBLEMS[0].prompt:
            assert await asyncio.to_thread(release.wait, 10)
        elif len(columns["solution"]) == 1:  # the other problem's third micro-group
            release.set()
        return [0.0] * len(completions)

    plan = lambda problem: iter_requests([Request(4), Request(2), Request(1)])  # noqa: E731
    result = run_plans(PROBLEMS[:2], plan, engine, reward, TOKENIZER, CONFIG)
    assert [len(group) for group in result.groups] == [7, 7] and release.is_set()


def test_a_plain_reward_is_called_in_the_callers_thread_for_all_that_wait(model):
    calls = []

    def reward(completions, **columns):
        calls.append((threading.current_thread(), len(completions)))
        return [0.0] * len(completions)

    ladder(embedded(model), reward)
    assert {thread for thread, _ in calls} == {threading.current_thread()}
    assert sum(rows for _, rows in calls) == 8 * len(PROBLEMS) and max(rows for _, rows in calls) > 8


def test_rewards_that_overlap_are_called_for_one_request_each():
    rows = []

    async def reward(prompts, completions, **columns):
        rows.append((prompts, len(completions)))
        return [0.0] * len(completions)

    engine, _ = clocked(lambda text: WRONG)
    ladder(engine, reward, problems=PROBLEMS[:3])
    assert sorted(count for _, count in rows) == [1, 1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert all(len(set(prompts)) == 1 for prompts, _ in rows)


def test_calls_of_an_async_reward_share_what_belongs_to_an_event_loop():
    semaphore, running, most = asyncio.Semaphore(2), [], []

    async def reward(completions, **columns):
        async with semaphore:
            running.append(None)
            most.append(len(running))
            await asyncio.sleep(0.01)
            running.pop()
        return [0.0] * len(completions)

    engine, _ = clocked(lambda text: WRONG)
    ladder(engine, reward, problems=PROBLEMS)
    assert max(most) == 2


def test_what_may_overlap():
    class Asynchronous:
        async def __call__(self, completions, **columns): ...

    def declared(completions, **columns): ...

    declared.may_overlap = True
    from trapo_train.rewards.functions import load_reward

    assert may_overlap(delayed(len)) and may_overlap(Asynchronous()) and may_overlap(declared)
    assert may_overlap(load_reward("math_verify"))
    assert not may_overlap(pointer_chasing_reward)
    assert may_overlap(WeightedSum([("a", declared, 1.0), ("b", delayed(len), 1.0)]))
    assert not may_overlap(WeightedSum([("a", declared, 1.0), ("b", pointer_chasing_reward, 1.0)]))


def test_a_reward_that_fails_in_its_thread_ends_the_step_and_names_the_row(model):
    async def reward(prompts, completions, **columns):
        if PROBLEMS[3].prompt in prompts:
            raise ArithmeticError("no luck")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="row 3.*no luck"):
        ladder(embedded(model), reward)


def test_sums_of_overlapping_rewards_keep_their_metrics():
    reward = WeightedSum([("half", delayed(lambda text: 0.001), 0.5), ("all", delayed(lambda text: 0), 1.0)])
    engine, _ = clocked(lambda text: RIGHT)
    result = ladder(engine, reward, problems=PROBLEMS)
    assert result.metrics["reward/half"] == result.metrics["reward/all"] == 1.0
    assert result.metrics["reward/mean"] == 1.5
    assert result.metrics["time/reward_s"] >= 0 and result.metrics["rollout/tokens_per_s"] > 0


def test_waiting_for_rewards_is_measured(model):
    result = ladder(embedded(model), delayed(lambda text: 0.05), problems=PROBLEMS[:1])
    assert result.metrics["time/reward_s"] > 0.04
    started = time.perf_counter()
    assert ladder(embedded(model), problems=PROBLEMS[:1]).metrics["time/reward_s"] < time.perf_counter() - started


def test_rewards_that_are_there_are_taken_in_their_order_and_not_compared_with_each_other(monkeypatch):
    def compared(case, other):
        raise AssertionError("of n rewards these would be n² comparisons")

    monkeypatch.setattr("trapo_train.rewards.judging._Case.__eq__", compared)
    opened = threading.Event()

    async def reward(prompts, completions, **columns):
        if prompts[0] == PROBLEMS[2].prompt:
            await asyncio.to_thread(opened.wait, 20)
        return [1.0] * len(completions)

    samples = [Sample(problem, 1, 0.0, (), ids(RIGHT), (-1.0,) * len(ids(RIGHT)), "stop") for problem in PROBLEMS[:6]]
    with Judging(reward, TOKENIZER, CONFIG) as judging:
        for owner, sample in enumerate(samples):
            judging.start(owner, [sample])
        wait([future for owner, future in enumerate(judging.futures) if owner != 2])
        assert judging.take(wait=False) == [0, 1, 3, 4, 5] and len(judging) == 1
        opened.set()
        assert judging.take(wait=True) == [2] and len(judging) == 0
    assert [sample.reward for sample in samples] == [1.0] * 6
