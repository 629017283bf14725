"""Training of the nano SCAIL-2: it computes what the engine does, and learns from what it says."""

import random

import pytest
import torch

from benchmarks.nano.optimizer import NanoOptimizer
from benchmarks.nano.train import Batch
from benchmarks.nano.transformer import texts_of
from benchmarks.nano_scail2 import latents, train
from benchmarks.nano_scail2.latents import SHARES, Encoded
from benchmarks.nano_scail2.scenes import MODES
from benchmarks.nano_scail2.transformer import DrivenConditions, masked_transformer, velocity
from engine.config import LATENT_CHANNELS, NANO, NANO_SCAIL2, ROLE_CHANNELS, TEXT_TOKENS
from engine.flow import Roles
from engine.masks.colours import CLASSES
from engine.models.dit import Scail

CELLS, HALF = (8, 4), (4, 2)  # rows and columns of latents
T = 3


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def known(mode, history=None):
    masks = [randn(2, ROLE_CHANNELS, 1, *CELLS), randn(2, ROLE_CHANNELS, T, *HALF)]
    return DrivenConditions(
        texts=torch.tensor([1, 0]),
        vision=randn(2, 257, NANO.clip_dim),
        mode=mode,
        reference=randn(2, LATENT_CHANNELS, 1, *CELLS),
        reference_mask=masks[0],
        driving=randn(2, LATENT_CHANNELS, T, *HALF),
        driving_mask=masks[1],
        history=history,
    )


def model_like_trained():
    model, draw = Scail(NANO_SCAIL2), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_differentiable_transformer_is_the_one_of_the_engine(mode, goes_on):
    model, times = model_like_trained(), [310.0, 870.0]
    padded = [
        torch.cat([randn(n, NANO.text_dim), torch.zeros(TEXT_TOKENS - n, NANO.text_dim)])
        for n in (5, 62)
    ]
    history = randn(2, LATENT_CHANNELS, 2, *CELLS) if goes_on else None
    told, clips = known(mode, history), randn(2, LATENT_CHANNELS, T, *CELLS)
    found = velocity(model, texts_of(padded), clips, torch.tensor(times), told)
    for n, text in enumerate([1, 0]):
        context = model.embed_context(padded[text], told.vision[n])
        none = torch.zeros(LATENT_CHANNELS, 0, *CELLS), torch.zeros(ROLE_CHANNELS, 0, *CELLS)
        roles = Roles(mode, told.reference_mask[n], told.driving_mask[n], *none)
        clip, marks = clips[n].clone(), None
        if history is not None:
            clip[:, :2], marks = history[n], torch.zeros(4, T, *CELLS)
            marks[:, :2] = 1.0
        want = model(
            clip, times[n], context, told.reference[n], told.driving[n], marks, roles=roles
        )
        torch.testing.assert_close(found[n], want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_begins_as_the_preview_that_it_is_made_of():
    trained = model_like_trained().state_dict()
    preview = {name: trained[name] for name in Scail(NANO).state_dict()}
    begun = masked_transformer(NANO_SCAIL2, preview)
    for name, weight in preview.items():
        torch.testing.assert_close(begun.state_dict()[name], weight, rtol=0, atol=0)
    masks = begun.state_dict()
    assert masks["patch_embedding_mask.weight"].std() == pytest.approx(0.05, rel=0.1)
    assert not masks["patch_embedding_mask.bias"].any()


def encoded(draw):
    shapes = {
        "driving": (16, 5, *HALF), "animation": (16, 5, *CELLS), "replacement": (16, 5, *CELLS),
        "reference": (16, 1, *CELLS), "vision": (257, NANO.clip_dim),
    }  # fmt: skip
    masks = {
        f"{mode}_{name}_mask": torch.randint(
            0, SHARES + 1, shape, generator=draw, dtype=torch.uint8
        )
        for mode in MODES
        for name, shape in (("driving", (28, 5, *HALF)), ("reference", (28, 1, *CELLS)))
    }
    return Encoded(
        **{name: torch.randn(shape, generator=draw).half() for name, shape in shapes.items()},
        **masks,
    )


def test_a_batch_shows_one_mode_and_what_goes_on_begins_where_a_segment_does(tmp_path):
    made = encoded(torch.Generator().manual_seed(0))
    latents.write(made, tmp_path / "0000001.safetensors")
    pool, seen = train.LatentPool(tmp_path, random.Random(0)), set()
    for _ in range(40):
        drawn = pool.draw(Batch(3, 2))
        told, mode = drawn.known, drawn.known.mode
        seen.add((mode, told.history is not None))
        whole = getattr(made, mode).float()
        for n, clip in enumerate(drawn.clean):
            [start] = [s for s in range(3) if torch.equal(clip, whole[:, s : s + 3])]
            assert start == 0 or told.history is None
            cut = slice(start, start + 3)
            torch.testing.assert_close(told.driving[n], made.driving[:, cut].float())
            mask = getattr(made, f"{mode}_driving_mask")[:, cut]
            torch.testing.assert_close(told.driving_mask[n] * SHARES, mask.float())
        if told.history is not None:
            off = told.history - drawn.clean[:, :, :2]
            assert 0 < off.std() < 2 * train.WORN
            assert not drawn.weight[:, :, :2].any() and drawn.weight[:, :, 2:].all()
    assert seen == {(mode, goes_on) for mode in MODES for goes_on in (True, False)}


def test_new_scenes_are_found(tmp_path):
    draw = torch.Generator().manual_seed(0)
    latents.write(encoded(draw), tmp_path / "0000001.safetensors")
    pool = train.LatentPool(tmp_path, random.Random(0))
    latents.write(encoded(draw), tmp_path / "0000002.safetensors")
    assert len(pool.scenes) == 1
    pool.look()
    assert len(pool.scenes) == 2


def test_the_loss_weighs_more_where_people_are():
    mask = torch.zeros(1, 28, 1, *HALF)
    mask[:, 0] = 1.0  # a white background
    mask[:, 7 + [*CLASSES].index("red"), :, 2, 1] = 0.5
    weight = train.people_weight(mask)
    assert weight.shape == (1, 1, 1, *CELLS)
    heavy = weight[0, 0, 0] == 1 + train.BODY
    assert heavy[4:6, 2:4].all() and heavy.sum() == 4
    assert (weight[0, 0, 0][~heavy] == 1).all()


def test_its_loss_falls():
    model = masked_transformer(NANO_SCAIL2, model_like_trained().state_dict())
    texts, told = texts_of([torch.zeros(TEXT_TOKENS, NANO.text_dim)] * 2), known("replacement")
    drawn = train.Drawn(randn(2, LATENT_CHANNELS, T, *CELLS), told, torch.ones(1, 1, 1, 1, 1))
    optimizer, seen = NanoOptimizer([], model.parameters()), []
    optimizer.set_rates(0, 1e-3)
    for _ in range(8):
        torch.manual_seed(1)
        loss = train.losses(model, texts, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.95 * seen[0]
