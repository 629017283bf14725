"""Training of the nano models: it computes what the engine does, and learns from what it says."""

import random

import numpy as np
import pytest
import torch

from benchmarks.nano import (
    autoencoder,
    judge,
    latents,
    make,
    scenes,
    start,
    train,
    train_vae,
    training,
)
from benchmarks.nano.optimizer import NanoOptimizer, orthogonal
from benchmarks.nano.transformer import BatchConditions, fresh_transformer, texts_of, velocity
from engine.config import LATENT_CHANNELS, NANO, TEXT_TOKENS
from engine.models.dit import rope_tables
from engine.models.vae import Vae

CELLS = (20, 12)  # rows and columns of a latent of the scenes' size


@pytest.fixture(scope="module")
def scene():
    return scenes.scene(3)


def noisy(model):
    """Weights as if trained: a fresh model has many that are zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_the_differentiable_vae_is_the_one_of_the_engine(frames):
    vae, clip = noisy(Vae(8)), randn(2, frames, 3, 16, 24).clamp(-1, 1)
    made = autoencoder.encode(vae, clip)
    engines = [vae.encode([one.transpose(0, 1)]) for one in clip]
    torch.testing.assert_close(made.transpose(1, 2), torch.stack(engines), rtol=0, atol=2e-5)
    decoded = autoencoder.decode(vae, made).clamp(-1, 1).transpose(1, 2)
    engines = [torch.cat(list(vae.decode(one)), dim=1) for one in engines]
    torch.testing.assert_close(decoded, torch.stack(engines), rtol=0, atol=5e-5)


@pytest.mark.parametrize("has_pose", [True, False])
@torch.no_grad()
def test_the_differentiable_transformer_is_the_one_of_the_engine(has_pose):
    model, times, counts = noisy(fresh_transformer(NANO)), [310.0, 870.0], [5, 62]
    padded = [
        torch.cat([randn(n, NANO.text_dim), torch.zeros(TEXT_TOKENS - n, NANO.text_dim)])
        for n in counts
    ]
    clips, reference = randn(2, LATENT_CHANNELS, 3, *CELLS), randn(2, LATENT_CHANNELS, 1, *CELLS)
    pose = randn(2, LATENT_CHANNELS, 3, 10, 6) if has_pose else None
    vision = randn(2, 257, NANO.clip_dim)
    known = BatchConditions(torch.tensor([1, 0]), vision, reference, pose)
    found = velocity(model, texts_of(padded), clips, torch.tensor(times), known)
    for n, text in enumerate([1, 0]):
        context = model.embed_context(padded[text], vision[n])
        own = None if pose is None else pose[n]
        want = model(clips[n], times[n], context, reference[n], own)
        torch.testing.assert_close(found[n], want, rtol=0, atol=1e-4)


def test_padding_is_one_row_that_counts_as_many():
    padded = torch.zeros(TEXT_TOKENS, 4)
    padded[:3] = 1.0
    texts = texts_of([padded, torch.zeros(TEXT_TOKENS, 4)])
    assert texts.rows.shape == (2, 4, 4)
    assert texts.bias[0].exp().tolist() == pytest.approx([1, 1, 1, TEXT_TOKENS - 3])
    assert texts.bias[1].exp().tolist() == pytest.approx([TEXT_TOKENS, 0, 0, 0])


@torch.no_grad()
def test_heads_first_look_at_the_same_place_and_at_the_skeleton_there():
    model, grid = fresh_transformer(NANO), (3, 10, 6)
    rope = rope_tables(grid, True, torch.device("cpu"))
    tokens = torch.nn.functional.layer_norm(randn(60 * 4 + 45, NANO.dim), (NANO.dim,))
    q, k = model.blocks[0].self_attn.rotated_queries_and_keys(tokens, rope)
    logits = torch.einsum("snk,tnk->nst", q, k) / 128**0.5
    token = 60 * 2 + 5 * 6 + 3  # of the second frame
    reference, skeleton = range(60), range(60 * 4 + 15, 60 * 4 + 30)
    place = logits[0, token, list(reference)].softmax(0).view(10, 6)
    rows, columns = torch.arange(10.0), torch.arange(6.0)
    assert (place.sum(1) * rows).sum() == pytest.approx(5, abs=0.8)
    assert (place.sum(0) * columns).sum() == pytest.approx(3, abs=0.8)
    seen = logits[1, token].softmax(0)
    assert seen[list(skeleton)].sum() > 3 * 15 / 285  # at random: 15 of 285 tokens
    # that of another frame gets less: by a factor of 1.17 to 2.3 over eight draws of the weights
    assert seen[list(skeleton)].sum() > 1.1 * seen[60 * 4 : 60 * 4 + 15].sum()


def test_a_fresh_transformer_passes_tokens_on_unchanged():
    model = fresh_transformer(NANO)
    context = model.embed_context(randn(7, NANO.text_dim), randn(257, NANO.clip_dim))
    tokens, (_, modulation) = randn(60, NANO.dim), model.embed_time(500.0)
    rope = rope_tables((0, 10, 6), False, torch.device("cpu"))
    out = model.blocks[2](tokens, modulation, context, rope)
    torch.testing.assert_close(out, tokens, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonal_step_goes_as_far_in_every_direction(shape):
    values = torch.linalg.svdvals(orthogonal(randn(*shape)))
    assert values.min() > 0.5 and values.max() < 1.3
    plain = torch.linalg.svdvals(randn(*shape))
    assert plain.max() / plain.min() > values.max() / values.min()


def test_both_halves_of_the_optimizer_find_a_minimum():
    matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((4, 4), (4,)))
    goal, optimizer = torch.eye(4), NanoOptimizer([matrix], [vector])
    for step in range(300):
        optimizer.set_rates(0.05 * (1 - step / 300), 0.05 * (1 - step / 300))
        loss = (matrix - goal).square().sum() + (vector - 3).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2


def test_a_training_goes_on_where_it_stopped(tmp_path):
    def stepped(model, optimizer):
        optimizer.set_rates(0.01, 0.01)
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    first = torch.nn.Linear(3, 3)
    optimizer = NanoOptimizer([first.weight], [first.bias])
    stepped(first, optimizer)
    kept = {"model": first, "optimizer": optimizer}
    training.keep(tmp_path / "kept.pt", kept, training.State(1, 2.5))
    stepped(first, optimizer)

    second = torch.nn.Linear(3, 3)
    again = NanoOptimizer([second.weight], [second.bias])
    found = {"model": second, "optimizer": again}
    assert training.resume(tmp_path / "kept.pt", found) == training.State(1, 2.5)
    stepped(second, again)
    torch.testing.assert_close(second.weight, first.weight, rtol=0, atol=0)
    torch.testing.assert_close(second.bias, first.bias, rtol=0, atol=0)
    assert training.resume(tmp_path / "none.pt", found) == training.State()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    log = training.TrainingLog(tmp_path / "log.csv")
    with pytest.raises(FloatingPointError, match="step 7"):
        log.add(training.State(7, 1.0), training.StepLoss(torch.tensor(float("nan")), "1", 0.0))


def test_the_rate_rises_holds_and_falls_to_nothing():
    assert training.schedule(0, 0.0) == pytest.approx(1 / training.WARM_UP)
    assert training.schedule(500, 0.5) == 1.0
    assert training.schedule(500, 0.8) == pytest.approx(0.5)
    assert training.schedule(500, 1.0) == 0.0


def test_a_fresh_vae_already_passes_colours(scene):
    torch.manual_seed(0)
    vae = start.fresh_vae(8)
    clip = latents.to_network(torch.from_numpy(scene.frames[:5])).transpose(0, 1)[None]
    with torch.no_grad():
        made = autoencoder.decode(vae, autoencoder.encode(vae, clip))
    for channel in range(3):
        pair = torch.stack([made[0, :, channel].flatten(), clip[0, :, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.6


def test_normalising_a_vae_changes_its_latents_alone(scene):
    vae = noisy(Vae(8))
    clip = latents.to_network(torch.from_numpy(scene.frames[:5]))[None]
    with torch.no_grad():
        before = autoencoder.decode(vae, autoencoder.encode(vae, clip.transpose(1, 2)))
        start.normalise(vae, clip)
        after = autoencoder.encode(vae, clip.transpose(1, 2))
        cells = after.transpose(0, 2).flatten(1)
        torch.testing.assert_close(cells.mean(1), torch.zeros(16), rtol=0, atol=1e-3)
        torch.testing.assert_close(cells.std(1), torch.ones(16), rtol=0, atol=1e-3)
        torch.testing.assert_close(autoencoder.decode(vae, after), before, rtol=0, atol=2e-3)


def test_steps_of_both_trainings_lower_their_loss(tmp_path, scene):
    torch.manual_seed(0)
    vae = start.fresh_vae(8)
    clip = latents.to_network(torch.from_numpy(scene.frames[:1, 32:64, 32:64])).transpose(0, 1)
    optimizer = NanoOptimizer([], vae.parameters())
    optimizer.set_rates(0, 1e-3)
    seen = []
    for _ in range(12):
        loss, _ = train_vae.losses(vae, clip[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]

    model, texts = fresh_transformer(NANO), texts_of([torch.zeros(TEXT_TOKENS, NANO.text_dim)])
    known = BatchConditions(
        torch.zeros(2, dtype=torch.long), randn(2, 9, NANO.clip_dim),
        randn(2, LATENT_CHANNELS, 1, 4, 4), None,
    )  # fmt: skip
    optimizer, seen = NanoOptimizer([], model.parameters()), []
    optimizer.set_rates(0, 1e-3)
    for _ in range(10):
        torch.manual_seed(1)
        clean = randn(2, LATENT_CHANNELS, 1, 4, 4)
        loss = train.losses(model, texts, clean, known, torch.ones(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]


def test_the_loss_weighs_more_where_the_skeleton_is():
    pose = torch.zeros(1, LATENT_CHANNELS, 1, 10, 6)
    pose[:, :, :, 4, 2] = 1.0
    weight = train.body_weight(pose)
    assert weight.shape == (1, 1, 1, *CELLS)
    heavy = weight[0, 0, 0] == 1 + train.BODY
    assert heavy[6:12, 2:8].all() and heavy.sum() == 36
    assert (weight[0, 0, 0][~heavy] == 1).all()


def test_a_scene_is_a_function_of_its_number(tmp_path, scene):
    again = scenes.read(scenes.write(3, tmp_path))
    for name in ("picture", "frames", "skeleton"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scene, name))
    assert scene.frames.shape == (scenes.FRAMES, scenes.HEIGHT, scenes.WIDTH, 3)
    other = scenes.plan(4)
    assert other.look != scenes.plan(3).look
    assert np.abs(other.joints - scenes.plan(3).joints).max() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["0000003.npz"]


def test_a_batch_is_a_window_of_its_scenes_and_of_their_skeletons(tmp_path):
    draw = torch.Generator().manual_seed(0)
    made = latents.Encoded(*(
        torch.randn(shape, generator=draw).half()
        for shape in ((16, 6, 4, 4), (16, 6, 2, 2), (16, 1, 4, 4), (257, NANO.clip_dim))
    ))  # fmt: skip
    latents.write(made, tmp_path / "0000001.safetensors")
    pool = train.LatentPool(tmp_path, random.Random(0))
    clean, known = pool.batch(train.Batch(2, 3))
    assert clean.shape == (3, 16, 2, 4, 4)
    for clip, pose in zip(clean, known.pose, strict=True):
        starts = [s for s in range(5) if torch.equal(clip, made.clip[:, s : s + 2].float())]
        assert len(starts) == 1
        torch.testing.assert_close(pose, made.pose[:, starts[0] : starts[0] + 2].float())


def test_a_perfect_clip_is_judged_perfect_and_an_empty_room_worthless():
    planned = scenes.plan(scenes.HELD_OUT, 5)
    truth = scenes.draw(planned)
    best = judge.judge(truth, truth, planned)
    assert best.limb_iou == 1.0
    assert best.identity == pytest.approx(0, abs=1e-6) and best.psnr > 90
    empty = judge.judge(np.repeat(judge.empty_room(planned)[None], 5, 0), truth, planned)
    assert empty.limb_iou == 0.0
    assert empty.identity > 0.8


def test_a_wrong_pose_and_a_wrong_colour_are_told_apart():
    planned = scenes.plan(scenes.HELD_OUT + 1, 5)
    truth = scenes.draw(planned)
    moved, swapped = np.roll(truth, 8, axis=2), truth[..., ::-1].copy()
    wrong_place, wrong_colour = (judge.judge(clip, truth, planned) for clip in (moved, swapped))
    assert wrong_place.limb_iou < 0.45
    assert wrong_colour.identity > 0.7 > wrong_place.identity


def test_pixels_belong_to_the_limb_whose_bones_are_nearest():
    planned = scenes.plan(scenes.HELD_OUT, 5)
    near = judge.limbs_of(planned.joints[:, 0])
    camera = judge.base_camera(scenes.HEIGHT, scenes.WIDTH)
    for number, chain in enumerate(judge.LIMBS):
        x, y, z = planned.joints[2, 0, chain[2]]
        column, row = camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy
        assert near[2, int(row), int(column)] == number


def test_half_precision_files_hold_what_was_trained(tmp_path):
    vae = noisy(Vae(8))
    make.save(vae, tmp_path / "vae" / "wan_2.1_vae.safetensors")
    from engine.models.vae import load_vae

    cpu = torch.device("cpu")
    found = load_vae(tmp_path / "vae" / "wan_2.1_vae.safetensors", cpu, torch.float32)
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, vae.state_dict()[name], rtol=1e-3, atol=1e-4)
