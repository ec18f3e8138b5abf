"""Does every Triton kernel compile for sm_80 to sm_120 without spilling registers? Needs no GPU.

    python -m benchmarks.offline_compile > benchmarks/results/offline_compile.md    # registers, spills, shared memory, wide loads
    python -m benchmarks.offline_compile --json                                     # the same as JSON lines

Each kernel is compiled once per architecture for variants that real calls use: transforms plain and with everything on, and the
heaviest gates with the latter; on the GPUs of data centres also the gates of every preset, and every gate by itself.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OF_DATA_CENTRES = (80, 90, 100)
# Bytes per block, CUDA programming guide, table 24.
SHARED_MEMORY_LIMIT = {sm: 1024 * kib for sm, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))}
# The PTX a fused GEMM must contain.
TENSOR_CORE = dict.fromkeys((80, 86, 89, 120), "mma.sync") | {90: "wgmma.mma_async", 100: "tcgen05.mma"}
# These read shared memory past the generic proxy: what asynchronous copies wrote there they see behind a fence alone.
BEHIND_A_FENCE = ("wgmma.mma_async", "tcgen05.mma")


class Variant(NamedTuple):
    """A kernel as a call compiles it; `fp32` names pointers that `_type_of` says are bf16."""

    label: str
    kernel: object
    constexprs: dict[str, object]
    fp32: tuple[str, ...] = ()


def variants(architecture: int) -> Iterator[Variant]:
    """Every compiled variant, with the tiles of the architecture."""
    import torch

    from trapo_kernels import objectives, terms
    from trapo_kernels.backends.triton_ops import row_gradient, row_policy, row_statistics, scale, token_coefficient
    from trapo_kernels.backends.triton_ops.fused_scoring import fused_scoring_kernel, tile_of
    from trapo_kernels.backends.triton_ops.launch import TILE
    from trapo_kernels.objective import GATES

    plain = {"HAS_BIAS": False, "HAS_ROW_TEMPERATURE": False, "HAS_SOFTCAP": False, "BLOCK_V": TILE["BLOCK_V"]}
    full = {"HAS_BIAS": True, "HAS_ROW_TEMPERATURE": True, "HAS_SOFTCAP": True, "BLOCK_V": TILE["BLOCK_V"]}
    for name, transform in (("plain", plain), ("bias+temperature+softcap", full)):
        for entropy in (False, True):
            label = f"{name}{', entropy' if entropy else ''}"
            yield Variant(f"row_statistics ({label})", row_statistics.row_statistics_kernel, transform | {"WITH_ENTROPY": entropy})
            yield Variant(f"row_gradient ({label})", row_gradient.row_gradient_kernel, transform | {"WITH_ENTROPY": entropy})
    for dtype, fp32 in ((torch.bfloat16, ()), (torch.float32, ("hidden_ptr", "weight_ptr", "bias_ptr"))):
        tile, name = tile_of(dtype, architecture // 10), "fp32" if fp32 else "bf16"
        for more, on in (("", False), (", bias+temperature+softcap", True)):
            flags = {"HAS_BIAS": on, "HAS_ROW_TEMPERATURE": True, "HAS_SOFTCAP": on}
            yield Variant(f"fused_scoring ({name}{more})", fused_scoring_kernel, flags | tile, fp32)
    heaviest = {"EXPERT_GATE": 9, "ROLLOUT_GATE": 9, "KL_CODE": 4, "WITH_ENTROPY_GRADIENT": True, "WITH_GRADIENT": True}
    yield Variant("row_policy (sapo/sapo, k3_corrected, bias+temperature+softcap)", row_policy.row_policy_kernel, full | heaviest)
    yield Variant("scale (in place, bf16)", scale.scale_kernel, {"IN_PLACE": True, **scale.TILE})
    yield Variant("scale (fp32 to bf16)", scale.scale_kernel, {"IN_PLACE": False, **scale.TILE}, ("grad_ptr",))
    if architecture not in OF_DATA_CENTRES:  # gates change a few registers, and take long to compile
        return
    presets: dict[tuple[int, ...], list[str]] = {}  # presets with the same gates are the same compiled kernel
    for preset in objectives.PRESETS.values():
        objective = preset(entropy_coef=0.001)
        presets.setdefault(tuple(terms.encode(objective)[0]), []).append(objective.name)
    for codes, names in presets.items():
        gates = dict(zip(("EXPERT_GATE", "ROLLOUT_GATE", "KL_CODE"), codes, strict=True))
        flags = {"WITH_ENTROPY_GRADIENT": True, "WITH_GRADIENT": True}
        yield Variant(f"row_policy ({', '.join(names)})", row_policy.row_policy_kernel, plain | gates | flags)
    for code, gate in GATES.items():
        codes = {"EXPERT_GATE": code, "ROLLOUT_GATE": code, "KL_CODE": 4, **token_coefficient.TILE}
        yield Variant(f"token_coefficient ({gate.__name__.lower()})", token_coefficient.token_coefficient_kernel, codes)


def compile_one(variant: Variant, architecture: int) -> dict[str, object]:
    """Registers, stack (bytes), spills, shared memory (bytes), wide loads, tensor-core instruction, asynchronous copies, fences of
    one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trapo_kernels.backends.triton_ops.launch import TILE

    launch = ("num_warps", "num_stages", "enable_fp_fusion")
    kernel, constexprs = variant.kernel, variant.constexprs
    options = {k: v for k, v in ({} if "BLOCK_N" in constexprs else TILE).items() if k in launch}
    options |= {k: constexprs[k] for k in launch if k in constexprs}
    constexprs = {k: v for k, v in constexprs.items() if k not in launch}
    signature = {name: "*fp32" if name in variant.fp32 else _type_of(name) for name in kernel.arg_names}
    # HeadGemm.buffer pads row strides to 64 bytes, and D of every model is a multiple of 16. V may be odd: it has no such hint.
    aligned = ("row_stride", "grad_row_stride", "hidden_stride", "weight_stride", "hidden_size", "num_elements")
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    used = TENSOR_CORE[architecture] if TENSOR_CORE[architecture] in ptx else "-"
    vector = len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v8\.b32|ld\.global\S*\.v2\.b64", ptx))
    more = {"shared_bytes": compiled.metadata.shared, "vector_loads": vector, "tensor_core": used}
    more |= {"async_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)), "fences": ptx.count("fence.proxy.async")}
    return _resources(compiled.asm["cubin"]) | more


def _type_of(argument: str) -> str:
    if argument.isupper() and not re.fullmatch(r"[er]\d", argument):
        return "constexpr"
    if argument.endswith("_ptr"):
        special = {"target_ptr": "*i64", "role_ptr": "*u8", "grad_ptr": "*bf16", "out_ptr": "*bf16", "bias_ptr": "*bf16"}
        special |= {"hidden_ptr": "*bf16", "weight_ptr": "*bf16"}
        return special.get(argument, "*fp32")
    counts = ("vocab_size", "num_tokens", "num_rows", "hidden_size", "tiles_per_split")
    if argument == "num_elements":
        return "i64"
    return "i32" if argument.endswith("stride") or argument in counts else "fp32"


def _resources(cubin: bytes) -> dict[str, int]:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
        fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        sass = ""  # which takes as long as compiling: a kernel without local memory has no place to spill to
        if fields["STACK"] or fields["LOCAL"]:
            sass = subprocess.run([tool, "--dump-sass", file.name], check=True, capture_output=True, text=True).stdout
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": fields["REG"], "stack_bytes": fields["STACK"] + fields["LOCAL"], "spill_instructions": spills}


def table() -> list[dict[str, object]]:
    """One row per kernel variant and architecture."""
    of_kernel: dict[str, list[dict[str, object]]] = {}
    for architecture in ARCHITECTURES:
        for variant in variants(architecture):
            row = {"kernel": variant.label, "sm": architecture} | compile_one(variant, architecture)
            of_kernel.setdefault(variant.label, []).append(row)
    return [row for rows in of_kernel.values() for row in rows]


def _is_sound(row: dict[str, object]) -> bool:
    fits = row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["sm"]]
    on_tensor_cores = row["tensor_core"] != "-" or not row["kernel"].startswith("fused_scoring (bf16")
    in_vectors = row["vector_loads"] > 0 or not row["kernel"].startswith(("row_", "scale"))
    in_order = row["fences"] > 0 or not row["async_copies"] or row["tensor_core"] not in BEHIND_A_FENCE
    return fits and on_tensor_cores and in_vectors and in_order and not row["spill_instructions"] and not row["stack_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a Markdown table")
    as_json = parser.parse_args().json
    rows = table()
    columns = list(rows[0])
    if not as_json:
        print(f"`python -m benchmarks.offline_compile`, triton {version('triton')}, {len(rows)} compiles\n")
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print(json.dumps(row) if as_json else "| " + " | ".join(str(row[column]) for column in columns) + " |")
    bad = [row for row in rows if not _is_sound(row)]
    for row in bad:
        print(
            f"spills, does not fit, loads element by element, misses the tensor cores or a fence before them: {row}",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
