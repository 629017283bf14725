"""Compiling: the same bytes everywhere, once for the same sources; errors name the kernel."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.aot.compile import compile_kernels, ptx_path
from kernels.aot.elf import read_elf
from kernels.arch import SM89, SM90, SM120
from kernels.attention import ATTENTION
from kernels.device.__main__ import fenced
from kernels.fp8 import INT8R
from kernels.gemm import GEMM
from kernels.modulate import MODULATE
from kernels.spec import BuildError
from tests.kernels.test_cubin import COMBINE, FILL, MULTIPLY, fault
from tests.support.compiled import STATE, compiled, each_arch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def state(tmp_path):
    """A state folder with the toolkits, and without results of earlier builds."""
    compiled((FILL, SM89), (FILL, SM120))  # fetches both
    (tmp_path / "toolkits").symlink_to(STATE / "toolkits")
    return tmp_path


def stored(state):
    return {path.name: path.read_bytes() for path in (state / "cubins").iterdir()}


@each_arch
def test_two_builds_are_equal_byte_for_byte(state, arch, monkeypatch):
    """They run in other processes and folders, with other settings of Triton and ptxas around."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    monkeypatch.setenv("PTXAS_OPTIONS", "--opt-level 1")
    monkeypatch.setenv("TMPDIR", str(state))
    first = compiled((COMBINE, arch), (FILL, arch))
    second = compile_kernels([(FILL, arch), (COMBINE, arch)], state, processes=1)
    assert [made.data for made in first] == [made.data for made in reversed(second)]
    assert first == second[::-1]
    assert all(trace not in first[0].data for trace in (b"rope.py", b"/tmp", b".ptx"))


def test_results_come_in_the_order_asked_for_and_are_kept(state):
    wanted = [(FILL, SM90), (MULTIPLY, SM89), (FILL, SM120)]
    made = compile_kernels(wanted, state)
    assert [(cubin.name, cubin.arch) for cubin in made] == [
        (spec.name, arch.name) for spec, arch in wanted
    ]
    kept = stored(state)
    assert len(kept) == 6
    (state / "toolkits").unlink()  # nothing can be compiled now
    assert compile_kernels(wanted[::-1], state) == made[::-1]
    assert stored(state) == kept


def test_the_ptx_of_a_kernel_is_kept_by_the_hash_of_its_code(state):
    (made,) = compile_kernels([(FILL, SM90)], state)
    path = ptx_path(made.sha256, state)
    assert path == state / "ptx" / f"{made.sha256}.ptx"
    text = path.read_text("utf-8")
    assert f".visible .entry {made.entry}(" in text and ".target sm_90a" in text
    assert b".visible .entry" not in made.data  # the code itself has none
    path.unlink()
    assert compile_kernels([(FILL, SM90)], state) == [made]
    assert path.read_text("utf-8") == text


def test_copies_are_fenced_before_wgmma_and_nowhere_else():
    wait, product = "\tcp.async.wait_group \t1;\n", "\twgmma.mma_async.sync.aligned x;\n"
    fence = "\tfence.proxy.async.shared::cta;\n"
    text = f"\tmov;\n{wait}\tbar.sync 0;\n{product}{wait}\tbar.sync 0;\n"
    assert fenced(text) == text.replace(wait, wait + fence, 1)
    without = text.replace(product, "")
    assert fenced(without) == without


def test_every_product_of_a_warpgroup_has_its_fence():
    made = compiled((GEMM["fp8"].bias, SM90), (ATTENTION["i8_fp8_f32"], SM90))
    for cubin in made:
        text = ptx_path(cubin.sha256, STATE).read_text("utf-8")
        parts = text.split("cp.async.wait_group")[1:]
        assert len(parts) > 1, cubin.name
        for part in parts:
            begin = part.split("bar.sync")[0]
            assert ("fence.proxy.async" in begin) == ("wgmma.mma_async" in part), cubin.name


def test_a_damaged_result_is_compiled_again(state, caplog):
    (made,) = compile_kernels([(FILL, SM89)], state)
    kept = stored(state)
    for suffix, damage in ((".cubin", made.data[:-9]), (".json", b"{")):
        next((state / "cubins").glob(f"*{suffix}")).write_bytes(damage)
        assert compile_kernels([(FILL, SM89)], state) == [made]
        assert stored(state) == kept
    again = [record.getMessage() for record in caplog.records if "again" in record.getMessage()]
    assert len(again) == 2
    assert all(message.startswith("faults.fill is compiled again:") for message in again)


