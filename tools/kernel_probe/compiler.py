"""Compile one Triton kernel for a GPU that need not be there, and read the machine code that comes out."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from kernel_probe import amd
from kernel_probe.census import census, kind
from kernel_probe.machines import MACHINES, occupancy
from kernel_probe.report import Report
from kernel_probe.sass import Instruction, cuobjdump, find_loops, parse, resources

PROMISES = {"16": ["tt.divisibility", 16], "range32": ["tt.pointer_range", 32]}
TENSOR_LOOP_SPECIALS = 8  # this many exponentials mark the softmax partition of a warp-specialised kernel


def gpu_target(arch: str) -> Any:
    """Triton's name of a chip: "sm_90" or "gfx942". The 8.6 generation runs the code of 8.0."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", {"sm_86": 80}.get(arch) or int(arch.removeprefix("sm_")), 32)


def compile_kernel(
    fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any], arch: str, warps: int, stages: int,
    options: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """Triton's compiled kernel. signature: name to "<type>[:promises]" or "None", as in the registry's KernelSpec;
    constants: tl.constexpr arguments.

    Raises KeyError for an argument that has neither a type nor a value.
    """
    import triton

    while not isinstance(fn, triton.runtime.jit.JITFunction):
        fn = fn.fn  # autotuners and heuristics wrap the function
    types: dict[str, str] = {}
    values: dict[Any, Any] = {}
    attributes: dict[Any, list[list[Any]]] = {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            types[name], values[name] = "constexpr", constants[name]
            continue
        if name not in signature:
            raise KeyError(f"no type or constant for argument {name!r} of {fn.__name__}")
        base, _, promises = str(signature[name]).partition(":")
        if promises == "1" or base == "None":
            types[name], values[name] = "constexpr", 1 if promises else None
            continue
        types[name] = base
        attributes[(i,)] = [PROMISES[promise] for promise in promises.split(",") if promise]
    source = triton.compiler.ASTSource(fn=fn, signature=types, constexprs=values, attrs=attributes)
    settings = {"enable_fp_fusion": True, "num_warps": warps, "num_stages": stages, **(options or {})}
    return triton.compile(source, target=gpu_target(arch), options=settings)


def probe(
    fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any], *, arch: str = "sm_90", num_warps: int = 4,
    num_stages: int = 3, name: str | None = None, options: Mapping[str, Any] | None = None,
) -> Report:  # fmt: skip
    """Compile for `arch` ("sm_90", "gfx942") and analyse."""
    start = time.perf_counter()
    kernel = compile_kernel(fn, signature, constants, arch, num_warps, num_stages, options)
    compile_s = time.perf_counter() - start
    name = name or getattr(fn, "__name__", "kernel")
    analyse = amd.analyse if arch.startswith("gfx") else _analyse
    report = analyse(kernel, name, arch, num_warps, num_stages)
    report.compile_s = round(compile_s, 2)
    return report


