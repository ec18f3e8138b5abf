"""Bad input gets the rule, the actual value and the remedy, before anything is computed."""

import contextlib
import dataclasses
import warnings

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trapo_kernels import (
    LoraHead,
    Objective,
    Term,
    TokenBatch,
    aggregate,
    dispatch,
    gates,
    linear_logprob,
    linear_policy_loss,
    objectives,
    policy_loss,
    token_logprob,
)
from trapo_kernels.sequence import EntropyWeight

N, D, V = 4, 3, 7
HIDDEN, WEIGHT, TARGET = torch.randn(N, D), torch.randn(V, D), torch.arange(N)


def _batch(**changes):
    streams = {
        "target": TARGET,
        "role": torch.ones(N, dtype=torch.uint8),
        "advantage": torch.ones(N),
        "weight": torch.ones(N),
    }
    return TokenBatch(**(streams | changes))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN[None], WEIGHT, TARGET), {}, r"hidden must have shape \[N, D\], got \[1, 4, 3\]. Flatten"),
        ((HIDDEN, WEIGHT.T, TARGET), {}, "must agree in D, got 3 and 7"),
        ((HIDDEN, WEIGHT.bfloat16(), TARGET), {}, "dtype of hidden, .* got hidden torch.float32 and lm_head_weight torch.bfloat16"),
        ((HIDDEN.double(), WEIGHT, TARGET), {}, "dtype of hidden, .* got hidden torch.float64 and lm_head_weight torch.float32"),
        ((HIDDEN.long(), WEIGHT, TARGET), {}, "hidden must be float32, bfloat16, float16 or float64, got torch.int64"),
        ((HIDDEN, WEIGHT, TARGET[None]), {}, r"target must have shape \[N\] = \[4\], got \[1, 4\]. Flatten"),
        ((HIDDEN, torch.nn.Linear(D, V), TARGET), {}, r"lm_head_weight must be a tensor .* got Linear. Pass its .weight"),
        (
            (HIDDEN, torch.empty(0), TARGET),
            {},
            r"must have shape \[V, D\], got \[0\].*ZeRO-3 or FSDP1 has partitioned must be gathered",
        ),
        ((HIDDEN, WEIGHT.char(), TARGET), {}, "got torch.int8. Dequantise what is quantised."),
        (
            (HIDDEN, WEIGHT.to("meta"), TARGET),
            {},
            "got cpu and meta. It is offloaded: .* keep lm_head out",
        ),
        ((HIDDEN, WEIGHT, TARGET.int()), {}, "target must be torch.int64, got torch.int32"),
        ((HIDDEN, WEIGHT, TARGET + 5), {}, r"target must lie in \[0, V\) = \[0, 7\).*got 7 at row 2"),
        ((HIDDEN, WEIGHT, TARGET - 1), {}, "got -1 at row 0"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": 0.0}, "temperature must be a finite number > 0 in float32, got 0.0"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": torch.tensor([1.0, 1, 1, -1])}, "> 0 in float32, got -1.0"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": torch.tensor([1.0, float("inf"), 1, 1])}, "> 0 in float32, got inf"),
        ((HIDDEN, WEIGHT, TARGET), {"backend": None}, "backend must be one of 'auto'.*got None"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": torch.ones(3)}, r"temperature must have shape \[N\] = \[4\], got \[3\]"),
        ((HIDDEN, WEIGHT, TARGET), {"temperature": 1e-50}, "temperature must be a finite number > 0 in float32, got 1e-50"),
        ((HIDDEN, WEIGHT, TARGET), {"softcap": 1e39}, "softcap must be None or a finite number > 0 in float32, got 1e.39"),
        ((HIDDEN, WEIGHT, TARGET), {"softcap": -30.0}, "softcap must be None or a finite number > 0 in float32, got -30.0"),
        ((HIDDEN, WEIGHT, TARGET), {"bias": torch.ones(3)}, r"bias must have shape \[V\] = \[7\].*got \[3\]"),
        ((HIDDEN, WEIGHT, TARGET), {"logits_dtype": torch.float16}, "logits_dtype must be torch.float32 or the dtype of hidden"),
        ((HIDDEN, WEIGHT, TARGET), {"backend": "cuda"}, "backend must be one of 'auto'.*got 'cuda'"),
        ((HIDDEN.double(), WEIGHT.double(), TARGET), {"backend": "native"}, 'backend="native" cannot run: .*float64'),
        (
            (HIDDEN, WEIGHT, TARGET),
            {"process_group": object()},
            "process_group must be a torch.distributed.ProcessGroup.*got object",
        ),
        ((HIDDEN, WEIGHT, TARGET), {"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
        (
            (HIDDEN, WEIGHT, TARGET),
            {"with_entropy": "no"},
            r"with_entropy must be True or False, got 'no'\. Pass bool",
        ),
        ((HIDDEN.tolist(), WEIGHT, TARGET), {}, r"hidden must be a tensor of shape \[N, D\], got list\. Pass torch\.as_tensor"),
        ((HIDDEN, WEIGHT, TARGET), {"batch_invariant": True, "backend": "reference"}, 'backend "reference" has the whole head'),
        ((HIDDEN.double(), WEIGHT.double(), TARGET), {"backend": "triton"}, 'backend="triton" cannot run: .*float64'),
    ],
)
def test_linear_logprob(arguments, options, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^linear_logprob: {message}|{message}"):
        linear_logprob(*arguments, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": torch.ones(N)}, "role must be torch.uint8, got torch.float32"),
        ({"role": TARGET > 0}, r"role must be torch.uint8, got torch.bool. Say .* torch.where\(role, Role.EXPERT, Role.IGNORED\)"),
        ({"advantage": torch.ones(2)}, r"advantage must have shape .* got \[2\]. Flatten .*; repeat what is one per sequence"),
        ({"role": torch.full((N,), 3, dtype=torch.uint8)}, r"role must be .*\(0, 1, 2\), got 3"),
        ({"advantage": torch.ones(N, 1)}, r"advantage must have shape \[N\] = \[4\], got \[4, 1\]"),
        ({"weight": torch.tensor([1.0, 1, float("inf"), 1])}, "weight must be finite.*got inf at row 2"),
        ({"entropy_weight": torch.tensor([1.0, float("inf"), 1, 1])}, "entropy_weight must be finite, got inf at row 1"),
        ({"kl_weight": torch.tensor([1.0, float("nan"), 1, 1])}, "kl_weight must be finite, got nan at row 1"),
        ({"kl_weight": torch.ones(2)}, r"kl_weight must have shape .* got \[2\]"),
        ({"old_logprob": torch.zeros(N, requires_grad=True)}, "old_logprob is a constant of the loss.*Detach it"),
        (
            {"weight": torch.ones(N, dtype=torch.bfloat16)},
            r"weight must be .*got torch.bfloat16. If FSDP.*cast_forward_inputs.*; otherwise pass weight\.float\(\)\.$",
        ),
        ({"advantage": torch.ones(N, requires_grad=True)}, "advantage is a constant of the loss.*Detach it"),
    ],
)
def test_token_batch(changes, message):
    with pytest.raises((ValueError, TypeError), match=f"^TokenBatch: {message}"):
        _batch(**changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(2), r"rows must be int64 of shape \[M\] on cpu, got torch.float32 \[2\] on cpu. Pass batch.active_rows"),
        ([0, 1], "got list. Pass"),
        (torch.tensor([0, 0, 2]), r"rows must be those whose role.*got \[0, 0, 2\] \(3 rows\). Leave them out"),
    ],
)
def test_active_rows_that_are_told(rows, message):
    with pytest.raises(ValueError, match=f"^TokenBatch.with_active_rows: .*{message}"):
        _batch().with_active_rows(rows)


