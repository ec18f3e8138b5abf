"""What the documentation says: equivalents run and are equivalent, and docstrings and kernel comments have their lines."""

import inspect
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trapo_kernels
from tests.trapo_kernels import cases
from trapo_kernels import Role, corrections, objectives

ROOT = Path(__file__).parents[2]
PUBLIC = [f for f in (getattr(trapo_kernels, name) for name in trapo_kernels.__all__) if inspect.isfunction(f)]
CORRECTIONS = [getattr(corrections, name) for name in corrections.__all__]


def _equivalent(function):
    """The code under "Equivalent to" of a docstring."""
    return textwrap.dedent(re.search(r"Equivalent to[^\n]*:\n\n((?: {4}.*\n)+)", inspect.getdoc(function))[1])


def _arguments():
    """By function, the arguments without a default, and others; every one may also stay as it is."""
    hidden, weight, bias = (x.detach() for x in cases.head(12, 6, 40, torch.float32))
    batch = cases.batch(12, 40, torch.float32)
    temperature = torch.linspace(0.5, 2.0, 12, device=cases.DEVICE)
    entropy = torch.rand(12, device=cases.DEVICE)
    policy = {"batch": batch, "objective": objectives.trapo(alpha=0.1, entropy_coef=0.001)}
    head = {"hidden": hidden, "lm_head_weight": weight}
    role = torch.tensor([Role.IGNORED, Role.EXPERT, Role.ROLLOUT, Role.ROLLOUT], dtype=torch.uint8)
    logits = (hidden @ weight.T).view(3, 4, 40)
    return {
        "linear_logprob": (
            head | {"target": batch.target, "with_entropy": True},
            {"bias": bias, "softcap": 2.0, "temperature": temperature},
        ),
        "linear_policy_loss": (head | policy, {}),
        "policy_loss": ({"logprob": -3 * entropy, "entropy": entropy} | policy, {}),
        "token_logprob": (
            {"logits": logits, "target": batch.target.view(3, 4), "with_entropy": True},
            {"softcap": 2.0, "temperature": temperature.view(3, 4)},
        ),
        "silenced_weight": (
            {"role": batch.role, "weight": batch.weight, "advantage": batch.advantage.round(), "objective": objectives.grpo()},
            {},
        ),
        "aggregate": ({"role": role, "mode": "token_mean"}, {}),
        "loss_totals": ({"role": role}, {}),
        "head_options": ({"model": _model(bias)}, {}),
        "unsharded": ({"x": _Shard()}, {}),
        "merged_metrics": ({"parts": [_metrics(-3 * entropy, batch), _metrics(-4 * entropy, batch)]}, {}),
    }


class _Shard(torch.Tensor):
    """A DTensor that has two ranks: what it becomes says how it was asked."""

    device_mesh = SimpleNamespace(device_type="cuda", ndim=2)
    device = None

    def to(self, device):
        there = _Shard()
        there.device = device
        return there

    def full_tensor(self, grad_placements):
        return (self.device, *map(repr, grad_placements))


def _model(bias):
    config = SimpleNamespace(model_type="granite", final_logit_softcapping=3.0, logits_scaling=8.0)
    config.get_text_config = lambda: config
    head = torch.nn.Linear(6, 40)
    head.bias = torch.nn.Parameter(bias)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config)


def _metrics(logprob, batch):
    return trapo_kernels.policy_loss(logprob, None, batch, objectives.grpo()).metrics


@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("function", [f for f in PUBLIC if "Equivalent to" in f.__doc__], ids=lambda f: f.__name__)
def test_what_a_docstring_calls_equivalent_is(function, with_options):
    needed, options = _arguments()[function.__name__]
    arguments = needed | (options if with_options else {})
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    names = vars(trapo_kernels) | {"torch": torch, "math": math} | defaults | arguments
    snippet, result = _equivalent(function), function(**arguments)
    exec(snippet, names)
    found = result._asdict() if hasattr(result, "_asdict") else {"weight": result, "totals": result}
    if isinstance(result, dict):
        found = {name.replace("/", "_"): value for name, value in result.items()}
    compared = set(re.findall(r"^(\w+) =", snippet, re.M)) & set(found)
    assert compared
    for name in compared:
        if isinstance(found[name], torch.Tensor):
            torch.testing.assert_close(found[name], names[name])
        else:
            assert found[name] == names[name]


@pytest.mark.parametrize("function", [*PUBLIC, *CORRECTIONS], ids=lambda f: f.__name__)
def test_a_public_function_says_what_it_returns_raises_holds_and_repeats(function):
    for item in ("Returns", "Raises", "Memory", "Determinism", "Source"):
        assert re.search(rf"(^|\. ){item}: ", inspect.getdoc(function), re.M), f"{function.__name__} says nothing of {item}"


KERNELS = [p for p in (ROOT / "trapo_kernels" / "backends" / "triton_ops").glob("*.py") if "_kernel(" in p.read_text()]
KERNELS += [ROOT / "csrc" / name for name in ("cpu/rows.inl", "cpu/tiles.cpp", "cuda/row_kernels.cuh", "cuda/hopper_scoring.cuh")]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_kernel_says_what_it_works_moves_keeps_and_repeats(path):
    source = path.read_text()
    for item in ("Work", "Reads / writes", "Saved", "On chip", "Order", "Edges"):
        assert re.search(rf"^(#|//).*\b{item}\b.*: ", source, re.M), f"{path.name} says nothing of {item}"
    above = re.findall(r"(.*)\n@triton\.jit.*\ndef \w+_kernel", source)
    above += re.findall(r"(.*)\n(?:template.*\n)?__global__", source)
    assert all(line.startswith(("#", "//")) for line in above), "a kernel without a comment above it"
