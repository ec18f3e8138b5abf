"""What a type checker and an editor see of the public functions is what these do."""

import copy
import inspect
import pickle
from typing import Literal, get_args, get_origin, get_overloads, get_type_hints

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.utils import _pytree

from tests.trapo_kernels import cases
from trapo_kernels import (
    KL,
    LogprobOutput,
    PolicyLossOutput,
    Term,
    TokenBatch,
    aggregate,
    batch,
    corrections,
    dispatch,
    gates,
    head_options,
    inputs,
    linear_logprob,
    linear_policy_loss,
    objective,
    objectives,
    policy_loss,
    sequence,
    token_logprob,
    weights,
)


def _hints(x):
    return get_type_hints(x, localns={"ProcessGroup": ProcessGroup})


@pytest.mark.parametrize(("function", "options"), [(linear_logprob, inputs.ScoringOptions), (token_logprob, inputs.LogitOptions)])
def test_the_overloads_take_what_the_function_takes(function, options):
    """An entropy that was asked for is a tensor to a type checker."""
    asked, either = (_hints(overload) for overload in get_overloads(function))
    for hints, entropy, with_entropy in ((asked, torch.Tensor, Literal[True]), (either, torch.Tensor | None, bool)):
        assert hints.pop("return") == LogprobOutput[entropy] and hints.pop("with_entropy") == with_entropy
        assert hints.pop("options").__args__ == (options,)
        whole = hints | _hints(options) | {"with_entropy": bool, "return": LogprobOutput[torch.Tensor | None]}
        assert whole == _hints(function)


def test_the_options_of_a_head_are_those_of_the_policy_loss():
    taken = _hints(linear_policy_loss)
    shared = {name: taken[name] for name in inspect.getfullargspec(linear_policy_loss).kwonlyargs if name != "backend"}
    assert shared == _hints(inputs.HeadOptions) and taken["return"] == PolicyLossOutput[torch.Tensor]
    read = _hints(head_options)["return"]
    assert _hints(read) == {name: shared[name] for name in ("bias", "softcap", "lora")} | {"temperature": float}


def test_the_entropy_of_a_policy_loss_is_that_which_it_was_given():
    hints = _hints(policy_loss)
    assert hints["return"] == PolicyLossOutput[hints["entropy"]] and hints["entropy"].__bound__ == torch.Tensor | None
    assert not hints["entropy"].__covariant__  # which type checkers refuse of a parameter


def _calls():
    """By name, functions of the hidden states that return an output."""
    hidden, weight, _ = cases.head(6, 5, 20, torch.float32)
    b, objective = cases.batch(6, 20, torch.float32), objectives.sft()
    return hidden, {
        "scored": lambda h: linear_logprob(h, weight, b.target),
        "with entropy": lambda h: token_logprob(h @ weight.t(), b.target, with_entropy=True),
        "one pass": lambda h: linear_policy_loss(h, weight, b, objective),
        "no entropy": lambda h: policy_loss(h.sum(1), None, b, objective),
    }


@cases.SLOW_ON_A_CPU
@pytest.mark.parametrize("name", ["scored", "with entropy", "one pass", "no entropy"])
def test_an_output_is_a_tuple_to_pickle_to_pytrees_and_to_compiled_code(name):
    hidden, calls = _calls()
    torch._dynamo.reset()
    out = calls[name](hidden)
    compiled = torch.compile(calls[name], fullgraph=True, backend="aot_eager")(hidden)
    detached = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, out)
    several = (compiled, detached, pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached))
    for same in several:
        assert type(same) is type(out) and isinstance(same, tuple) and same._fields == out._fields
        assert (same.entropy is None) == (out.entropy is None) == (name in ("scored", "no entropy"))
        torch.testing.assert_close(_pytree.tree_leaves(same), _pytree.tree_leaves(out), check_device=False)


@pytest.mark.parametrize(
    ("takes", "name", "values"),
    [
        (aggregate, "mode", weights.AGGREGATIONS),
        (TokenBatch.from_padded, "aggregation", batch.AGGREGATIONS),
        (linear_logprob, "backend", dispatch.BACKENDS),
        (linear_policy_loss, "backend", [name for name in dispatch.BACKENDS if name not in dispatch.FUSED]),
        (policy_loss, "backend", [name for name in dispatch.BACKENDS if name not in dispatch.FUSED]),
        (token_logprob, "backend", [name for name in dispatch.BACKENDS if name not in dispatch.FUSED]),
        (Term, "anchor", objective.ANCHORS),
        (Term, "signal", objective.SIGNALS),
        (KL, "estimator", objective.KL_ESTIMATORS),
        (objectives.grpo, "kl", objective.KL_ESTIMATORS),
        (objectives.reinforce_pp, "kl", objective.KL_ESTIMATORS),
        (corrections.tis, "level", corrections.LEVELS),
        (corrections.mis, "level", corrections.LEVELS),
    ],
)
def test_an_option_of_a_few_words_has_them_in_its_type(takes, name, values):
    hint = _hints(takes)[name]
    assert get_origin(hint) is Literal and get_args(hint) == tuple(values)


@pytest.mark.parametrize("module", [corrections, gates, sequence], ids=lambda module: module.__name__)
def test_a_module_says_which_of_its_names_are_public(module):
    defined = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    assert module.__all__ == sorted(name for name in defined if not name.startswith("_"))