def test_silent_rows_that_are_told():
    b = _batch()
    assert b.with_active_rows(b.active_rows, b.silent_rows).silent_rows is b.silent_rows
    with pytest.raises(ValueError, match=r"^TokenBatch.with_active_rows: silent_rows must be those .*no weight.*got \[99\]"):
        b.with_active_rows(None, torch.tensor([99]))


def test_linear_policy_loss_and_policy_loss():
    with pytest.raises(ValueError, match="one token per row, N = 3, got 4"):
        linear_policy_loss(HIDDEN[:3], WEIGHT, _batch(), objectives.trapo())
    with pytest.raises(ValueError, match=r"'grpo' reads batch.ref_logprob, got None"):
        linear_policy_loss(HIDDEN, WEIGHT, _batch(), objectives.grpo(beta=0.1))
    with pytest.raises(ValueError, match="has entropy_coef = 0.001 and needs entropy"):
        policy_loss(torch.zeros(N), None, _batch(), objectives.trapo())
    with pytest.raises(ValueError, match=r"\[0, 7\).*got 10 at row 3"):
        linear_policy_loss(HIDDEN, WEIGHT, _batch(target=TARGET + 7 * (TARGET == 3)), objectives.sft())


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (
            objectives.grpo(),
            {"advantage": torch.tensor([1.0, float("nan"), 1, 1])},
            "batch.advantage .* got nan at row 1. Check the",
        ),
        (objectives.grpo(), {"old_logprob": torch.tensor([0.0, 0, float("nan"), 0])}, "batch.old_logprob .* got nan at row 2"),
        (
            objectives.grpo(beta=0.1),
            {"ref_logprob": torch.tensor([0.0, 0, 0, -float("inf")])},
            "batch.ref_logprob .* got -inf at row 3",
        ),
        (
            objectives.grpo(),
            {"old_logprob": torch.tensor([0.0, 1e-4, 2.5, 0])},
            "must hold logprobs, .* got 2.5 at row 2. Pass log p",
        ),
        (
            objectives.luffy(),
            {"advantage": torch.full((N,), float("nan")), "role": torch.full((N,), 2, dtype=torch.uint8)},
            "advantage",
        ),
        (objectives.sft(), {"advantage": torch.full((N,), float("nan"))}, None),  # which it does not read
        (objectives.grpo(), {"advantage": torch.full((N,), float("nan")), "weight": torch.zeros(N)}, None),
    ],
)
def test_a_stream_must_be_finite_where_it_is_read(objective, changes, message):
    batch = _batch(**{"role": torch.full((N,), 2, dtype=torch.uint8)} | changes if objective.expert else changes)
    if message is None:
        unread = dataclasses.replace(batch, advantage=torch.ones(N))
        loss = linear_policy_loss(HIDDEN, WEIGHT, batch, objective).loss
        assert torch.equal(loss, linear_policy_loss(HIDDEN, WEIGHT, unread, objective).loss)
        return
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(HIDDEN, WEIGHT, batch, objective)
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(N), torch.zeros(N), batch, objective)


