"""Contract 8: imports flow one way, files stay small, README's Python runs, kernels compile offline without spilling."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import trapo_kernels

ROOT = Path(__file__).parents[1]

# What a module may import from this project: every arrow not listed here turns back and is refused.
ALLOWED = {
    "trapo_kernels/roles.py": set(),
    "trapo_kernels/checks.py": {"roles"},
    "trapo_kernels/batch_checks.py": {"checks", "roles"},
    "trapo_kernels/batch.py": {"batch_checks", "checks", "roles", "weights"},
    "trapo_kernels/weights.py": {"batch_checks", "checks", "objective", "roles", "sequence"},
    "trapo_kernels/gates.py": {"checks"},
    "trapo_kernels/heads.py": set(),
    "trapo_kernels/lora.py": {"checks"},
    "trapo_kernels/memory.py": {"backends", "checks"},
    "trapo_kernels/metrics.py": {"checks"},
    "trapo_kernels/sequence.py": {"checks"},
    "trapo_kernels/corrections.py": {"checks", "roles", "sequence"},
    "trapo_kernels/objective.py": {"checks", "gates", "roles", "sequence"},
    "trapo_kernels/objectives": {"checks", "gates", "objective", "sequence", "objectives"},
    "trapo_kernels/terms.py": {"batch", "gates", "objective", "roles", "sequence"},
    "trapo_kernels/dispatch.py": {"checks", "backends"},
    "trapo_kernels/backends": {"terms", "objective", "batch", "checks", "roles", "backends"},
    "trapo_kernels/autograd.py": {"dispatch", "terms", "backends"},
    "trapo_kernels/flops.py": {"autograd"},
    "trapo_kernels/doctor.py": {"TokenBatch", "Role", "dispatch", "linear_policy_loss", "objectives", "backends"},
    "trapo_kernels/inputs.py": {"checks", "dispatch", "lora", "backends"},
    "trapo_kernels/api.py": {
        *("autograd", "inputs", "checks", "batch_checks", "dispatch", "terms", "backends", "batch", "lora", "objective", "roles"),
    },
    "trapo_kernels/__init__.py": {
        *("api", "batch", "corrections", "flops", "gates", "heads", "lora", "memory", "metrics", "objective", "objectives"),
        *("roles", "sequence", "weights"),
    },
}


def _imports(path):
    """(module, names) of every import at run time; `if TYPE_CHECKING:` blocks draw no arrow."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def _rooms(module, names):
    """The parts of trapo_kernels that an import reaches."""
    parts = module.split(".")
    if parts[0] != "trapo_kernels":
        return set()
    return {parts[1]} if len(parts) > 1 else set(names)


def _arrows(path):
    return set().union(*(_rooms(module, names) for module, names in _imports(path)), set())


