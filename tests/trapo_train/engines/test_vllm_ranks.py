"""vLLM in the processes of several ranks, against a stand-in: what fails on one of them."""

from __future__ import annotations

import pytest
import torch

from tests import ranks
from tests.trapo_train.engines.fake_vllm import FakeLLM, FakeVllm
from tests.trapo_train.engines.test_vllm_engine import build, ready, tiny
from tests.trapo_train.test_train import build_config
from trapo_train import train
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.engines.engine import EngineError
from trapo_train.parallel.world import World
from trapo_train.reports.display import NullReporter
from trapo_train.rewards.functions import RewardError


def test_ranks_agree_before_they_put_weights_together_before_they_sample_and_after(vllm, tmp_path):
    class Ranks(World):
        def __init__(self, fails_at=None):
            self.fails_at = fails_at

        def gather(self, value):
            llm.log.append("agree")
            if len(llm.log) == self.fails_at:
                raise EngineError("of another rank")
            return [value]

    model = tiny()
    engine = build(model, tmp_path)
    (llm,) = vllm.built
    with ready(engine, model, Ranks()):
        llm.log.append("sample")
    assert llm.log == ["agree", "load", "reset", "agree", "sample", "agree"]
    for fails_at, expected in ((1, ["agree"]), (4, ["agree", "load", "reset", "agree"])):
        llm.log.clear()
        with pytest.raises(EngineError, match="of another rank"), ready(engine, model, Ranks(fails_at)):
            llm.log.append("sample")
        assert llm.log == expected
    llm.log.clear()
    with pytest.raises(ZeroDivisionError), ready(engine, model, Ranks()):
        raise ZeroDivisionError  # of this rank alone: the others are elsewhere
    assert llm.log == ["agree", "load", "reset", "agree"]


def test_where_vllm_fails_to_load_a_weight_the_others_are_put_together_all_the_same(vllm, tmp_path, monkeypatch):
    def fail(llm, method, kwargs):
        next(kwargs["weights_iterator"])
        raise RuntimeError("no room")

    monkeypatch.setattr(FakeLLM, "collective_rpc", fail)
    engine, weights = build(tiny(), tmp_path), iter([("first", torch.ones(1)), ("second", torch.ones(1))])
    with pytest.raises(EngineError, match="vllm: reload_weights failed with RuntimeError: no room$"):
        engine.load(weights)
    assert list(weights) == []
    with pytest.raises(ZeroDivisionError):  # of ours: the others wait for a weight of this rank
        engine.load(1 / 0 for _ in "a")


FAILS = "reward=tests.trapo_train.parallel.test_parallel:fails_on_one_rank"


def _train(rank, directory):
    with pytest.MonkeyPatch.context() as patch:
        FakeVllm().install(patch)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        settings = ("steps=5", "prompts_per_step=2", "checkpoint.every=0", "rollout.engine=vllm", "rollout.vllm.max_model_len=80")
        config = build_config(directory, "run", *settings, "parallel.timeout_s=60", FAILS)
        with pytest.raises(RewardError, match="not today"):
            train.run(config, NullReporter())


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_ends_all_of_them_with_everything_before_saved(tmp_path):
    ranks.start(_train, 2, tmp_path)
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps() == [2]
