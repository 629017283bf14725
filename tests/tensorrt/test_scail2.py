"""Plans run the blocks of SCAIL-2 as those of any model: masks and pictures are tokens by then."""

from dataclasses import replace

import pytest
import torch

from engine.config import TEXT_TOKENS, TINY, state_dir
from engine.demo.weights import scail2_weights
from engine.denoise.exact import ExactDenoiser
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.sampler import grid
from engine.flow import Conditions, Recipe, Roles
from engine.machine.upload import PackageWeights
from engine.models.attention import sdpa
from engine.models.checkpoint import Checkpoint
from engine.package.folder import open_package
from engine.tensorrt.block_runner import open_program
from kernels.arch import SM89
from kernels.attention import ATTENTION
from kernels.ops import reference_ops
from tests.support.built import tiny_package
from tests.support.fake_tensorrt import GPU, STREAM, FakeLibrary, planned_package

CPU = torch.device("cpu")
FRAMES, PLANE, REFERENCES = 3, (8, 12), 2


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(mode):
    """A clip with two further pictures that goes on from an earlier one."""
    half = FRAMES, PLANE[0] // 2, PLANE[1] // 2
    roles = Roles(
        mode,
        reference=noise(1, 28, 1, *PLANE).gt(0).float(),
        driving=noise(2, 28, *half).gt(0).float(),
        additional=noise(3, 16, REFERENCES, *PLANE),
        additional_masks=noise(4, 28, REFERENCES, *PLANE).gt(0).float(),
    )
    return Conditions(
        text=noise(5, TEXT_TOKENS, TINY.text_dim),
        negative=None,
        vision=noise(6, 257, TINY.clip_dim),
        reference=noise(7, 16, 1, *PLANE),
        pose=noise(8, 16, *half),
        roles=roles,
        history=noise(9, 16, 2, *PLANE),
    )


def velocity(denoiser, conditions):
    recipe, latents = Recipe("euler", 2, 1.0, 3.0), noise(10, 16, FRAMES, *PLANE)
    times = grid("euler", 2, 3.0).timesteps
    return denoiser.bind(conditions, recipe)(latents, range(FRAMES), 1, times[1])


@pytest.mark.parametrize("mode", ["animation", "replacement"])
@pytest.mark.parametrize("program", ["tensorrt", "hybrid"])
def test_a_package_of_scail_2_runs_by_plans(program, mode, tmp_path):
    fake = FakeLibrary()
    planned = planned_package(tmp_path / "sm89", replace(TINY, ffn=512))
    make = open_program(planned, program, GPU, tmp_path, lambda: STREAM, lambda version: fake)
    package = open_package(tiny_package(SM89, "fp8", "scail2"))
    ops = reference_ops(ATTENTION["fp8_f32"])
    denoiser = PackagedDenoiser(PackageWeights(package, CPU), ops, make_runner=make)
    exact = ExactDenoiser(
        Checkpoint(scail2_weights(state_dir()).checkpoint), CPU, torch.float32, sdpa
    )
    got, want = (velocity(one, told(mode)) for one in (denoiser, exact))
    flat = got.double().flatten(), want.double().flatten()
    assert torch.cosine_similarity(*flat, dim=0).item() > 0.999
    assert got.norm().item() == pytest.approx(want.norm().item(), rel=0.02)
    area = PLANE[0] // 2 * (PLANE[1] // 2)
    tokens = area * (REFERENCES + 1 + FRAMES) + area * FRAMES // 4
    assert {count for _, count, _ in fake.runs} == {tokens}
