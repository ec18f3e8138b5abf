"""The few names of verl 0.9 that examples/verl_head.py replaces, where verl itself is not installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

from torch import nn


class FusedLinearForPPO(nn.Module):
    """Logits in the dtype of the hidden states, statistics in fp32, the entropy rounded to that dtype."""

    def __init__(self, impl_backend="torch"):
        super().__init__()
        self.impl_backend = impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logits = hidden_states @ vocab_weights.t() / temperature
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, input_ids[..., None])[..., 0], entropy.to(logits.dtype)


def fused_forward(self, input_ids=None, temperature=1.0, return_dict=None, shift_labels=None, **given):
    hidden = self.model(input_ids=input_ids, **given)[0]
    labels = input_ids.roll(-1, -1) if shift_labels is None else shift_labels
    log_probs, entropy = FusedLinearForPPO(self._verl_fused_kernels_backend).forward(
        hidden_states=hidden, vocab_weights=self.lm_head.weight, input_ids=labels, temperature=temperature
    )
    return SimpleNamespace(log_probs=log_probs, entropy=entropy)


def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
    if use_fused_kernels:
        model._verl_fused_kernels_backend = fused_kernels_backend
        type(model).forward = fused_forward


def install():
    """Make `import verl` give these names, unless it gives verl's own."""
    if importlib.util.find_spec("verl") is not None:
        return
    for name in ("verl", "verl.models", "verl.models.transformers", "verl.utils", "verl.utils.experimental"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []  # a package
    head, patches = ModuleType("verl.utils.experimental.torch_functional"), ModuleType("verl.models.transformers.monkey_patch")
    head.FusedLinearForPPO, patches.patch_forward_with_backends = FusedLinearForPPO, patch_forward_with_backends
    sys.modules |= {head.__name__: head, patches.__name__: patches}
    sys.modules["verl.models.transformers"].monkey_patch = patches


def uninstall():
    """Leave no stand-in behind."""
    if getattr(sys.modules["verl"], "__spec__", None) is None:  # which verl's own has
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]
