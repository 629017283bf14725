"""Whatever library ran out of memory, a job goes on with less; and what others hold is told."""

import pytest
import torch

from engine.denoise.cuda_graphs import CudaGraphRecorder
from engine.errors import TooLarge
from engine.machine.exhausted import held_by_others
from engine.memory import ClipShape
from engine.residency import Memory
from kernels.launch import DriverError
from tests.support.planned_gpu import GB, Gpu, full, made

# --- what running out of memory looks like

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation after trying 3"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN Frontend error: No valid execution plans built."),
    RuntimeError(
        "Plan failed with a cudnnException: CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR: cudnnFinalize "
        "Descriptor Failed cudnn_status: CUDNN_STATUS_NOT_SUPPORTED"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError(
        "The following operation failed in the TorchScript interpreter: CUDA out of memory"
    ),
    DriverError("cuLaunchKernel failed: CUDA_ERROR_OUT_OF_MEMORY (2)", 2),
]
SOMETHING_ELSE = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    RuntimeError("Expected all tensors to be on the same device"),
    RuntimeError(""),
    DriverError("cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)", 700),
]


def first_line(error):
    return str(error).partition("\n")[0][:60]


@pytest.mark.parametrize("error", RAN_OUT, ids=first_line)
def test_a_library_that_gets_no_memory_is_a_reason_to_try_again_with_less(error):
    gpu, fails = Gpu(), [error]
    gpu.memory.prepare(*made(gpu))

    def work():
        if fails:
            raise fails.pop()
        return 17

    assert gpu.memory.attempt("decode", work) == 17
    assert [note[:36] for note in gpu.memory.notes] == ["Out of memory (decode): tried again,"]


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=first_line)
def test_another_error_of_a_library_is_none(error):
    gpu = Gpu()
    gpu.memory.prepare(*made(gpu))

    def work():
        raise error

    with pytest.raises(type(error)) as caught:
        gpu.memory.attempt("decode", work)
    assert caught.value is error
    assert gpu.memory.notes == []
    assert not [move for move in gpu.diary if move.startswith("-")]


def test_a_convolution_that_gets_no_memory_on_any_rung_is_a_clip_that_is_too_large():
    gpu = Gpu()
    gpu.memory.prepare(*made(gpu))

    def work():
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    with pytest.raises(TooLarge, match=r"\(decode: GET was unable to find an engine") as caught:
        gpu.memory.attempt("decode", work)
    assert not caught.value.fatal


@pytest.mark.parametrize("fault", ["OutOfMemoryError", "cuDNN"])
def test_a_recording_that_cannot_end_tells_that_memory_ran_out(monkeypatch, fault):
    inner = (
        full() if fault == "OutOfMemoryError" else RuntimeError("cuDNN: unable to find an engine")
    )

    class Capture:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)

    def run():
        raise inner

    with pytest.raises(type(inner)) as caught:
        CudaGraphRecorder()(run)
    assert caught.value is inner


# --- what other programs hold


def shared_with(gpu, held):
    gpu.memory = Memory(gpu.plan, gpu.memory._models, lambda: held)
    return gpu


@pytest.mark.parametrize(
    ("held", "told"), [(0, False), (GB // 2, False), (7_400_000_000, True)], ids=str
)
def test_a_plan_that_fails_tells_what_other_programs_hold(held, told):
    gpu = shared_with(Gpu(free=GB // 2), held)
    with pytest.raises(TooLarge) as planned:
        gpu.memory.prepare(*made(gpu))
    with pytest.raises(TooLarge) as foreseen:
        gpu.memory.foresee(ClipShape(64, 96, 9))
    for caught in (planned, foreseen):
        assert "of GPU memory" in str(caught.value)
        assert ("Other programs hold 7.4 GB of this GPU: end them" in str(caught.value)) is told


def test_a_clip_that_runs_out_on_every_rung_tells_it_too():
    gpu = shared_with(Gpu(), 7 * GB)
    gpu.memory.prepare(*made(gpu))

    def work():
        raise full()

    with pytest.raises(TooLarge, match=r"shorter clip\. Other programs hold 7\.0 GB"):
        gpu.memory.attempt("denoise", work)


def test_others_have_what_is_neither_free_nor_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12 * GB)
    assert held_by_others(GB) == 6 * GB
    assert held_by_others(9 * GB) == 0