@pytest.mark.parametrize("path", sorted((ROOT / "trapo_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernel_imports_flow_one_way(path):
    name = str(path.relative_to(ROOT))
    room = "/".join(name.split("/")[:2])
    assert room in ALLOWED, f"{name} is a new room of the house: say in ALLOWED what it may import"
    assert _arrows(path) <= ALLOWED[room], f"{name} imports {_arrows(path) - ALLOWED[room]}: that arrow turns back"
    assert not any(module.startswith(("trapo_train", "benchmarks", "transformers")) for module, _ in _imports(path))


def test_the_check_refuses_an_arrow_that_turns_back(tmp_path):
    bad = tmp_path / "checks.py"
    bad.write_text("from trapo_kernels import api\nimport trapo_kernels.autograd\n")
    assert _arrows(bad) == {"api", "autograd"}
    assert not _arrows(bad) <= ALLOWED["trapo_kernels/checks.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "trapo_train").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_trainer_uses_public_names_only(path):
    import trapo_kernels

    for module, names in _imports(path):
        assert not module.startswith("trapo_kernels."), f"{path.name} reaches into {module}"
        if module == "trapo_kernels":
            assert set(names) <= set(trapo_kernels.__all__), f"{path.name} imports {set(names) - set(trapo_kernels.__all__)}"


def test_only_dispatch_reads_the_environment():
    readers = [p.name for p in (ROOT / "trapo_kernels").rglob("*.py") if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert readers == ["dispatch.py"]


def _errors(path):
    """(line, sentence with {} for what is filled in) of every error with a text that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = node.exc.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)


def test_errors_of_the_kernels_end_with_a_remedy():
    for path in (ROOT / "trapo_kernels").rglob("*.py"):
        for line, text in _errors(path):
            assert ", got " not in text or re.search(r", got .*\.( \S|\{)", text), f"{path.name}:{line} has no remedy: {text}"


def test_files_and_functions_stay_small():
    for path in [*(ROOT / "trapo_kernels").rglob("*.py"), *(ROOT / "trapo_train").rglob("*.py")]:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines; split it by job"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.name != "api.py":  # whose length is docstrings
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.name}:{node.name} has {length} lines"


def _readme_python():
    """The first example, what a head's logits go through, SFT, and of the kernels' page GRPO."""
    text = (ROOT / "README.md").read_text() + (ROOT / "trapo_kernels" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4, "a README has lost an example"
    return blocks


MODELS = {
    "Qwen2": {},
    "Phi": {},  # a bias
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "attn_implementation": "eager"},
    "Granite": {"logits_scaling": 0.5},
    "Cohere": {"logit_scale": 4.0},
}


def _model(name):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **shape, **tokens, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # logits that a cap and a scale change
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias, std=0.2)
    return model


def test_readme_python_runs(tmp_path):
    result = subprocess.run([sys.executable, "-c", _readme_python()[0]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MODELS)
def test_readme_sft_is_the_model_s_own_loss(name):
    _, head, sft, _ = _readme_python()
    model, input_ids = _model(name), torch.randint(3, 50, (2, 9))
    labels = torch.where(torch.arange(9) < 3, -100, input_ids)
    names = vars(trapo_kernels) | {"torch": torch, "model": model, "input_ids": input_ids, "labels": labels}
    exec(head + sft, names)
    torch.testing.assert_close(names["loss"], model(input_ids, labels=labels).loss)


@pytest.mark.parametrize("name", MODELS)
def test_readme_grpo_of_two_ranks_is_that_of_all_sequences(name):
    """Prompts of 4 tokens, padded on the left, completions of 6, on the right; ranks of 3 and 2 sequences in micro-batches of 2."""
    model = _model(name)
    prompt, response = torch.tensor([4, 2, 3, 4, 1]), torch.tensor([6, 3, 0, 5, 2])
    mask = (torch.arange(6) < response[:, None]).long()
    given = {
        "input_ids": torch.randint(3, 50, (5, 10)),
        "attention_mask": torch.cat([(torch.arange(4) >= 4 - prompt[:, None]).long(), mask], 1),
        "mask": mask,
        "old_logprob": -3.9 + 0.3 * torch.randn(5, 6),
        "ref_logprob": -3.9 + 0.3 * torch.randn(5, 6),
        "advantage": torch.randn(5),
    }
    weights = list(model.parameters())
    logits = model(given["input_ids"], given["attention_mask"]).logits[:, 3:-1]
    logprob = logits.log_softmax(-1).gather(-1, given["input_ids"][:, 4:, None])[..., 0]
    ratio, advantage = (logprob - given["old_logprob"]).exp(), given["advantage"][:, None]
    d = given["ref_logprob"] - logprob
    of_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.04 * (d.exp() - d - 1)
    expected = torch.autograd.grad(((of_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean(), weights)

    def all_reduce(counts):
        counts.copy_(torch.stack([mask.sum(), torch.tensor(len(mask))]))

    merged = []
    for rank in (slice(0, 3), slice(3, 5)):
        names = {"torch": torch, "model": model, "dist": SimpleNamespace(all_reduce=all_reduce), "world_size": 2}
        names |= {name: x[rank] for name, x in given.items()}
        exec("".join(_readme_python()[i] for i in (1, 3)), names)
        merged.append(names["metrics"])
    for weight, exact in zip(weights, expected, strict=True):
        mean = weight.grad / 2  # over ranks, as DDP takes it
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    whole = trapo_kernels.merged_metrics(merged)
    assert whole["rollout/count"] == mask.sum()
    torch.testing.assert_close(whole["rollout/ratio"].float(), ratio[mask > 0].mean().detach())


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_without_spilling():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline_compile"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    for architecture in ("80", "86", "89", "90", "100", "120"):
        assert f"| {architecture} |" in result.stdout
    for scoring in ("bf16", "fp32"):
        assert f"| fused_scoring ({scoring}) |" in result.stdout
    committed = (ROOT / "benchmarks" / "results" / "offline_compile.md").read_text()
    assert len(result.stdout.splitlines()) == len(committed.splitlines())
    if f"triton {version('triton')}," in committed:  # another triton compiles to other figures
        assert result.stdout == committed, "regenerate results/offline_compile.md"


@pytest.mark.parametrize(("package", "folders"), [("trapo_train", [""]), ("trapo_kernels", ["", "backends"])])
def test_the_map_of_a_package_names_every_file_once(package, folders):
    (rooms,) = re.findall(r"^\| area \|.*?\n\n", (ROOT / package / "README.md").read_text(), re.S | re.M)
    there = [path.name for folder in folders for path in (ROOT / package / folder).glob("*.py") if path.name != "__init__.py"]
    assert sorted(re.findall(r"`(\w+\.py)`", rooms)) == sorted(there)
