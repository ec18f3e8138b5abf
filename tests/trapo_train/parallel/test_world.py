"""What ranks tell each other: shares put together, errors that end all of them."""

import os
import pickle
import time

import pytest
import torch.distributed as dist

from tests import ranks
from tests.trapo_train.test_train import EVALUATED, build_config
from trapo_train import train, trainer
from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.parallel.world import ParallelConfig, RankError, World, interleave
from trapo_train.schema import UserError


@pytest.mark.parametrize("length", range(8))
def test_shares_put_together_are_the_whole(length):
    items = list(range(length))
    assert interleave([items[rank::3] for rank in range(3)]) == items


def test_what_an_action_raises_on_some_ranks_is_raised_on_all_and_what_it_returns_is_known_to_all():
    def raises(error):
        raise error

    here, there = UserError("of rank 0"), UserError("of rank 1")
    world = World.alone()
    world.gather = lambda mine: [mine, (2, None)]
    assert world.attempt(lambda: 1, UserError) == [1, 2]
    world.gather = lambda mine: [mine, (None, there)]
    for action, raised in ((lambda: 1, there), (lambda: raises(here), here)):
        with pytest.raises(UserError) as found:
            world.attempt(action, OSError, UserError)
        assert found.value is raised
    with pytest.raises(ZeroDivisionError) as found:
        world.attempt(lambda: 1 // 0, Exception)
    assert "1 // 0" in str(found.traceback[-1].statement)
    world.gather = lambda mine: pytest.fail("a rank that ends for another reason tells nothing")
    with pytest.raises(ZeroDivisionError):
        world.attempt(lambda: raises(ZeroDivisionError()), UserError)


def test_ranks_that_do_not_divide_into_replicas(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="parallel.replicate must divide the number of ranks, 3, got 2"):
        World(ParallelConfig(replicate=2))
    for never in (0, 31_536_001, 2**70):  # the last is none of the seconds that a timedelta takes
        with pytest.raises(ValueError, match=f"timeout_s must be from 1 to 31536000, a year, got {never}"):
            ParallelConfig(timeout_s=never)
    with pytest.raises(ValueError, match="vocab_parallel_head needs replicate = 1, got 3"):
        ParallelConfig(replicate=3, vocab_parallel_head=True)


def _wait_for_replicas(rank):
    world = World(ParallelConfig(replicate=2, timeout_s=2))
    mesh = world.mesh
    assert mesh is world.mesh, "a second one would have process groups of its own"
    if rank == 0:  # the others never come
        for name in mesh.mesh_dim_names:
            # A rank that ends is noticed, too, in other words.
            with pytest.raises(RankError, match="rank 0 has lost another rank.*2000 ?ms"), world.together():
                dist.barrier(mesh.get_group(name))
    else:
        time.sleep(10)
    os._exit(0)


def test_the_groups_of_replicas_wait_as_long_as_is_configured():
    ranks.start(_wait_for_replicas, 4)


class Unsendable(Exception):
    """One that pickle writes and does not read."""

    def __init__(self, what, why):
        super().__init__(f"{what}, {why}")


def test_an_error_that_cannot_be_sent_is_itself_where_it_was_raised_and_its_words_elsewhere():
    def fails():
        raise Unsendable("broken", "by design")

    world, sent = World.alone(), []
    world.gather = lambda mine: sent.append(pickle.dumps(mine)) or [mine]
    with pytest.raises(Unsendable):
        world.attempt(fails, Exception)
    there = pickle.loads(sent[0])
    world.gather = lambda mine: [mine, there]
    with pytest.raises(RuntimeError, match="Unsendable: broken, by design"):
        world.attempt(lambda: 1, Exception)


@pytest.mark.parametrize("name", ["load_problems", "load_eval_sets"])
def test_the_loss_of_a_rank_while_data_is_read_is_told_once_as_such(name, tmp_path, monkeypatch):
    def lost(*arguments, **options):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    config = build_config(tmp_path, "run", *EVALUATED)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine])
    monkeypatch.setattr(trainer, name, lost)
    with pytest.raises(RankError, match="rank 0 has lost another rank: .*Connection closed by peer") as found:
        trainer.Trainer(config)
    with pytest.raises(RankError) as again, World(ParallelConfig()).together():  # as a run's trainer is built
        raise found.value
    assert again.value is found.value


def test_an_error_of_ours_that_names_a_path_of_gloo_is_no_lost_rank():
    world = World.alone()
    world.size = 2
    with pytest.raises(CheckpointError, match="/gloo/run is full"), world.together():
        raise CheckpointError("/scratch/gloo/run is full")


def test_all_ranks_go_by_what_the_first_finds_in_output_dir_and_end_where_one_cannot_look(tmp_path, monkeypatch):
    config, given = build_config(tmp_path, "run"), []

    def load(config, *, rejected, **telling):
        given.append(rejected)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "Trainer", load)
    told = iter([[(None, None)], [({(0, 0)}, None), (None, None)], [(None, None)], [(None, None), (None, UserError("of rank 1"))]])
    monkeypatch.setattr(World, "gather", lambda self, mine: next(told))
    with pytest.raises(KeyboardInterrupt):
        train.run(config, train.NullReporter())
    with pytest.raises(UserError, match="of rank 1"):
        train.run(config, train.NullReporter())
    assert given == [{(0, 0)}]
