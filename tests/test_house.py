"""Contract 8: imports flow one way, files stay small, kernels compile offline without spilling."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a module may import from this project: every arrow not listed here turns back and is refused.
ALLOWED = {
    "trapo_kernels/roles.py": set(),
    "trapo_kernels/checks.py": {"fsdp", "roles"},
    "trapo_kernels/rank_checks.py": {"checks"},
    "trapo_kernels/batch_checks.py": {"checks", "roles"},
    "trapo_kernels/batch.py": {"batch_checks", "checks", "roles", "weights"},
    "trapo_kernels/weights.py": {"batch_checks", "checks", "objective", "roles", "sequence"},
    "trapo_kernels/gates.py": {"checks"},
    "trapo_kernels/fsdp.py": set(),
    "trapo_kernels/heads.py": {"fsdp", "lora"},
    "trapo_kernels/lora.py": {"checks", "fsdp"},
    "trapo_kernels/memory.py": {"backends", "checks"},
    "trapo_kernels/metrics.py": {"checks"},
    "trapo_kernels/sequence.py": {"checks"},
    "trapo_kernels/corrections.py": {"checks", "roles", "sequence"},
    "trapo_kernels/objective.py": {"checks", "gates", "roles", "sequence"},
    "trapo_kernels/objectives": {"checks", "gates", "objective", "sequence", "objectives"},
    "trapo_kernels/terms.py": {"batch", "gates", "objective", "roles", "sequence"},
    "trapo_kernels/dispatch.py": {"checks", "backends"},
    "trapo_kernels/backends": {"terms", "objective", "batch", "checks", "rank_checks", "roles", "backends"},
    "trapo_kernels/autograd.py": {"dispatch", "terms", "backends"},
    "trapo_kernels/flops.py": {"autograd"},
    "trapo_kernels/doctor.py": {"TokenBatch", "Role", "dispatch", "linear_policy_loss", "objectives", "backends"},
    "trapo_kernels/outputs.py": set(),
    "trapo_kernels/inputs.py": {"checks", "dispatch", "lora", "backends"},
    "trapo_kernels/api.py": {
        *("autograd", "inputs", "checks", "batch_checks", "dispatch", "terms", "backends", "batch", "lora", "objective", "roles"),
        "outputs",
    },
    "trapo_kernels/huggingface.py": {"api", "batch", "checks", "dispatch", "fsdp", "heads", "objective", "roles", "weights"},
    "trapo_kernels/__init__.py": {
        *(
            "api",
            "batch",
            "corrections",
            "flops",
            "fsdp",
            "gates",
            "heads",
            "huggingface",
            "lora",
            "memory",
            "metrics",
            "objective",
            "objectives",
        ),
        *("outputs", "roles", "sequence", "weights"),
    },
}

# The packages and top-level files of the trainer, lowest first: one imports from lower lines, a package from itself, too. What is
# given to it from above it may name in annotations, under TYPE_CHECKING.
LAYERS = [
    "schema files metrics micro_batch random_states records",
    "config_file extras parallel schedules tasks user_code",
    "models",
    "step rewards reports",
    "checkpoints data",
    "engines",
    "rollouts",
    "evaluation",
    "config",
    "settings checks memory run",
    "trainer",
    "train",
    "demo dry_run",
    "cli",
    "__main__",
]


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


def _rooms(module, names, package):
    """The parts of a package that an import reaches."""
    parts = module.split(".")
    if parts[0] != package:
        return set()
    return {parts[1]} if len(parts) > 1 else set(names)


def _arrows(path, package="trapo_kernels"):
    return set().union(*(_rooms(module, names, package) for module, names in _imports(path)), set())


@pytest.mark.parametrize("path", sorted((ROOT / "trapo_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernel_imports_flow_one_way(path):
    name = str(path.relative_to(ROOT))
    room = "/".join(name.split("/")[:2])
    assert room in ALLOWED, f"{name} is a new room of the house: say in ALLOWED what it may import"
    assert _arrows(path) <= ALLOWED[room], f"{name} imports {_arrows(path) - ALLOWED[room]}: that arrow turns back"
    others = ["trapo_train", "benchmarks"] + ["transformers"] * (
        name != "trapo_kernels/huggingface.py"
    )  # which is handed its model
    assert not any(module.startswith(tuple(others)) for module, _ in _imports(path))


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


@pytest.mark.parametrize("path", sorted((ROOT / "trapo_train").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_trainer_imports_flow_down(path):
    name = path.relative_to(ROOT / "trapo_train")
    room = name.with_suffix("").parts[0]
    height = {part: i for i, line in enumerate(LAYERS) for part in line.split()}
    assert room in [*height, "__init__"], f"{name} is in no layer: say in LAYERS what it stands on"
    within = {room} if len(name.parts) > 1 else set()
    for other in _arrows(path, "trapo_train") - within:
        assert height[other] < height[room], f"{name} imports {other}, which is not below {room} in LAYERS: that arrow turns back"


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
    folders = ("trapo_kernels", "trapo_train", "benchmarks", "examples", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines; split it by job"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.name != "api.py":  # whose length is docstrings
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.name}:{node.name} has {length} lines"


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


def _map(package):
    """(folder, file) of every file that the map in a package's README names; "" where its first column names no folder."""
    (rows,) = re.findall(r"^\|---\|---\|---\|\n(.*?)\n\n", (ROOT / package / "README.md").read_text(), re.S | re.M)
    folder = ""
    for row in rows.splitlines():
        _, area, files, _ = row.split("|", 3)
        folder = "".join(re.findall(r"`(\w+)/`", area)) or folder
        yield from ((folder, file) for file in re.findall(r"`(\w+\.py)`", files))


def test_the_map_of_the_trainer_names_every_file_once_and_in_its_folder():
    there = [path.relative_to(ROOT / "trapo_train") for path in (ROOT / "trapo_train").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(_map("trapo_train")) == sorted((path.parent.name, path.name) for path in there if path.parent.name != "tasks")


def test_the_map_of_the_kernels_names_every_file_once():
    there = [path.name for folder in ("", "backends") for path in (ROOT / "trapo_kernels" / folder).glob("*.py")]
    assert sorted(file for _, file in _map("trapo_kernels")) == sorted(name for name in there if name != "__init__.py")
