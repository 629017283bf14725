"""The benchmark of kernels: its arithmetic, its refusals, and the GPU script run without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernel import cubins
from benchmarks.kernel.cases import Inputs, KernelCase, KernelJob, cases
from benchmarks.kernel.gpu import KernelPlace, check, relative_error, rival_rows, wrong_rows
from benchmarks.kernel.model import limits_ms
from benchmarks.kernel.peers import PRODUCTS, Peer, peers
from benchmarks.kernel.suite import KernelRow, kernel_figures, kernel_table
from benchmarks.kernel.work import LaunchWork
from benchmarks.timing import interleaved
from engine.config import SCAIL_14B, TINY
from engine.errors import Unavailable
from kernels.arch import ARCHS, SM89, SM120
from kernels.gemm import GEMM
from kernels.spec import KernelError
from tests.support.compiled import STATE
from tests.support.interpreter import InterpretedBank
from tests.support.live_memory import META, Live, NoLaunches

ROOT = Path(__file__).resolve().parents[2]

DEVICE = torch.device("cpu")


def test_each_unit_of_a_gpu_has_a_limit_of_its_own():
    limits = limits_ms(LaunchWork(660.6e9, 2 * 1008e6, exponentials=16 * 128 * 2.52e6), SM89)
    assert limits == pytest.approx({"tensor": 1, "memory": 2, "MUFU": 1}, rel=1e-3)
    assert limits_ms(LaunchWork(660.6e9, bits=16), SM89)["tensor"] == pytest.approx(4, rel=1e-3)


def test_the_relative_error_of_a_result():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(
        4 / 3
    )
    assert relative_error(torch.ones(3), torch.ones(3).bfloat16()) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) > 1e9


def place(clock):
    return KernelPlace(SM89, InterpretedBank(SM89), DEVICE, clock)


def case_with(got, want, name="gemm.i8 qkv"):
    """A case of a product of 2 x 10^9 operations for each token."""
    job = KernelJob(lambda: None, lambda: (got, want))
    spec = GEMM["i8"].bias
    return KernelCase(name, (spec,), lambda s: LaunchWork(2e9 * s), lambda *_: job)


def test_a_right_result_gets_its_time_its_rate_and_its_share_of_the_limit():
    case = case_with(torch.ones(3), torch.ones(3))
    [row] = rival_rows([case], [], place(lambda run: 10.0), 1000)
    assert (row.ms, row.error, row.tokens) == (10.0, pytest.approx(0), 1000)
    assert row.tflops == pytest.approx(200)
    assert row.share == pytest.approx(200 / 660.6, rel=1e-3)
    assert wrong_rows([row]) == {}


@pytest.mark.parametrize("got", [1.02, float("nan"), 0.0])
def test_a_wrong_result_has_no_time_and_those_beside_it_have(got):
    wrong = case_with(torch.full((3,), got), torch.ones(3), "gemm.fp8 qkv")
    right, clock = case_with(torch.ones(3), torch.ones(3)), Heating()
    rows = rival_rows([wrong, right], [], place(clock), 1000)
    assert [row.ms for row in rows] == [None, 2.0] and len(clock.ran) == 3
    [(name, said)] = wrong_rows(rows).items()
    assert name == "gemm.fp8 qkv"
    assert said.startswith("WRONG, 1000 tokens: relative error")


def test_small_sizes_are_checked_until_one_is_wrong_or_fails():
    right = check(case_with(torch.ones(3), torch.ones(3)), place(None))
    assert [(row.tokens, row.note) for row in right] == [(1, ""), (77, ""), (300, "")]
    [wrong] = check(case_with(torch.zeros(3), torch.ones(3)), place(None))
    assert wrong.tokens == 1 and wrong.note.startswith("WRONG, 1 tokens: relative error")

    def fail(*_):
        raise KernelError("gemm: no such kernel")

    [failed] = check(replace(case_with(None, None), prepare=fail), place(None))
    assert wrong_rows([failed]) == {"gemm.i8 qkv": "WRONG, 1 tokens: gemm: no such kernel"}


class Heating:
    """A clock of a machine that gets slower by 1 ms with each run."""

    def __init__(self):
        self.ran = []

    def __call__(self, work):
        self.ran.append(work())
        return float(len(self.ran))


def test_works_are_timed_in_turns_so_that_heat_hits_all_alike():
    clock = Heating()
    times = interleaved({"ours": lambda: "A", "theirs": lambda: "B"}, clock)
    assert "".join(clock.ran) == "ABABAB"
    assert times == {"ours": [1, 3, 5], "theirs": [2, 4, 6]}


def test_without_a_clock_works_run_and_have_no_times():
    ran = []
    assert interleaved({"a": lambda: ran.append(1)}, lambda work: work(), 2) == {"a": []}
    assert ran == [1, 1]
    assert interleaved({}, Heating()) == {}


def test_a_kernel_and_its_peers_are_timed_in_turns_and_a_peer_that_fails_is_not():
    def refuse():
        raise ImportError("built for another torch\nand a stack")

    clock = Heating()
    others = [
        Peer("right", LaunchWork(2e12), lambda: lambda: "peer", beside="qkv"),
        Peer("refuses", LaunchWork(2e12), refuse, beside="qkv"),
    ]
    ours = [case_with(torch.ones(3), torch.ones(3))]
    rows = rival_rows(ours, others, place(clock), 1000)
    assert clock.ran == [None, "peer"] * 3
    assert [(row.name, row.ms, row.noise_ms) for row in rows] == [
        ("gemm.i8 qkv", 3.0, 2.0), ("right", 4.0, 2.0), ("refuses", None, None),
    ]  # fmt: skip
    assert [row.note for row in rows] == ["", "", "failed: built for another torch"]
    assert rows[1].tflops == pytest.approx(500)


def test_a_case_that_fails_loses_its_own_row_and_no_other():
    """One attention case without memory once took the rows of all."""

    def grow(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.75 GiB.\nSee docs")

    def crash(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    full = replace(case_with(None, None, "gemm.fp8 qkv"), prepare=grow)
    broken = replace(case_with(None, None, "gemm.i8 down"), prepare=crash)
    right, told = case_with(torch.ones(3), torch.ones(3)), []
    rows = rival_rows([full, broken, right], [], place(lambda run: 5.0), 1000, told.append)
    assert [row.name for row in told] == [row.name for row in rows]
    assert [row.note for row in rows] == [
        "out of memory, 1000 tokens: CUDA out of memory. Tried to allocate 3.75 GiB.",
        "WRONG, 1000 tokens: CUDA error: an illegal memory access was encountered",
        "",
    ]
    assert [row.ms for row in rows] == [None, None, 5.0]
    assert wrong_rows(rows).keys() == {"gemm.i8 down"}  # too small a GPU is no wrong kernel


def test_a_case_that_fails_while_it_is_timed_gets_a_note_and_the_next_its_time():
    def clock(run):
        if run() == "wide":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 3.0

    made = KernelJob(lambda: "wide", lambda: (torch.ones(3), torch.ones(3)))
    wide = replace(case_with(None, None, "gemm.fp8 qkv"), prepare=lambda *_: made)
    rows = rival_rows([wide, case_with(torch.ones(3), torch.ones(3))], [], place(clock), 9)
    assert [(row.ms, row.note[:13]) for row in rows] == [(None, "out of memory"), (3.0, "")]


class Sizes(Inputs):
    """Inputs without values: the meta device has no generator."""

    def normal(self, name, *shape):
        return torch.empty(*shape, device=self.device)


@pytest.mark.parametrize("group", ["attention", "qkv", "o", "up", "down"])
def test_all_cases_of_a_group_fit_a_gpu_of_24_gb(group):
    """Counts the bytes that live at 48,832 tokens: cases share inputs, comparing keeps none."""
    ours = [case for case in cases(SM89, SCAIL_14B) if case.group == group]
    assert len(ours) > 1
    with Live() as live:
        inputs = Sizes(48832, META)
        jobs = []
        for case in ours:
            jobs.append(case.prepare(NoLaunches(), inputs, 48832))
            jobs[-1].compare()
        kept = live.now
        for job in jobs:
            job.run()
    assert kept < 6e9 and live.peak < 18e9
    assert live.now == kept


def test_inputs_are_drawn_the_same_for_whoever_asks_and_kept_where_they_are_shared():
    inputs, made = Inputs(77, DEVICE), []
    assert torch.equal(inputs.normal("q", 3, 4), inputs.normal("q", 3, 4))
    assert not torch.equal(inputs.normal("q", 3, 4), inputs.normal("k", 3, 4))
    assert not torch.equal(inputs.normal("q", 3, 4), Inputs(78, DEVICE).normal("q", 3, 4))
    for _ in range(2):
        assert inputs.shared("x", lambda: made.append(1) or len(made)) == 1


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_each_peer_stands_beside_the_cases_that_do_its_work(arch):
    everything = cases(arch, SCAIL_14B)
    for peer in peers(100):
        beside = {case.name for case in everything if case.group == peer.beside}
        product = next((product for product in PRODUCTS if f"mm {product}" in peer.name), None)
        if product is None:
            assert beside and all(name.startswith("attention") for name in beside)
        else:
            forms = {n for n, form in GEMM.items() if arch in form.bias.tuning}
            assert forms and all(name.split()[1] == product for name in beside)
            assert {name.split()[0] for name in beside} == {f"gemm.{form}" for form in forms}


def test_a_table_shows_what_is_known_and_leaves_out_the_rest():
    rows = [
        KernelRow("gemm.i8 qkv", "sm89", 218, 48.0, 1.91, 660.6, 530.4),
        KernelRow("gemm.i8 qkv", "sm90", tokens=29757, error=0.0017, ms=4.321, share=0.61),
    ]
    head, first, second = (line.split() for line in kernel_table(rows).splitlines())
    assert "note" not in head
    assert first == ["gemm.i8", "qkv", "sm89", "218", "48", "1.91", "661", "530"]
    assert second == ["gemm.i8", "qkv", "sm90", "29757", "1.7e-03", "4.321", "61%"]


def test_figures_keep_rates_of_machine_code_apart_from_times():
    found = kernel_figures([
        KernelRow("gemm.i8 qkv", "sm89", 218, 48.0, 1.91, 660.6, 530.4),
        KernelRow("gemm.i8 qkv", "sm90", tokens=77, ms=4.0, noise_ms=0.1),
        KernelRow("sageattention", "sm90", tokens=77, note="not installed"),
    ])  # fmt: skip
    assert [(f.name, f.value, f.noise, f.source) for f in found] == [
        ("sm89 gemm.i8 qkv, upper bound of speed", 660.6, 0.0, "estimate"),
        ("sm89 gemm.i8 qkv, expected", 530.4, 0.0, "estimate"),
        ("sm90 gemm.i8 qkv, 77 tokens", 4.0, 0.1, "measured"),
    ]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_every_case_has_a_name_of_its_own_and_work_that_grows_with_tokens(arch):
    found = cases(arch, SCAIL_14B)
    assert len({case.name for case in found}) == len(found)
    for case in found:
        small, large = case.work(1000), case.work(2000)
        assert large.flop + large.moved > small.flop + small.moved > 0


@pytest.mark.parametrize("arch", [SM89, SM120], ids=lambda arch: arch.name)
@pytest.mark.parametrize("name", ["gemm.i8 o + residual", "quantize.fp8 512", "cross_attention"])
def test_cases_are_right_in_the_interpreter(arch, name):
    case = next(case for case in cases(arch, TINY) if case.name == name)
    job = case.prepare(InterpretedBank(arch), Inputs(77, DEVICE), 77)
    assert relative_error(*job.compare()) < case.limit


def gpu_script(*arguments, out):
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry", *arguments]
    environment = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1", "SCAIL_STATE": str(STATE)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_gpu_script_runs_dry_and_keeps_a_line_for_each_step(tmp_path):
    done = gpu_script("--only", "gemm.fp8 o", "rms", out=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text("utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == ["machine"] + 6 * ["check"] + 2 * ["compared", "time"]
    assert {line["tokens"] for line in lines if line["step"] == "check"} == {1, 77, 300}
    assert all(line["note"] == "" for line in lines[1:])
    assert all(line["error"] < 1e-2 for line in lines[1:])
    assert all(line["ms"] is None for line in lines if line["step"] == "time")
    twins = [json.loads(line) for line in (tmp_path / "twins.jsonl").read_text().splitlines()]
    assert [line["step"] for line in twins] == ["machine", "twin", "twin"]
    assert [(line["kernel"], line["others"]) for line in twins[1:]] == [
        ("rms_inverse.1x5120", 0), ("rms_inverse.3x5120", 0)
    ]  # fmt: skip
    *_, gemm, rms, _, found = done.stdout.splitlines()
    assert (gemm.split()[0], rms.split()[0]) == ("gemm.fp8", "rms_inverse")
    assert len(json.loads(found)["suites"]["gpu"]["rows"]) == 2


def test_a_folder_without_cubins_is_one_sentence_that_says_how_to_make_them(tmp_path):
    with pytest.raises(Unavailable, match=r"(?s)no cubins in .*run\.py cubins DIR"):
        cubins.load(tmp_path)


@pytest.mark.parametrize("suite", ["gpu", "twins", "forward", "vae"])
def test_a_gpu_machine_needs_torch_and_numpy_and_nothing_that_draws_compiles_or_renders(suite):
    """Asks a process of its own what the suite's module imports."""
    program = (
        "import sys; from benchmarks import run; run.suite_of(sys.argv[1]); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, suite], cwd=ROOT, capture_output=True, text=True, check=True
    )
    absent = {"triton", "matplotlib", "diffusers", "cv2", "PIL", "pydantic", "transformers"}
    absent |= {"safetensors", "scipy", "tokenizers", "ftfy", "onnxruntime"}
    assert not absent & {*done.stdout.split()}
