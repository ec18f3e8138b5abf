"""The trainer on a device that is not the CPU, a pretended one: nothing is left behind, and the device is seldom waited for."""

from itertools import groupby

import pytest
import torch

from tests.pretended_gpu import DEVICE, pretend
from tests.trapo_train.test_train import build_config
from trapo_train import micro_batch
from trapo_train.micro_batch import MicroBatch
from trapo_train.parallel import world
from trapo_train.train import Trainer

OPTIONS = [
    "steps=2",
    "plan={name: uft, num_samples: 3, guidance: 0.5}",
    "objective={name: uft, options: {beta: 0.1}}",
    "updates={mini_batches: 2, correction: {name: tis}}",
]
COMPARED = ("loss", "grad_norm", "reward/mean", "entropy/rollout", "response_tokens", "correction/mean")


@pytest.fixture
def on_a_pretended_gpu(monkeypatch):
    """A function that calls another one with the pretended GPU, on which every World then is."""
    alone = world.World.__init__

    def init(world, *arguments, **options):
        alone(world, *arguments, **options)
        world.device = torch.device(DEVICE)

    def call(run):
        with pretend(monkeypatch) as gpu, monkeypatch.context() as patch:
            patch.setattr(world.World, "__init__", init)
            patch.setattr(micro_batch, "_PINNED_FOR", DEVICE)
            return run(gpu)

    return call


@pytest.mark.slow
def test_a_run_equals_that_on_the_cpu(tmp_path, on_a_pretended_gpu):
    def train(gpu=None):
        trainer = Trainer(build_config(tmp_path, "cpu" if gpu is None else "gpu", *OPTIONS))
        devices = {p.device.type for model in (trainer.model, trainer.reference) for p in model.parameters()}
        assert devices == {"cpu" if gpu is None else DEVICE}
        return [trainer.train_step() for _ in range(2)]

    for here, there in zip(train(), on_a_pretended_gpu(train), strict=True):
        assert set(here) == set(there) and here["grad_norm"] > 1e-5
        for name in COMPARED:
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-8), name


@pytest.mark.slow
def test_an_update_queues_all_of_its_uploads_then_its_passes_before_it_waits(tmp_path, on_a_pretended_gpu, monkeypatch):
    """Per mini-batch: logprobs of the old policy, of the reference; then per update one transfer of its metrics."""

    def watched(gpu):
        trainer = Trainer(build_config(tmp_path, "run", *OPTIONS, "packing.max_tokens=60", "rollout.max_response_tokens=8"))
        for model in (trainer.model, trainer.reference):
            model.run_head = _marked(model.run_head, "pass", gpu.waits)
        monkeypatch.setattr(MicroBatch, "to", _marked(MicroBatch.to, "upload", gpu.waits))
        update = trainer._update
        trainer._update = lambda *arguments: gpu.waits.clear() or update(*arguments)
        trainer.train_step()
        return list(gpu.waits), len(trainer.last_micro_batches)

    waits, micro_batches = on_a_pretended_gpu(watched)
    assert micro_batches > 4 and waits.count("pass") == 3 * micro_batches
    scored, updated = ["upload", "pass", "aten::_to_copy"], ["upload", "pass", "tolist"]
    assert [what for what, _ in groupby(waits)] == 4 * scored + 2 * updated


def _marked(call, what, marks):
    def marked(*arguments):
        marks.append(what)
        return call(*arguments)

    return marked
