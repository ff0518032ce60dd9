"""Compile every Triton kernel to machine code without a GPU, and say what it needs.

    python -m tools.compile_kernels --json docs/results/gpu_kernels.json

Fails where a kernel needs more registers or spills more of them than its budget, where one that
promises the same bits everywhere fuses a product into a sum, and where one that promises tensor
cores has none.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100)
MAX_REGISTERS = 255
# Loads and stores of spilled registers a variant may have, by its name; with a reason each.
SPILLS = {
    # A few values are kept in local memory around subroutines (float64 division) or a loop's
    # start, most of them while registers are free.
    "rotate dim 32, inverse": 2,
    "store_pages 2 and 2 bits, dim 256": 2,
    "store_pages 2.5 and 2.5 bits, dim 128": 4,
    "store_pages 4 and 2.5 bits, dim 128": 4,
    "store_pages 3 and 3 bits, dim 64": 6,
    "store_pages 3.5 and 3.5 bits, dim 64": 2,
    "store_pages 4 and 4 bits, dim 64": 2,
    "encode_pages 4 bits, dim 256, key": 2,
    "path_vectors places, 4 bits, dim 80, key": 2,
    "path_vectors places, 4 bits, dim 200, key": 4,
    "search 2.5 bits, dim 128, key": 4,
    "search 2.5 bits, dim 128, value": 4,
    "decode 4 bits, dim 256": 5,
    "decode_pages 4 bits, dim 100, key": 2,
    "scores 5 bits, dim 128, 16 queries": 4,
    # Registers are full, and a few of the pool's strides
    # lie in local memory.
    "attend_pages 3.5 bits, dim 256, 8 rows": 6,
    "attend_pages 4 and 3 bits, dim 256, 8 rows": 4,
    "attend_pages trellis 4 bits, dim 64, 16 rows": 3,
    "attend_pages trellis 4 bits, dim 256, 8 rows": 5,
    "attend_pages trellis 4 and 3 bits, dim 256, 8 rows": 13,
}
# Those that Triton 3.8 (torch 2.14) adds, of the variants that stand for the rest; 3.9 has none.
SPILLS_BEFORE_39 = {"attend_pages 3 bits, dim 64, 8 rows, mask i1": 2}

# Strides of whole vectors, pages, heads and slots, by what their names begin with.
_ALIGNED = ("x", "page", "scale", "key", "value")
_VARIANTS = ("tests.kernels.triton_variants_vectors", "tests.kernels.triton_variants")
_TENSOR_CORES = re.compile(r"^\s*(?:@%\w+ )?(mma\.sync|wgmma\.mma|tcgen05\.mma)", re.MULTILINE)
# What would give other bits than separately rounded operations: fused ones, ones of a compiler's
# choice, and ones that flush small numbers to zero.
_INEXACT = re.compile(
    r"^\s*(?:@%\w+ )?(fma\.\w+\.f(?:32|64)|(?:mul|add|sub)\.f(?:32|64)"
    r"|(?:mul|add|sub|div|sqrt)\.[\w.]*(?:ftz|approx|full)[\w.]*)",
    re.MULTILINE,
)
_REGISTERS = re.compile(r"REG:(\d+)")
# Local memory is where spilled registers lie; a frame that no instruction touches is that of a
# division's subroutine.
_SPILLS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(?:LDL|STL)\b", re.MULTILINE)


def variants(everything: bool) -> Iterator[Any]:
    """The variants of every list there is; without `everything`, those that stand for the rest."""
    for name in _VARIANTS:
        module = importlib.import_module(name)
        yield from module.variants() if everything else module.representative()


def compiled(variant: Any, capability: int, fuse: bool = False) -> dict[str, Any]:
    """Compile one variant for one target and read what it needs from the machine code.

    With `fuse`, as Triton would compile it by itself.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, exact = variant.kernel, getattr(variant, "exact", False)
    types = variant.types | dict.fromkeys(variant.constants, "constexpr")
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {(position[name],): value for name, value in variant.constants.items()},
        # Tensors of torch are aligned, and so are strides of whole vectors or pages.
        {
            (position[name],): [["tt.divisibility", 16]]
            for name, kind in variant.types.items()
            if kind.startswith("*") or name.split("_")[0] in _ALIGNED
        },
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": fuse or not exact,
    }
    started = time.perf_counter()
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = result.asm["ptx"]
    registers, spills = _resources(result.asm["cubin"])
    return {
        "kernel": variant.name,
        "target": f"sm_{capability}",
        "registers": registers,
        "shared_bytes": result.metadata.shared,
        "spills": spills,
        "warps": variant.num_warps,
        "tensor_cores": sorted(set(_TENSOR_CORES.findall(ptx))),
        "inexact": sorted(set(_INEXACT.findall(ptx))) if exact else None,
        "expects_tensor_cores": variant.tensor_cores,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and instructions that load or store spilled ones."""
    usage, code = _cuobjdump(cubin, "--dump-resource-usage"), _cuobjdump(cubin, "--dump-sass")
    found = _REGISTERS.findall(usage)
    if not found or "EXIT" not in code:
        raise RuntimeError(f"cuobjdump does not say what the kernel uses: {usage!r}")
    return max(map(int, found)), len(_SPILLS.findall(code))


def _cuobjdump(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def spills_allowed(triton: str) -> dict[str, int]:
    """The budgets for a version of Triton."""
    old = tuple(map(int, triton.split(".")[:2])) < (3, 9)
    return SPILLS | (SPILLS_BEFORE_39 if old else {})


def problems(row: dict[str, Any], spills: dict[str, int] = SPILLS) -> list[str]:
    """What is beyond the budget of a compiled variant."""
    budget = spills.get(row["kernel"], 0)
    found = []
    if row["registers"] > MAX_REGISTERS:
        found.append(f"{row['registers']} registers, at most {MAX_REGISTERS}")
    if row["spills"] > budget:
        found.append(f"{row['spills']} loads and stores of spilled registers, at most {budget}")
    if row["inexact"]:
        found.append(f"promises separately rounded operations, has {', '.join(row['inexact'])}")
    if row["expects_tensor_cores"] and not row["tensor_cores"]:
        found.append("promises tensor cores, has none")
    return [f"{row['kernel']} for {row['target']}: {problem}" for problem in found]


def main() -> None:
    """Compile, print a line each, write the JSON, and exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--representative", action="store_true", help="one variant a way of work")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="as 80,90,100")
    parser.add_argument("--json", type=Path, help="write the list here")
    options = parser.parse_args()
    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    targets = [int(target) for target in options.targets.split(",")]
    wanted = [v for v in variants(not options.representative) if options.only in v.name]
    rows, wrong, spills = [], [], spills_allowed(triton.__version__)
    for variant in wanted:
        for target in targets:
            row = compiled(variant, target)
            rows.append(row)
            wrong += problems(row, spills)
            print(
                f"{row['kernel']:44} {row['target']:7} {row['registers']:3} registers "
                f"{row['shared_bytes']:6} B shared {row['spills']:3} spills "
                f"{' '.join(row['tensor_cores']) or '-'} {row['seconds']:5.1f} s",
                flush=True,
            )
    if options.json:
        results = {"triton": triton.__version__, "rows": by_kernel(rows)}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


def by_kernel(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is committed: a row a kernel, with what it needs on every target."""
    kernels: dict[str, dict[str, Any]] = {}
    for row in rows:
        kernel = kernels.setdefault(
            row["kernel"], {"kernel": row["kernel"], "warps": row["warps"], "targets": {}}
        )
        kept = ("registers", "shared_bytes", "spills", "tensor_cores")
        kernel["targets"][row["target"]] = {name: row[name] for name in kept}
    return list(kernels.values())


if __name__ == "__main__":
    main()