def test_an_advantage_is_needed_where_a_term_reads_it_and_nowhere_else():
    expert = torch.full((N,), 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'grpo' reads batch.advantage, got None. Pass TokenBatch\(..., advantage=...\)"):
        linear_policy_loss(HIDDEN, WEIGHT, _batch(advantage=None), objectives.grpo())
    for objective in (objectives.sft(), objectives.trsft(), objectives.psft()):
        without, given = (
            linear_policy_loss(HIDDEN, WEIGHT, _batch(role=expert, old_logprob=-torch.ones(N), **more), objective)
            for more in ({"advantage": None}, {"advantage": torch.full((N,), 7.0)})
        )
        assert torch.equal(without.loss, given.loss)


@pytest.mark.parametrize(
    ("objective", "role", "named"),
    [
        (objectives.sft(), 1, "EXPERT"),
        (objectives.grpo(), 2, "ROLLOUT"),
        (objectives.trapo(), 1, None),
        (objectives.sft(), 0, None),
    ],
    ids=["sft", "grpo", "trapo", "ignored"],
)
def test_a_batch_that_trains_nothing_is_said(objective, role, named):
    """As with the mask of an SFT cast to uint8, which makes every token a rollout."""
    batch = _batch(role=torch.full((N,), role, dtype=torch.uint8))
    with pytest.warns(UserWarning) if named else contextlib.nullcontext() as said, warnings.catch_warnings():
        warnings.simplefilter("always" if named else "error")
        linear_policy_loss(HIDDEN, WEIGHT, batch, objective)
    assert not named or f"trains tokens of role {named}, of which this batch has none" in str(said[0].message)


def test_a_0d_temperature_stands_for_all_rows():
    def run(temperature):
        return [
            linear_logprob(HIDDEN, WEIGHT, TARGET, temperature=temperature).logprob,
            token_logprob(HIDDEN @ WEIGHT.T, TARGET, temperature=temperature).logprob,
            linear_policy_loss(HIDDEN, WEIGHT, _batch(), objectives.trapo(), temperature=temperature).loss,
        ]

    assert all(map(torch.equal, run(torch.tensor(0.7)), run(torch.full((N,), 0.7))))


def test_a_dtensor_is_refused_with_the_ways_out():
    class Shard(torch.Tensor):
        placements, full_tensor = (), None

    with pytest.raises(TypeError, match=r"lm_head_weight must be a plain tensor, got a DTensor.*unsharded\(\.\.\.\) of it"):
        linear_logprob(HIDDEN, WEIGHT.as_subclass(Shard), TARGET)
    with pytest.raises(TypeError, match=r"hidden must be a plain tensor, got a DTensor. Pass hidden.full_tensor\(\).$"):
        linear_logprob(HIDDEN.as_subclass(Shard), WEIGHT, TARGET)
    with pytest.raises(TypeError, match="LoraHead: a must be a plain tensor"):
        LoraHead(torch.ones(2, D).as_subclass(Shard), torch.ones(V, 2))

    def shard(x):
        return x.as_subclass(Shard)

    logits, one, role = HIDDEN @ WEIGHT.T, torch.ones(N), torch.ones(N, dtype=torch.uint8)
    calls = {
        "linear_logprob: target": lambda: linear_logprob(HIDDEN, WEIGHT, shard(TARGET)),
        "linear_logprob: temperature": lambda: linear_logprob(HIDDEN, WEIGHT, TARGET, temperature=shard(one)),
        "token_logprob: logits": lambda: token_logprob(shard(logits), TARGET),
        "token_logprob: target": lambda: token_logprob(logits, shard(TARGET)),
        "token_logprob: temperature": lambda: token_logprob(logits, TARGET, temperature=shard(one)),
        "policy_loss: logprob": lambda: policy_loss(shard(-one), one, _batch(), objectives.sft()),
        "policy_loss: entropy": lambda: policy_loss(-one, shard(one), _batch(), objectives.sft()),
        "TokenBatch: target": lambda: _batch(target=shard(TARGET)),
        "TokenBatch: weight": lambda: _batch(weight=shard(one)),
        "aggregate: sequence_id": lambda: aggregate(role, shard(TARGET), mode="token_mean"),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got a DTensor. Pass .full_tensor\(\) of it.$"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear_logprob(HIDDEN, WEIGHT[None], TARGET),
            r"lm_head_weight must have shape \[V, D\], got \[1, 7, 3\]. Pass torch.nn.Linear\(D, V\).weight; one that ZeRO-3",
        ),
        (
            lambda: policy_loss(torch.zeros(N).bfloat16(), None, _batch(), objectives.sft()),
            r"got torch.bfloat16. Convert it with logprob.to\(torch.float32\).$",
        ),
        (
            lambda: linear_logprob(HIDDEN, WEIGHT, TARGET, temperature=torch.ones(N).half()),
            r"got torch.float16. Convert it with temperature.to\(torch.float32\).$",
        ),
        (
            lambda: aggregate(
                torch.ones(N, dtype=torch.uint8), TARGET, mode="token_mean", share=torch.ones(N, dtype=torch.bfloat16)
            ),
            r"got torch.bfloat16. Convert it with share.to\(torch.float32\).$",
        ),
        (
            lambda: aggregate(torch.ones(N, dtype=torch.uint8), TARGET, mode="length", max_tokens="5"),
            "needs an integer max_tokens > 0, got '5'",
        ),
    ],
)
def test_the_remedy_is_that_of_the_case(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_memory_can_be_found_out_without_values(device):
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        hidden, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((N, D), (V, D)))
        batch = _batch(**{name: torch.ones(N, device=device) for name in ("advantage", "weight")},
                       target=torch.zeros(N, dtype=torch.int64, device=device),
                       role=torch.ones(N, dtype=torch.uint8, device=device), old_logprob=torch.zeros(N, device=device))  # fmt: skip
        outputs = linear_logprob(hidden, weight, batch.target, with_entropy=True, backend="torch")
        loss = linear_policy_loss(hidden, weight, batch, objectives.trapo(), backend="torch").loss
        (outputs.logprob.sum() + outputs.entropy.sum() + loss).backward()
        assert outputs.logprob.shape == (N,) and weight.grad.shape == (V, D)


