"""Compiles device functions in a process of its own: one toolkit, no interpreter, no GPU.

    python -m kernels.device FOLDER < jobs.json

Writes NAME.cubin, NAME.ptx and NAME.json into FOLDER for each named job. The parent is
`kernels.aot.compile`.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32  # threads
WAIT = re.compile(r"(?<=\n)(\tcp\.async\.wait_group .*;\n)")
FENCE = "\tfence.proxy.async.shared::cta;\n"


def fenced(ptx: str) -> str:
    """Adds the fences that Triton 3.6 leaves out between cp.async and wgmma (3.7 has them).

    A copy writes as a thread does and wgmma reads in the asynchronous proxy, so that whoever copied
    must issue a fence after its wait and before the barrier (PTX ISA 9.7.15.4). A wait that no
    wgmma follows before the next one needs none.
    """
    first, *waits = WAIT.split(ptx)
    pairs = zip(waits[::2], waits[1::2])  # a wait, and what follows it
    fences = ((wait, FENCE if "wgmma.mma_async" in rest else "", rest) for wait, rest in pairs)
    return first + "".join(part for three in fences for part in three)


def add_fences(backend, stages, options, language, capability) -> None:
    """Is Triton's hook for what comes between two of its stages."""
    make_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: fenced(make_ptx(source, metadata))


def source(job: dict) -> ASTSource:
    function = getattr(import_module(job["module"]), job["function"])
    is_constant = {parameter.name: parameter.is_constexpr for parameter in function.params}
    arguments = [name for name, constant in is_constant.items() if not constant]
    constants = {name for name, constant in is_constant.items() if constant}
    if len(arguments) != len(job["types"]) or constants != set(job["constants"]):
        raise TypeError(
            f"{job['function']} takes the arguments {arguments} and the constants "
            f"{sorted(constants)}, the spec gives {job['types']} and {sorted(job['constants'])}"
        )
    signature = {name: "constexpr" if constant else "" for name, constant in is_constant.items()}
    signature |= dict(zip(arguments, job["types"]))
    aligned = [arguments[index] for index in job["multiples_of_16"]]
    attributes = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if name in aligned
    }
    return ASTSource(function, signature, job["constants"], attributes)


def compile_job(job: dict) -> tuple[bytes, str, dict]:
    """Returns machine code, the PTX that it was made of, and what a launch must know of it."""
    options = {
        "num_warps": job["warps"],
        "num_stages": job["stages"],
        "num_ctas": 1,
        "maxnreg": job["max_registers"],
        "enable_fp_fusion": job["fuse_multiply_add"],  # Triton's default is about to change
    }
    target = GPUTarget("cuda", job["capability"], WARP)
    compiled = triton.compile(source(job), target=target, options=options)
    metadata = compiled.metadata
    facts = {
        "entry": metadata.name,
        "warps": metadata.num_warps,  # more than asked for where warps are specialised
        "shared_bytes": metadata.shared,
        "scratch_bytes": metadata.global_scratch_size + metadata.profile_scratch_size,
    }
    return compiled.asm["cubin"], compiled.asm["ptx"], facts


def main(folder: Path) -> None:
    knobs.runtime.add_stages_inspection_hook = add_fences
    for name, job in json.load(sys.stdin).items():
        data, ptx, facts = compile_job(job)
        (folder / f"{name}.cubin").write_bytes(data)
        (folder / f"{name}.ptx").write_text(ptx, "utf-8")
        (folder / f"{name}.json").write_text(json.dumps(facts), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
