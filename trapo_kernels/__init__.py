"""Fused kernels for RL/SFT post-training: logprobs, entropy and policy losses from hidden states, a chunk of logits at a time."""

from trapo_kernels import corrections, flops, gates, objectives, sequence  # noqa: F401  flops registers its formulas
from trapo_kernels.api import linear_logprob, linear_policy_loss, policy_loss, token_logprob
from trapo_kernels.batch import TokenBatch
from trapo_kernels.fsdp import unsharded
from trapo_kernels.gates import Gate
from trapo_kernels.heads import head_options
from trapo_kernels.huggingface import fuse_loss
from trapo_kernels.lora import LoraHead
from trapo_kernels.memory import LEAST_KEPT_BYTES, free_kept_memory, head_memory
from trapo_kernels.metrics import merged_metrics, metric_count
from trapo_kernels.objective import KL, Objective, Term
from trapo_kernels.outputs import LogprobOutput, PolicyLossOutput
from trapo_kernels.roles import IGNORE_INDEX, Role
from trapo_kernels.weights import LossTotals, aggregate, loss_totals, silenced_weight

__all__ = [
    "IGNORE_INDEX",
    "KL",
    "LEAST_KEPT_BYTES",
    "Gate",
    "LogprobOutput",
    "LoraHead",
    "LossTotals",
    "Objective",
    "PolicyLossOutput",
    "Role",
    "Term",
    "TokenBatch",
    "aggregate",
    "corrections",
    "free_kept_memory",
    "fuse_loss",
    "gates",
    "head_memory",
    "head_options",
    "linear_logprob",
    "linear_policy_loss",
    "loss_totals",
    "merged_metrics",
    "metric_count",
    "objectives",
    "policy_loss",
    "sequence",
    "silenced_weight",
    "token_logprob",
    "unsharded",
]