def test_a_changed_source_is_compiled_again(state):
    package = state / "changing"
    package.mkdir()
    source = (ROOT / "tests" / "support" / "samples" / "faults.py").read_text("utf-8")
    spec = replace(FILL, package="changing")
    code = (
        "import pickle, sys; from pathlib import Path;"
        "from kernels.aot.compile import compile_kernels;"
        "wanted = pickle.load(sys.stdin.buffer);"
        "print(compile_kernels(wanted, Path(sys.argv[1]))[0].sha256)"
    )

    def build(text, neighbour):
        (package / "faults.py").write_text(text)
        (package / "more.py").write_text(neighbour)
        done = subprocess.run(
            [sys.executable, "-c", code, str(state)],
            input=pickle.dumps([(spec, SM89)]),
            cwd=state,
            capture_output=True,
            check=True,
        )
        return done.stdout

    first = build(source, "")
    assert build(source, "unused = 1") == first
    assert len(stored(state)) == 2
    imports = source.replace("import triton\n", "import triton\nfrom changing.more import one\n", 1)
    doubled = imports.replace("+ VALUE", "+ one() * VALUE")
    one = "import triton\n@triton.jit\ndef one():\n    return {}\n"
    second, third = build(doubled, one.format(2)), build(doubled, one.format(3))
    assert len({first, second, third}) == 3
    assert len(stored(state)) == 6


def test_kernels_are_compiled_without_torch(state):
    blocked = state / "torch.py"
    blocked.write_text("raise ImportError('there is no torch here')")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from kernels.arch import SM90; from kernels.aot.compile import compile_kernels;"
        "from kernels.spec import KernelSpec, Tuning;"
        "spec = KernelSpec('fill', 'faults:fill', '*fp32 fp32 i32', {'BLOCK': 256},"
        "  {SM90: Tuning(4, 2, {}, '12.6')}, package='tests.support.samples');"
        "print(compile_kernels([(spec, SM90)], Path(sys.argv[1]))[0].sha256);"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == compiled((FILL, SM90))[0].sha256


def test_a_products_sum_may_be_rounded_twice_if_a_spec_asks_for_it(state):
    spec = MODULATE[INT8R]
    once, twice = (replace(spec, fuse_multiply_add=fused) for fused in (True, False))
    codes = [made.text_bytes for made in compiled((once, SM89), (twice, SM89))]
    assert codes[0] < codes[1]


# --- errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (fault("misspelt", "*fp32", BLOCK=64), "misspelt does not compile for sm89: .*zeroes"),
        (fault("absent", "*fp32"), "absent does not compile for sm89: .*no attribute 'absent'"),
        (fault("fill", "*fp32 fp32", BLOCK=64), r"fill takes the arguments \['x_ptr', 'VALUE'"),
        (fault("fill", "*fp32 fp32 i32"), r"and the constants \['BLOCK'\], the spec gives .* \[\]"),
        (
            replace(FILL, device="nowhere:fill"),
            r"fill: there is no module .*samples\.nowhere",
        ),
    ],
    ids=[
        "an error in the source",
        "no such function",
        "an argument less",
        "a constant less",
        "no file",
    ],
)
def test_a_kernel_that_does_not_compile_is_named_with_the_reason(spec, message):
    with pytest.raises(BuildError, match=message):
        compiled((spec, SM89))


def test_a_kernel_that_ptxas_refuses_is_named():
    """FP8 products with FP16 sums need ptxas 12.8."""
    spec = replace(
        FILL,
        name="samples.product",
        device="arithmetic:product",
        signature="*fp8e4nv *fp8e4nv *fp16",
        constants={"M": 16, "N": 32, "K": 128, "TOTAL": "fp16"},
    )
    with pytest.raises(BuildError, match=r"product does not compile for sm89: .*instruction types"):
        compiled((spec, SM89))
    newer = replace(spec, tuning={SM89: replace(FILL.tuning[SM89], toolkit="12.8")})
    (made,) = compiled((newer, SM89))
    assert read_elf(made.data).toolkit == "12.8"


def test_a_toolkit_that_is_not_pinned_is_refused():
    with pytest.raises(BuildError, match=r"no ptxas of CUDA 11\.8 is pinned, only 12\.6, 12\.8"):
        tuning = replace(FILL.tuning[SM89], toolkit="11.8")
        compiled((replace(FILL, tuning={SM89: tuning}), SM89))


def test_an_architecture_that_a_spec_is_not_tuned_for_is_refused():
    with pytest.raises(BuildError, match=r"faults\.fill is not tuned for sm90"):
        compiled((replace(FILL, tuning={SM89: FILL.tuning[SM89]}), SM90))
