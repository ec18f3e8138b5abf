"""A whole training step of a Qwen2.5-like model: what share is the head, and what does a user gain by changing it?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import clock, interleave, summary
from benchmarks.problem import Case, Problem, Result

ABOUT = __doc__
BODY = "body alone"
_PEERS = ("eager", "torch.compile", "TRL chunked logprob", "Liger scaled CE, sm_90", "verl")
_HEADS = (*_PEERS, "ours (triton)", "ours (native)", "ours (torch)")
# (layers, heads, key-value heads, intermediate size) by hidden size: Qwen2.5-1.5B's, and a toy with its proportions
_BODIES = {1536: (28, 12, 2, 8960), 256: (4, 4, 2, 1024), 32: (1, 2, 1, 64)}


def cases(device: str, small: bool) -> list[Case]:
    """TRAPO's loss on 8 sequences; random weights, because a step's cost does not depend on them."""
    shape = (48, 32, 264) if small else (16384, 1536, 151936) if device == "cuda" else (256, 256, 32768)
    dtype = "bfloat16" if device == "cuda" and not small else "float32"
    return [Case("step", "trapo", *shape, dtype, measure="step", contenders=_HEADS)]


def run(
    problem: Problem, heads: dict[str, Callable[[], Result]], device: str, seconds: float, announce: Callable[[str], None]
) -> tuple[dict[str, dict[str, object]], dict[str, Exception]]:
    """Figures per head, and the errors of heads that failed; a step is body forward, head both ways, body backward, AdamW."""
    body, optimizer = _model(problem, device)
    tokens = problem.batch.target.view(8, -1)
    calls = {BODY: _step(body, optimizer, tokens, problem, None)}
    calls |= {name: _step(body, optimizer, tokens, problem, head) for name, head in heads.items()}
    _, failed = interleave(calls, clock(device), 0.0, most=1, announce=announce)  # to warm up
    calls = {name: call for name, call in calls.items() if name not in failed}
    timings, more = interleave(calls, clock(device), seconds, most=9, announce=announce)
    found = {name: summary(timing, timings[BODY]) for name, timing in timings.items()}
    for figures in found.values():
        figures["head_share"] = 1.0 - 1.0 / figures["ratio"]
    return found, failed | more


def _model(problem: Problem, device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    from transformers import Qwen2Config, Qwen2Model

    case = problem.case
    layers, heads, key_value_heads, intermediate = _BODIES[case.hidden_size]
    config = Qwen2Config(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        max_position_embeddings=case.num_rows,
        use_cache=False,
    )
    body = Qwen2Model(config).to(device, getattr(torch, case.dtype)).train()
    parameters = [*body.parameters(), problem.weight]
    return body, torch.optim.AdamW(parameters, lr=1e-6, fused=device == "cuda")


def _step(
    body: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, problem: Problem, head: Callable | None
) -> Callable[[], None]:
    """A step with `head`; without one the body gets a constant gradient and the head's weight a zero one, so that the difference is
    the head's own work."""
    constant, nothing = torch.full_like(problem.hidden, 1e-4), torch.zeros_like(problem.weight)

    def step() -> None:
        hidden = body(input_ids=tokens).last_hidden_state.reshape(-1, problem.case.hidden_size)
        grad_hidden, problem.weight.grad = constant, nothing
        if head is not None:
            with torch.no_grad():
                problem.hidden.copy_(hidden)
            result = head()
            grad_hidden, problem.weight.grad = result.grad_hidden, result.grad_weight
        hidden.backward(grad_hidden)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
