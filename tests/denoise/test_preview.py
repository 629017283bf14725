"""A preview at every step: the clip that latents are on the way to, four frames side by side."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.denoise.preview import expected, previewed, write_preview
from engine.denoise.sampler import denoise, noise_like, seeded
from engine.flow import Recipe

CLIP = torch.linspace(-1, 1, 16 * 6 * 4 * 5).view(16, 6, 4, 5)


def grey(latents):
    """Shows the first number of each latent as a level."""
    levels = ((latents[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels[..., None].expand(-1, -1, -1, 3)


def towards(clip):
    """The velocity that leads from any noise to one clip: (x - clip) / sigma."""
    return lambda latents, step, timestep: (latents - clip) / (timestep / 1000)


def test_at_every_noise_level_the_picture_is_the_clip_that_comes_out():
    noise = noise_like(tuple(CLIP.shape), seeded(3))
    for timestep in (999.0, 500.0, 1.0):
        sigma = timestep / 1000
        latents = (1 - sigma) * CLIP + sigma * noise
        found = expected(latents, noise - CLIP, timestep)
        assert found.shape == (16, 4, 4, 5)
        assert torch.allclose(found, CLIP[:, [0, 2, 3, 5]], atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "euler_simple", "unipc", "dpm++", "dpm++_sde"])
def test_each_step_of_each_sampler_writes_the_picture_anew(tmp_path, sampler):
    path, seen = tmp_path / "now.png", []

    def counted(latents):
        seen.append(latents.clone())
        return grey(latents)

    generator = seeded(1)
    noise = noise_like(tuple(CLIP.shape), generator)
    made = denoise(
        previewed(towards(CLIP), counted, path),
        noise,
        Recipe(sampler, steps=4, cfg=1.0, shift=5.0),
        draw=lambda: noise_like(tuple(CLIP.shape), generator),
        progress=lambda done: None,
    )
    # some samplers tell the network whole timesteps, up to half of one from their noise level
    assert torch.allclose(made, CLIP, atol=5e-3)
    assert len(seen) >= 4
    for latents in seen:
        assert torch.allclose(latents, CLIP[:, [0, 2, 3, 5]], atol=5e-3)
    shown = np.asarray(Image.open(path))
    assert shown.shape == (4 * 51, 20 * 51, 3)
    small = np.asarray(Image.fromarray(shown).resize((20, 4), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - torch.cat([*grey(CLIP[:, [0, 2, 3, 5]])], dim=1).numpy()).max() <= 3


def test_the_velocity_is_handed_on_as_it_is_and_a_clip_of_one_latent_is_shown(tmp_path):
    velocity = previewed(lambda x, step, timestep: 2 * x, grey, tmp_path / "now.png")
    assert torch.equal(velocity(CLIP[:, :1], 0, 900.0), 2 * CLIP[:, :1])
    assert Image.open(tmp_path / "now.png").size == (5 * 204, 4 * 204)


def test_a_picture_that_cannot_be_written_is_told_once_and_costs_no_clip(tmp_path, caplog):
    velocity = previewed(lambda x, step, timestep: x, grey, tmp_path / "gone" / "now.png")
    for step in range(3):
        assert torch.equal(velocity(CLIP, step, 900.0), CLIP)
    assert len([one for one in caplog.records if "preview" in one.getMessage()]) == 1


def test_whoever_reads_the_picture_never_sees_half_of_it(tmp_path):
    path = tmp_path / "now.png"
    write_preview(grey(CLIP), path)
    before = path.stat().st_ino
    write_preview(grey(CLIP), path)
    assert path.stat().st_ino != before  # a new file took its place
    assert [*tmp_path.iterdir()] == [path]
