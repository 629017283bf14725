"""The machine is built by whichever compiler is here, to the same results on every processor."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernels.spec import BuildError
from tests.support.compiled import STATE
from virtual_gpu import compiler as module
from virtual_gpu.compiler import FLAGS, compiler, shared_library, vector_flags
from virtual_gpu.machine import SOURCES

ROOT = Path(__file__).resolve().parents[2]
DIGEST = """
import hashlib, sys, torch
from pathlib import Path
from kernels.arch import SM89, SM90
from virtual_gpu import bank
from virtual_gpu.machine import Machine
machine = Machine(Path(sys.argv[1]), sys.argv[2:])
bank.the_machine = lambda state: machine
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import attention_operands, gemm_operands
from virtual_gpu.orders import FORWARD
from kernels.attention import ATTENTION, attention
from kernels.gemm import GEMM, gemm_gelu
torch.set_num_threads(1)
digest = hashlib.sha256()
state = Path(sys.prefix) / "scail-build"
for arch, name, way in ((SM89, "i8_fp8_f16_wide", "i8"), (SM90, "i8_fp8_f32", "fp8")):
    bank = VirtualBank(arch, state, [FORWARD])
    out = attention(bank, ATTENTION[name], attention_operands(ATTENTION[name], 40))
    digest.update(out.view(torch.uint8).numpy().tobytes())
    operands = gemm_operands(GEMM[way].dtype, 40, 256, 128)
    digest.update(gemm_gelu(bank, GEMM[way], *operands).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest_of(folder, *command):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(folder), *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def usual():
    return digest_of(STATE / "virtual_gpu", *compiler("c++"))


def test_results_are_the_same_without_vector_instructions(usual, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text(f'#!/bin/sh\nexec {" ".join(compiler("c++"))} "$@" -mno-avx2 -mno-fma\n')
    plain.chmod(0o755)
    if not vector_flags():
        pytest.skip("this processor has no AVX2: the usual library is the plain one")
    assert digest_of(tmp_path, str(plain)) == usual


@pytest.mark.slow
def test_zig_builds_a_machine_with_the_same_results(usual):
    if find_spec("ziglang") is None:
        pytest.skip("the package ziglang is not installed")
    assert digest_of(STATE / "zig", sys.executable, "-m", "ziglang", "c++") == usual


def test_a_machine_without_a_compiler_takes_that_of_ziglang(monkeypatch):
    monkeypatch.setattr(module, "which", lambda name: None)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert compiler("c++") == [sys.executable, "-m", "ziglang", "c++"]
    assert compiler("c") == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="pip install ziglang"):
        compiler("c++")


def test_an_error_of_the_compiler_is_told(tmp_path):
    (tmp_path / "bad.c").write_text("int f(void) { return nothing; }")
    with pytest.raises(BuildError, match=r"cannot compile bad\.c: .*nothing"):
        shared_library([tmp_path / "bad.c"], tmp_path / "out", compiler("c"), ())
    assert not list((tmp_path / "out").iterdir())


def test_a_library_is_made_again_only_if_something_changed(tmp_path):
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    command = compiler("c")
    first = shared_library([source], tmp_path, command, ())
    made = first.stat().st_mtime_ns
    assert shared_library([source], tmp_path, command, ()) == first
    assert first.stat().st_mtime_ns == made
    assert shared_library([source], tmp_path, command, ("-O1",)) != first


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("flags : fpu avx avx2 fma\n", ["-mavx2", "-mfma"]),
        ("flags : fpu avx2\n", []),
        ("", []),
    ],
)
def test_vector_instructions_are_used_where_there_are_all(tmp_path, monkeypatch, text, flags):
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(text)
    assert vector_flags(tmp_path / "cpuinfo") == flags
    assert vector_flags(tmp_path / "missing") == []


def test_products_and_sums_are_never_fused():
    assert "-ffp-contract=off" in FLAGS
    assert (SOURCES / "driver.cpp").is_file()
