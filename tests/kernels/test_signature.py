"""Arguments that a kernel cannot take are named, with what was expected and what was found."""

import pytest
import torch

from kernels.arch import SM89
from kernels.signature import Axis, Parameter, parameters, require
from kernels.spec import KernelError, KernelSpec, Tuning


def spec(signature, multiples=()):
    tuning = {SM89: Tuning(warps=8, stages=2, blocks={}, toolkit="12.6")}
    return KernelSpec("mix.first", "mix:mix_kernel", signature, {}, tuning, multiples)


def test_a_signature_is_read_in_order():
    wanted = (Parameter("*bf16", True), Parameter("i32", True), Parameter("fp32", False))
    assert parameters(spec("*bf16 i32 fp32", (1,))) == wanted
    assert [parameter.size_bytes for parameter in wanted] == [8, 4, 4]
    assert [parameter.element for parameter in wanted] == ["bf16", None, None]


@pytest.mark.parametrize(
    ("signature", "multiples", "message"),
    [
        ("*fp32 i31", (), "i31 in its signature is none of"),
        ("*fp8e5 i32", (), r"\*fp8e5 in its signature"),
        ("*fp32 i32", (0,), "argument 0 cannot be a multiple of 16"),
        ("*fp32 i32", (2,), "argument 2 cannot be a multiple of 16"),
    ],
)
def test_a_wrong_signature_is_refused(signature, multiples, message):
    with pytest.raises(KernelError, match=f"mix.first: {message}"):
        parameters(spec(signature, multiples))


ROWS = Axis("S"), Axis("D", 64), 3


@pytest.mark.parametrize("size", [(1, 64, 3), (7, 128, 3)])
def test_a_tensor_of_the_shape_and_dtype_asked_for_is_taken(size):
    tensor = torch.zeros(size)
    require("kernel", "x", tensor, ROWS, torch.float32)
    require("kernel", "x", tensor, ROWS)
    require("kernel", "x", tensor, size)
    with pytest.raises(KernelError):
        require("kernel", "x", tensor, (*size[:2], 4))


@pytest.mark.parametrize("size", [(0, 64, 3), (1, 0, 3), (1, 65, 3), (1, 64, 4), (64, 3), ()])
def test_a_tensor_of_another_shape_is_refused(size):
    with pytest.raises(KernelError) as caught:
        require("norm.i8", "x", torch.zeros(size), ROWS)
    assert str(caught.value) == (
        "norm.i8, x: expected a tensor [S, D, 3], D a multiple of 64, "
        f"found torch.float32 {list(size)}"
    )


def test_a_tensor_of_another_dtype_is_refused():
    with pytest.raises(KernelError) as caught:
        require("norm.i8", "x", torch.zeros(5), (5,), torch.int8)
    assert str(caught.value) == "norm.i8, x: expected torch.int8 [5], found torch.float32 [5]"
