"""Prints as JSON what Triton compiles the launches of every operator to, for each target: compute capabilities, gfx942.

Run by tests/test_triton_compile.py without Triton's interpreter. Nothing is launched.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from awd_fast.objective import SGD, Adam, Objective
from awd_fast.ops import (
    triton_adam,
    triton_backend,
    triton_combine,
    triton_descend,
    triton_gram,
    triton_multi_dot,
    triton_step,
)

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int64: "i64"}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
AMD = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
launches = {}


def record(label, *names):
    """From now on launches of the kernels of these names are kept, the first of each, and none is made."""

    def launch(kernel, programs, device, *arguments, threads, **constants):
        name = kernel.fn.__name__
        if name.removesuffix("_kernel") in names:
            launches.setdefault(
                f"{name} {label}", (kernel, arguments, threads, {"enable_fp_fusion": False} | constants)
            )

    for module in (triton_gram, triton_combine, triton_multi_dot, triton_descend, triton_step, triton_adam):
        module.launch = launch


def compiled(target, kernel, arguments, threads, constants):
    """Triton's own specialisation: sizes and addresses that 16 divides, sizes of 1."""
    fusion = constants.pop("enable_fp_fusion")
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[index] if index < len(arguments) else None
        if value is None or (not isinstance(value, torch.Tensor) and value == 1):
            signature[name], fixed[(index,)] = "constexpr", constants[name] if value is None else 1
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": max(1, threads // target.warp_size), "enable_fp_fusion": fusion}
    return triton.compile(source, target=target, options=options).asm


def read(tool, *arguments):
    command = [os.path.join(TOOLS, tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def seen(target, launch):
    asm = compiled(target, *launch)
    if target.backend == "hip":
        listing = asm["amdgcn"]
        usage = {name: int(re.search(rf"\.{name}:\s*(\d+)", listing)[1]) for name in AMD}
        atomics = re.findall(r"(?:global|flat|buffer)_atomic_[a-z0-9_]+", listing)
        return usage | {"registers": usage["vgpr_count"], "stack": usage[AMD[1]], "counts": dict.fromkeys(atomics, 1)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, listing = read("cuobjdump", "-res-usage", file.name), read("nvdisasm", "-c", file.name)
    counts = {}
    for instruction in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", listing, re.M):
        counts[instruction] = counts.get(instruction, 0) + 1
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    rounding = sorted(set(re.findall(r"cvt[a-z.]*\.bf16[a-z0-9.]*", asm["ptx"])))
    return {"registers": registers, "stack": stack, "local": local, "counts": counts, "rounding": rounding}


def record_launches(dtypes, tasks, amd):
    """Keeps the launches of every operator: of tensors of these dtypes, and of descents of these numbers of tasks."""
    launches.clear()
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        base, models = torch.zeros(256, 2048, dtype=dtype), [torch.zeros(256, 2048, dtype=dtype)] * K
        long = torch.zeros(4, 65536, dtype=dtype)
        state = [torch.zeros(256, 2048) for _ in range(3)]
        for groups in ("row", "column"):
            # Columns differ from rows little enough for one dtype to do.
            whole = groups == "row" or amd
            one = "combine" if dtype == torch.bfloat16 else "gram"
            names = ("gram", "combine", "multi_dot") if whole else (one,)
            record(f"{groups} {label}", *names)
            triton_backend.gram(base, models, groups)
            triton_backend.multi_dot(base, models, base, groups)
            triton_backend.combine(base, models, torch.zeros(256 if groups == "row" else 2048, K), groups, dtype)
        record(label, "step", "resident", "streaming")
        triton_backend.adam_step(base, models, *state, torch.zeros(K + 1, dtype=torch.float64), Adam(), 3, 0.0)
        triton_backend.adam_rows(base, models, Objective(), Adam(), "row")
        triton_backend.adam_rows(long, [long] * K, Objective(), Adam(), "row")
    for k in tasks:
        record(f"K={k}", "descend")
        triton_backend.descend(torch.zeros(256, k, k, dtype=torch.float64), Objective(), SGD())


# Compiling takes a second a kernel: all dtypes for one target, and for the others each kernel at one.
TARGETS = {
    "80": ((torch.float32, torch.bfloat16), (8, 32)),
    "90": ((torch.float32,), (32,)),
    "100": ((torch.bfloat16,), (8,)),
    "gfx942": ((torch.bfloat16,), (8, 32)),
}
K = 8
torch.set_num_threads(1)
found = {}
for name in sys.argv[1:]:
    amd = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name), 32)
    record_launches(*TARGETS[name], amd)
    found[name] = {kernel: seen(target, launch) for kernel, launch in launches.items()}
print(json.dumps(found))
