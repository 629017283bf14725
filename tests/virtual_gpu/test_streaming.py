"""Blocks that are streamed to compiled kernels make the clip of blocks that stay, to the bit."""

from dataclasses import replace

import pytest
import torch

from engine.denoise.schedule import Streaming
from engine.recipes import RECIPES
from kernels.arch import ARCHS
from kernels.ops import native_ops
from tests.support.nano_clips import bank_of, packaged, pairs, request_of, run
from virtual_gpu.orders import FORWARD

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_a_clip_by_kernels_is_the_same_with_streamed_blocks(arch, tmp_path):
    request = request_of(tmp_path, replace(RECIPES["preview"]["production"], steps=2), frames=5)
    spec, ways = next(pairs(arch))
    bank = bank_of(arch, [FORWARD])
    pipeline = packaged(arch, native_ops(bank, arch, attention=spec, gemm=ways))
    pipeline.denoiser.kept.keep(weights=True, texts=False)  # each clip makes its keys
    want = run(pipeline, request)
    launched = dict(bank.launches)
    for streaming in (Streaming(resident=0, depth=2), Streaming(resident=2, depth=3)):
        pipeline.denoiser.stream(streaming)
        pipeline.denoiser.home.settle(stays=True)
        bank.launches.clear()
        made = run(pipeline, request)
        assert torch.equal(made.latents, want.latents)
        assert torch.equal(made.frames, want.frames)
        assert dict(bank.launches) == launched