def _analyse(kernel: Any, name: str, arch: str, num_warps: int, stages: int) -> Report:
    sm = int(arch.removeprefix("sm_"))
    machine = MACHINES[sm]
    cubin, ptx = kernel.asm["cubin"], kernel.asm["ptx"]
    code = parse(cuobjdump(cubin, "-sass"))
    used = resources(cuobjdump(cubin, "-res-usage"))
    notes: list[str] = []
    match = re.search(r"\.reqntid (\d+)", ptx) or re.search(r"\.maxntid (\d+)", ptx)
    warps = int(match[1]) // 32 if match else num_warps
    if warps != num_warps:
        notes.append(f"warp specialised: {warps} warps launched for num_warps={num_warps}")
    tcgen05_flop = _tcgen05_mean_flop(ptx)
    loops = []
    for body in _tensor_loops(code):
        blackwell = sum(i.base == "UTCHMMA" for i in body)
        loop = census(body, machine, blackwell * tcgen05_flop / warps)
        loop["wgmma_groups"] = sum("gsb0" in i.arguments for i in body if i.base == "HGMMA")
        loops.append(loop)
        notes += _loop_notes(body, loop, sm, blackwell, tcgen05_flop)
    shared = used["static_shared"] + int(getattr(kernel.metadata, "shared", 0) or 0)
    if sm >= 90 and used["static_shared"] == 1024:
        shared -= 1024  # the driver's reserved KiB, which occupancy() counts already
    ctas, resident_warps, limiter = occupancy(machine, used["registers"], warps, shared)
    totals = {key: value for key, value in census(code, machine).items() if isinstance(value, int)}
    return Report(
        name, arch, warps, stages, used["registers"], totals["local"], used["local"], shared, ctas, resident_warps,
        limiter, totals, loops, sorted(set(notes)),
        serialised=sum(map(_serialised, loops)),
        unpipelined=sum(bool(p["mma"] and p["load"] and not p["cp_async"] and not p["tma"]) for p in loops),
        widest_load=widest_load(code),
    )  # fmt: skip


def widest_load(code: list[Instruction]) -> int:
    """Bytes a lane of the widest global load (asynchronous ones included); 0 without any."""
    widths = [0]
    for instruction in code:
        if kind(instruction) in ("load", "cp_async"):
            match = re.search(r"\.(64|128|256)\b", instruction.opcode)
            widths.append(int(match[1]) // 8 if match else 4)
    return max(widths)


def _tensor_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with matrix instructions or a softmax; loops that only wait are left out."""

    def counts(loop: list[int]) -> bool:
        kinds = [kind(code[i]) for i in loop]
        return "mma" in kinds or kinds.count("special") >= TENSOR_LOOP_SPECIALS

    loops = [loop for loop in find_loops(code) if counts(loop)]
    return [[code[i] for i in loop] for loop in loops if not any(set(other) < set(loop) for other in loops)]


def _serialised(loop: dict[str, Any]) -> bool:
    """Every wgmma its own wait group: the assembler found an accumulator touched while in flight."""
    return loop["wgmma_groups"] > 4 and loop["wgmma_groups"] == loop["mma"]


def _loop_notes(
    body: list[Instruction], loop: dict[str, Any], sm: int, blackwell: int, tcgen05_flop: float
) -> list[str]:
    notes = []
    if _serialised(loop):
        notes.append(f"wgmma serialised: {loop['mma']} products, each its own wait group")
    if sm >= 90 and any(i.base == "HMMA" for i in body):
        notes.append("mma.sync on sm_90 or later: it cannot reach the rate that the tensor cycles assume")
    if blackwell:
        notes.append("tcgen05: mean FLOP of the kernel's products, spread over its warps" if tcgen05_flop else "")
    if loop["mma"] and loop["load"] and not loop["cp_async"] and not loop["tma"]:
        notes.append("a tensor loop reads global memory with plain loads: not pipelined")
    if loop["local"]:
        notes.append(f"a tensor loop holds {loop['local']} spill instructions")
    return [note for note in notes if note]


def _tcgen05_mean_flop(ptx: str) -> float:
    """Mean FLOP of the tcgen05 products: their shape is an instruction-descriptor constant in the PTX."""
    constants = dict(re.findall(r"mov\.[bus]32\s+(%r\d+),\s*(-?\d+);", ptx))
    found = []
    for descriptor in re.findall(r"tcgen05\.mma\.cta_group::\d\.kind::f16[^;]*?,\s*(%r\d+|\d+),\s*%p", ptx):
        value = constants.get(descriptor, descriptor)
        if value.lstrip("-").isdigit():
            bits = int(value) & 0xFFFFFFFF
            found.append(2.0 * (((bits >> 24) & 31) << 4) * (((bits >> 17) & 63) << 3) * 16)
    return sum(found) / len(found) if found else 0.0