def test_an_entropy_that_is_not_known_is_in_no_metric():
    out = policy_loss(torch.zeros(N), None, _batch(), objectives.grpo())
    assert out.entropy is None and not [name for name in out.metrics if "entropy" in name] and "rollout/logprob" in out.metrics


def test_a_temperature_that_no_row_reads_may_be_anything():
    temperature, ignored = torch.tensor([1.0, 0.7, float("nan"), 0.0]), torch.tensor([0, 1, -100, -100])
    assert linear_logprob(HIDDEN, WEIGHT, ignored, temperature=temperature).logprob.isfinite().all()
    assert token_logprob(HIDDEN @ WEIGHT.T, ignored, temperature=temperature).logprob.isfinite().all()
    role = torch.tensor([1, 2, 0, 0], dtype=torch.uint8)
    assert linear_policy_loss(HIDDEN, WEIGHT, _batch(role=role), objectives.trapo(), temperature=temperature).loss.isfinite()


def test_token_logprob():
    with pytest.raises(ValueError, match=r"same leading shape, got \[4, 7\] and \[3\]"):
        token_logprob(torch.randn(N, V), TARGET[:3])
    with pytest.raises(TypeError, match="token_logprob: target must be a Tensor, got NoneType"):
        token_logprob(torch.randn(N, V), None)


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    message = 'backend="triton" cannot run: the tensors are on the CPU; set TRITON_INTERPRET=1 before importing trapo_kernels'
    with pytest.raises(RuntimeError, match=message):
        linear_logprob(HIDDEN, WEIGHT, TARGET, backend="triton")


