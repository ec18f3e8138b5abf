"""The order in which problems are visited: once per epoch, by the seed, and resumable."""

import io
from types import SimpleNamespace

import pytest
import torch

from tests.trapo_train.test_train import build_config
from trapo_train.data.dataset import ProblemOrder
from trapo_train.train import Trainer


def test_order_visits_every_problem_once_per_epoch():
    order = ProblemOrder(10, seed=0)
    steps = [order.next(4) for _ in range(10)]
    visits = [index for step in steps for index in step]
    epochs = [visits[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # reshuffled
    assert all(len(set(step)) == 4 for step in steps)  # across the border of two epochs too


def test_a_request_for_more_than_there_are_repeats_as_little_as_possible():
    taken = ProblemOrder(3, seed=0).next(8)
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]
    assert len(set(taken[6:])) == 2


@pytest.mark.parametrize("seed", range(20))
def test_no_step_repeats_a_problem_whatever_the_sizes(seed):
    order = ProblemOrder(7, seed=seed)
    for count in (3, 7, 5, 1, 6, 7, 2, 4) * 3:
        assert len(set(order.next(count))) == count


def test_passes_count_what_was_visited_and_an_epoch_that_begins_has_the_avoided_last():
    order = ProblemOrder(10, seed=0)
    assert order.passes == 0.0
    order.next(6)
    assert order.passes == 0.6
    first = order.next(3)
    assert not set(order.next(4, avoid=first)) & set(first)  # one of the old epoch, three of the new one
    assert order.passes == pytest.approx(1.3)


def test_order_is_a_function_of_the_seed_and_resumes_exactly():
    order, again, other = ProblemOrder(20, seed=1), ProblemOrder(20, seed=1), ProblemOrder(20, seed=2)
    for _ in range(3):
        first = order.next(7)
        assert again.next(7) == first
    assert other.next(7) != ProblemOrder(20, seed=1).next(7)
    file = io.BytesIO()
    torch.save(order.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    listed = state | {"remaining": state["remaining"].tolist()}  # as checkpoints had it at first
    passes, expected = order.passes, [order.next(7) for _ in range(10)]
    for saved in (state, listed):
        resumed = ProblemOrder(20, seed=1)
        resumed.load_state_dict(saved)
        assert resumed.passes == passes
        assert [resumed.next(7) for _ in range(10)] == expected


def test_bad_orders():
    with pytest.raises(ValueError, match="num_problems must be at least 1, got 0"):
        ProblemOrder(0, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        ProblemOrder(3, seed=0).next(0)
    with pytest.raises(ValueError, match="num_problems = 4, the saved run had 3"):
        ProblemOrder(4, seed=0).load_state_dict(ProblemOrder(3, seed=0).state_dict())
    with pytest.raises(ValueError, match="seed = 1, the saved run had 0"):
        ProblemOrder(3, seed=1).load_state_dict(ProblemOrder(3, seed=0).state_dict())


def test_a_step_does_not_copy_the_problems_that_are_left(tmp_path, monkeypatch):
    trainer = Trainer(build_config(tmp_path, "run"))
    trainer.order.next(1)
    remaining, as_it_was = trainer.order._remaining, trainer.order._remaining.clone()
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", _refuse)
    assert trainer.order.state_dict()["remaining"] is remaining  # of millions of rows a list takes longer than some steps
    trainer.train_step()
    assert remaining.equal(as_it_was)  # what a step that fails goes back to
    assert trainer.order._remaining.data_ptr() > remaining.data_ptr()  # a view of the same memory


def test_a_checkpoint_holds_the_problems_that_are_left_and_not_the_whole_epoch(tmp_path):
    trainer = Trainer(build_config(tmp_path, "run"))
    trainer.order.next(trainer.order.num_problems - 2)
    store = SimpleNamespace(save=lambda step, state, *others: state)
    remaining = trainer.save(store)["order"]["remaining"]
    assert remaining.equal(trainer.order._remaining) and len(remaining) == 2
    assert remaining.untyped_storage().nbytes() == 2 * remaining.element_size()  # torch.save writes all of it


def _refuse(tensor, memo):
    raise AssertionError("copied")
