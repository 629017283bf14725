"""The VAE's norm is launched where the package has kernels for this VAE, and computed elsewhere."""

import logging
from functools import partial

import pytest
import torch

from engine.models.vae import GROWTH, Vae
from engine.models.vae_decode import VaeDecoder
from engine.package.folder import open_package
from engine.program import vae_norm
from kernels.arch import SM89
from kernels.channel_norm import channel_norm, channel_norm_reference, channel_norm_spec
from kernels.launch import KernelBank
from kernels.spec import KernelError
from tests.models.test_vae import random_latents, random_vae
from tests.support.built import tiny_package
from tests.support.fake_driver import FakeDriver, build_driver
from tests.support.interpreter import InterpretedBank

WIDTH = 8  # of the demo's VAE


@pytest.fixture
def package():
    return open_package(tiny_package(SM89))


@pytest.fixture
def names(package):
    return {kernel.name for kernel in package.kernels}


@pytest.fixture
def bank(package, tmp_path):
    """The package's kernels as a worker has them, on a driver of our own."""
    driver = FakeDriver(build_driver(tmp_path))
    with KernelBank(package.kernels, SM89, lambda: 0, library=driver.path) as bank:
        yield bank


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, "engine")


def decoded(vae, norm, latents):
    return torch.cat([*VaeDecoder(vae, norm, torch.clone).decode(latents)], dim=1)


def specs(width, dtype):
    return [
        channel_norm_spec(width * growth, dtype, has_branch=has_branch)
        for growth in GROWTH
        for has_branch in (False, True)
    ]


def test_a_vae_whose_channels_have_no_kernels_is_decoded_all_the_same(bank, names, caplog):
    vae, latents = random_vae(WIDTH).bfloat16(), random_latents(3)
    with pytest.raises(KernelError, match=r"channel_norm\.bf16_32 is not loaded"):
        decoded(vae, partial(channel_norm, bank), latents)
    norm = vae_norm(bank, names, vae)
    assert caplog.messages == [
        "no kernels for the VAE's norm over 8, 16, 32 channels of torch.bfloat16: PyTorch does it"
    ]
    got = decoded(vae, norm, latents)
    assert got.isfinite().all()
    assert torch.equal(got, decoded(vae, channel_norm_reference, latents))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_package_has_the_kernels_of_the_released_vae(bank, names, dtype, caplog):
    with torch.device("meta"):
        vae = Vae().to(dtype)
    norm = vae_norm(bank, names, vae)
    assert (norm.func, norm.args) == (channel_norm, (bank,))
    assert {spec.name for spec in specs(96, dtype)} <= names
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_missing_kernel_is_enough_to_compute_all(bank, names, dtype):
    with torch.device("meta"):
        vae = Vae().to(dtype)
    for spec in specs(96, dtype):
        assert vae_norm(bank, names - {spec.name}, vae) is channel_norm_reference


def test_single_precision_has_no_kernels(bank, names, caplog):
    assert vae_norm(bank, names, random_vae(WIDTH)) is channel_norm_reference
    assert "8, 16, 32 channels of torch.float32: PyTorch does it" in caplog.text


def test_kernels_for_another_vae_are_launched_where_a_package_has_them():
    vae, latents = random_vae(4).bfloat16(), random_latents(2)
    held = {spec.name for spec in specs(4, torch.bfloat16)}
    got = decoded(vae, vae_norm(InterpretedBank(SM89), held, vae), latents)
    want = decoded(vae, channel_norm_reference, latents)
    assert (got - want).norm() / want.norm() < 0.02