def test_a_scored_row_without_a_role_has_its_target_checked():
    batch = TokenBatch(
        torch.tensor([99, 1]), torch.tensor([0, 1], dtype=torch.uint8), torch.ones(2), torch.ones(2), scored_rows=torch.tensor([0])
    )
    with pytest.raises(ValueError, match=r"target must lie in \[0, V\) = \[0, 5\).*got 99 at row 0"):
        linear_policy_loss(torch.randn(2, 4), torch.randn(5, 4), batch, objectives.grpo())


def test_numbers_of_another_library_are_named_with_the_remedy():
    half = numpy.float32(0.5)
    calls = (
        lambda: gates.Shape(half),
        lambda: Objective(expert=Term(gates.One()), entropy_coef=half),
        lambda: linear_logprob(HIDDEN, WEIGHT, TARGET, temperature=half),
        lambda: linear_logprob(HIDDEN, WEIGHT, TARGET, softcap=half),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"got np.float32\(0.5\). Pass float\(...\) of it."):
            call()
    for call in (
        lambda: objectives.trapo(alpha=torch.tensor(0.5)),  # in_range
        lambda: objectives.chord_mu(mu=torch.tensor(0.5)),
        lambda: Objective(expert=Term(gates.One()), entropy_coef=torch.tensor(0.5)),  # finite
        lambda: EntropyWeight(0.1, sign=torch.tensor(0.5)),  # one_of
        lambda: linear_logprob(HIDDEN, WEIGHT, TARGET, softcap=torch.tensor(0.5)),
    ):
        with pytest.raises(ValueError, match=r"got tensor\(0.5000\). Pass float\(...\) of it."):
            call()


@pytest.mark.parametrize(("target", "name"), [([0, 1, 2, 3], "list"), (TARGET.numpy(), "ndarray"), (None, "NoneType")])
def test_a_target_that_is_no_tensor(target, name):
    with pytest.raises(TypeError, match=f"^linear_logprob: target must be a Tensor, got {name}. Pass the token ids"):
        linear_logprob(HIDDEN, WEIGHT, target)


def test_a_0_d_target_and_totals_of_another_type():
    with pytest.raises(ValueError, match=r"target must have shape \[N\]"):
        linear_logprob(HIDDEN, WEIGHT, torch.tensor(1))
    role, sequence = torch.ones(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"totals must be a LossTotals, got int. Pass sum\(parts, LossTotals\(\)\) of the"):
        aggregate(role, sequence, mode="token_mean", totals=3)
    with pytest.raises(ValueError, match=r"role must be Role.IGNORED, ROLLOUT or EXPERT \(0, 1, 2\), got 3"):
        aggregate(role * 3, sequence, mode="token_mean")
    for given, said in ((3, r"int\. Pass objectives\.trapo\(\)"), (objectives.grpo, r"function\. Pass what it returns, grpo\(\)")):
        with pytest.raises(TypeError, match=rf"must be an Objective, got {said}\."):
            linear_policy_loss(HIDDEN, WEIGHT, None, given)


def test_a_share_of_nan_on_an_ignored_token_is_not_read():
    role = torch.tensor([0, 1], dtype=torch.uint8)
    weight = aggregate(role, torch.zeros(2, dtype=torch.int64), mode="token_mean", share=torch.tensor([float("nan"), 1.0]))
    assert weight.tolist() == [0.0, 1.0]
