"""A GPU's results are compared with the virtual one's by a suite, which fails where they differ."""

import json

import pytest
import torch

from benchmarks import run
from benchmarks.kernel import cubins, twins
from benchmarks.kernel.twins import TwinPlace, TwinRow, compare, twin_table
from benchmarks.timing import WrongResult
from kernels.aot.compile import ptx_path
from kernels.arch import SM89
from kernels.attention import ATTENTION
from tests.support.compiled import STATE, compiled
from virtual_gpu.bank import VirtualBank
from virtual_gpu.orders import BACKWARD, FORWARD

CPU = torch.device("cpu")
NAMES = ("gemm.i8.bias", "gemm.i8.gelu")


class Wrong:
    """A GPU on which a row of one kernel's result stays zero."""

    def __init__(self, kernel):
        self.bank, self.kernel = VirtualBank(SM89, STATE, [BACKWARD]), kernel
        self.tuning, self.arch = self.bank.tuning, SM89

    def launch(self, spec, grid, *arguments):
        self.bank.launch(spec, grid, *arguments)
        if spec.name == self.kernel:
            made = [one for one in arguments if isinstance(one, torch.Tensor)][-1]
            made[3].zero_()


def place(real):
    return TwinPlace(SM89, real, CPU, VirtualBank(SM89, STATE, [FORWARD]))


def rows(real, names=NAMES):
    return {row.kernel: row for row in compare(place(real), names, (300,), repeats=1)}


def test_a_row_that_was_not_computed_is_told_with_its_kernel_and_no_other_is():
    found = rows(Wrong(NAMES[0]))
    assert found[NAMES[0]].model == "exact"
    assert found[NAMES[0]].note.startswith("DIFFERS: gemm.i8.bias: ")
    assert 0 < found[NAMES[0]].others <= 256
    assert found[NAMES[1]].model == "div.full, ex2.approx"
    assert (found[NAMES[1]].note, found[NAMES[1]].others) == ("", 0)
    lines = twin_table([*found.values()]).splitlines()
    assert "note" in lines[0] and "DIFFERS" in lines[1]


def test_the_suite_fails_after_all_is_compared_and_says_which(tmp_path, monkeypatch):
    class Here:
        """What the suite finds on the machine: a GPU that is wrong in one kernel."""

        def __enter__(self):
            return place(Wrong(NAMES[0]))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(twins, "_place", lambda *_: Here())
    out = tmp_path / "twins.jsonl"
    with pytest.raises(WrongResult, match=r"not as the virtual GPU computes it: gemm\.i8\.bias, "):
        twins.measure_twins(out=out, dry=True, only=NAMES)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line.get("kernel") for line in lines] == [None, *NAMES]
    assert [bool(line["note"]) for line in lines[1:]] == [True, False]


def test_a_row_that_is_as_it_must_be_has_no_note():
    row = TwinRow("gemm.i8.bias", "sm89", "exact", 9, 1000, 0, 0.0, 0.0, 0, "")
    head, line = twin_table([row]).splitlines()
    assert "note" not in head
    assert line.split()[:3] == ["gemm.i8.bias", "sm89", "exact"]


def test_the_suite_takes_the_options_of_the_gpu_machine():
    args = run.parse(["twins", "--kernels", ".gpu", "--only", "gemm", "--dry"])
    assert (args.suites, args.only, args.dry) == (["twins"], ["gemm"], True)


def test_the_folder_for_a_gpu_machine_has_the_ptx_of_every_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    compiled(*((spec, SM89) for spec in ATTENTION.values() if SM89 in spec.tuning))
    assert cubins.write(tmp_path, SM89) > 2**18
    held = cubins.load(tmp_path)
    assert "attention.i8_i8" in held
    for cubin in held.values():
        assert f".entry {cubin.entry}" in ptx_path(cubin.sha256, tmp_path).read_text("utf-8")
