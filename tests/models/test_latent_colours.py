"""Latents as colours without the decoder: fitted to the VAE at hand, and kept."""

import time

import pytest
import torch

from engine.demo.presets import NANO_HOME, SHIPPED
from engine.media.picture import load_image
from engine.models.latent_colours import LatentColours, fit_colours, latent_colours
from engine.models.locate import VAE, find_model
from engine.models.vae import load_vae
from tests.support.compiled import STATE


@pytest.fixture(scope="module")
def vae():
    path = find_model(SHIPPED.weights(STATE).models, VAE)
    return load_vae(path, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def colours(vae):
    return fit_colours(vae)


def test_a_picture_is_recognised_in_the_colours_of_its_latents(vae, colours):
    picture = torch.as_tensor(load_image(NANO_HOME / "dancer.png"))[..., :3]
    height, width = (side // 8 * 8 for side in picture.shape[:2])
    frame = picture[:height, :width].permute(2, 0, 1).float() / 127.5 - 1
    with torch.inference_mode():
        found = colours.frames(vae.encode([frame[:, None]])).float()[0]
    blocks = frame.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).mean((2, 4)).permute(1, 2, 0)
    wanted = blocks * 127.5 + 127.5
    error = (found - wanted).square().mean().sqrt()
    spread = (wanted - wanted.mean((0, 1))).square().mean().sqrt()
    assert error < 0.6 * spread  # a flat picture of the right mean has 1
    flat = torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
    assert flat > 0.9


def test_the_map_is_fitted_once_and_read_from_then_on(vae, colours, tmp_path):
    first = latent_colours(vae, tmp_path)
    began = time.perf_counter()
    again = latent_colours(vae, tmp_path)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert torch.equal(first.weight, colours.weight)
    assert time.perf_counter() - began < 5
    for entry in tmp_path.iterdir():
        entry.write_bytes(entry.read_bytes()[:-1])
    assert torch.equal(latent_colours(vae, tmp_path).weight, first.weight)


def test_numbers_that_are_not_finite_are_shown_as_grey():
    colours = LatentColours(torch.ones(3, 16), torch.zeros(3))
    latents = torch.full((16, 1, 1, 1), float("nan"))
    assert colours.frames(latents).tolist() == [[[[128, 128, 128]]]]
    latents[:] = 1000.0
    assert colours.frames(latents).tolist() == [[[[255, 255, 255]]]]


def test_the_numbers_of_a_map_make_it_again_and_others_are_refused(colours):
    again = LatentColours.of(colours.values)
    assert torch.equal(again.weight, colours.weight) and torch.equal(again.bias, colours.bias)
    with pytest.raises(ValueError, match="50 numbers"):
        LatentColours.of(colours.values[:-1])
