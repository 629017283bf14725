"""The video VAE: its numbers against two oracles, its streams, its loader."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.errors import BadCheckpoint, EngineError, MissingModel
from engine.golden import vae as golden_vae
from engine.models.vae import LATENT_MEAN, LATENT_STD, Vae, load_vae

CPU = torch.device("cpu")
FIRST = "encoder.conv1.weight"


def random_vae(width=4, seed=0):
    torch.manual_seed(seed)
    vae = Vae(width)
    for name, weight in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return vae.requires_grad_(False)


def random_clip(frames, height=16, width=24, seed=1):
    return torch.rand(3, frames, height, width, generator=torch.manual_seed(seed)) * 2 - 1


def random_latents(count, height=2, width=3, seed=2):
    return torch.randn(16, count, height, width, generator=torch.manual_seed(seed))


def decoded(vae, latents, step=1):
    return torch.cat(list(vae.decode(latents, step)), dim=1)


def difference(got, want):
    assert got.shape == want.shape
    return (got - want).abs().max().item()


def relative_error(got, want):
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


# Goldens


@pytest.mark.golden
def test_every_golden_case_is_recomputed(golden):
    checks = list(golden_vae.checks(golden / "encoders" / "vae.safetensors"))
    assert len(checks) == 16  # 6 encodes, 5 decodes raw and clamped
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
@pytest.mark.parametrize(
    "damaged, failing",
    [
        ("encode.32x48.t5.latent", {"encode.32x48.t5.latent"}),
        ("decode.4x6.t3.raw", {"decode.4x6.t3.raw"}),
        ("decode.4x6.t3.video", {"decode.4x6.t3.video"}),
        ("decode.6x4.t2.latent", {"decode.6x4.t2.raw", "decode.6x4.t2.video"}),
    ],
)
def test_a_damaged_golden_value_fails_its_check_alone(golden, tmp_path, damaged, failing):
    tensors = load_file(golden / "encoders" / "vae.safetensors")
    tensors[damaged].view(-1)[7] += 1e-2
    save_file(tensors, tmp_path / "renamed.safetensors")
    failed = {c.check for c in golden_vae.checks(tmp_path / "renamed.safetensors") if not c.ok}
    assert failed == {f"renamed.safetensors: {name}" for name in failing}


@pytest.mark.golden
def test_golden_files_of_the_vae_and_no_others_are_recognised(golden):
    found = []
    for path in golden.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if golden_vae.recognises(frozenset(file.keys()), file.metadata() or {}):
                found.append(path.name)
    assert found == ["vae.safetensors"]


@pytest.mark.golden
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision_stays_near_the_golden_values(golden, tmp_path, dtype, limit):
    tensors = load_file(golden / "encoders" / "vae.safetensors")
    weights = {n[8:]: w for n, w in tensors.items() if n.startswith("weights.")}
    save_file(weights, tmp_path / "vae.safetensors")
    vae = load_vae(tmp_path / "vae.safetensors", CPU, dtype)
    latents = vae.encode([tensors["encode.32x48.t5.input"]])
    video = decoded(vae, tensors["decode.4x6.t2.latent"])
    assert latents.dtype == video.dtype == torch.float32
    # Not zero: that would mean that the weights were not in half precision at all.
    assert 1e-5 < relative_error(latents, tensors["encode.32x48.t5.latent"]) < limit
    assert 1e-5 < relative_error(video, tensors["decode.4x6.t2.video"]) < limit


# Oracle: diffusers, with the key mapping of docs/reference/encoders.md 1.5

RESBLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}


def diffusers_name(name):
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    half, part, number, rest = module.split(".", 3)
    rest = RESBLOCK.get(rest, rest)
    number = int(number)
    if part == "middle":
        place = "mid_block." + ("resnets.0", "attentions.0", "resnets.1")[number]
    elif part == "downsamples":
        place = f"down_blocks.{number}"
    else:
        block, layer = divmod(number, 4)
        place = f"up_blocks.{block}." + ("upsamplers.0" if layer == 3 else f"resnets.{layer}")
    return f"{half}.{place}.{rest}.{leaf}"


@pytest.fixture(scope="module")
def oracle():
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae = random_vae(width=12, seed=5)
    theirs = AutoencoderKLWan(base_dim=12)
    state = {diffusers_name(name): weight for name, weight in vae.state_dict().items()}
    assert len(state) == 194
    theirs.load_state_dict(state, strict=True)
    return vae, theirs.eval()


def test_the_latent_statistics_are_those_of_diffusers(oracle):
    _, theirs = oracle
    assert tuple(theirs.config.latents_mean) == LATENT_MEAN
    assert tuple(theirs.config.latents_std) == LATENT_STD


@torch.inference_mode()
def test_encoding_agrees_with_diffusers(oracle):
    vae, theirs = oracle
    clip = random_clip(13, height=40, width=24, seed=6)
    mean = theirs.encode(clip[None]).latent_dist.mode()[0]
    statistics = torch.tensor([LATENT_MEAN, LATENT_STD])[:, :, None, None, None]
    assert difference(vae.encode([clip]), (mean - statistics[0]) / statistics[1]) < 2e-5


@torch.inference_mode()
def test_decoding_agrees_with_diffusers(oracle):
    vae, theirs = oracle
    latents = random_latents(4, height=5, width=3, seed=7)
    statistics = torch.tensor([LATENT_MEAN, LATENT_STD])[:, :, None, None, None]
    want = theirs.decode((latents * statistics[1] + statistics[0])[None]).sample[0]
    assert difference(decoded(vae, latents), want) < 2e-5


# Streams


@pytest.mark.parametrize("sizes", [[17], [1] * 17, [1, 4, 4, 4, 4], [3, 0, 9, 5], [16, 1]])
def test_the_cut_of_the_pieces_does_not_change_the_latents(sizes):
    vae, clip = random_vae(), random_clip(17)
    want = torch.cat(list(encoded_by_step(vae, clip, 4)), dim=1)
    assert difference(vae.encode(clip.split(sizes, dim=1)), want) == 0.0


def encoded_by_step(vae, clip, step):
    history = {}
    yield vae.encode_step(clip[:, :1], history)
    for chunk in clip[:, 1:].split(step, dim=1):
        yield vae.encode_step(chunk, history)


@pytest.mark.parametrize("step", [4, 8, 12, 16])
def test_the_encoder_gives_the_same_latents_at_every_step(step):
    vae, clip = random_vae(), random_clip(17)
    got = torch.cat(list(encoded_by_step(vae, clip, step)), dim=1)
    assert difference(got, vae.encode([clip])) < 1e-5


def test_the_first_latent_is_that_of_the_first_frame_alone():
    vae, clip = random_vae(), random_clip(9)
    assert difference(vae.encode([clip])[:, :1], vae.encode([clip[:, :1]])) == 0.0


@pytest.mark.parametrize("step", [2, 3, 5, 100])
def test_the_decoder_gives_the_same_frames_at_every_step(step):
    vae, latents = random_vae(), random_latents(6)
    assert difference(decoded(vae, latents, step), decoded(vae, latents)) < 1e-5


def test_decoding_gives_one_frame_and_then_four_for_each_latent():
    pieces = list(random_vae().decode(random_latents(6), step=2))
    assert [piece.shape[1] for piece in pieces] == [1, 8, 8, 4]


def test_a_step_of_the_decoder_needs_no_later_latent():
    vae, latents = random_vae(), random_latents(3)
    changed = latents.clone()
    changed[:, 2] += 1
    got, want = decoded(vae, changed), decoded(vae, latents)
    assert difference(got[:, :5], want[:, :5]) == 0.0
    assert difference(got[:, 5:], want[:, 5:]) > 1e-3


def test_two_streams_may_run_interleaved():
    vae, one, two = random_vae(), random_latents(4, seed=3), random_latents(4, 3, 2, seed=4)
    pairs = list(zip(vae.decode(one), vae.decode(two), strict=True))
    assert difference(torch.cat([a for a, _ in pairs], dim=1), decoded(vae, one)) == 0.0
    assert difference(torch.cat([b for _, b in pairs], dim=1), decoded(vae, two)) == 0.0


def test_decoded_frames_are_the_raw_ones_clamped():
    vae, latents, history = random_vae(), random_latents(2), {}
    vae.get_parameter("decoder.head.2.bias").copy_(torch.tensor([9.0, -9.0, 0.0]))
    raw = torch.cat([vae.decode_step(z, history) for z in latents.split(1, dim=1)], dim=1)
    assert raw[0].max() > 1
    assert raw[1].min() < -1
    assert difference(decoded(vae, latents), raw.clamp(-1, 1)) == 0.0


# Rules of the interface


@pytest.mark.parametrize("count", [2, 4, 6, 7, 8])
def test_a_clip_that_is_not_4k_plus_1_frames_is_refused(count):
    with pytest.raises(EngineError, match=r"trim the clip to 4k \+ 1"):
        random_vae().encode([random_clip(count)])


@pytest.mark.parametrize("pieces", [[], [torch.zeros(3, 0, 16, 16)]])
def test_a_clip_without_frames_is_refused(pieces):
    with pytest.raises(EngineError, match="no frames"):
        random_vae().encode(pieces)


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([torch.zeros(3, 1, 12, 16)], "16x12 .* multiples of 8"),
        ([torch.zeros(3, 1, 16, 20)], "20x16 .* multiples of 8"),
        ([torch.zeros(3, 1, 0, 16)], "16x0"),
        ([torch.zeros(3, 1, 16, 16), torch.zeros(3, 4, 16, 24)], "24x16 in a clip of 16x16"),
        ([torch.zeros(4, 1, 16, 16)], r"not torch.float32 \[4, 1, 16, 16\]"),
        ([torch.zeros(3, 16, 16)], r"\[3, 16, 16\]"),
        ([torch.zeros(3)], r"\[3\]"),
        ([torch.zeros(3, 1, 16, 16, dtype=torch.uint8)], "torch.uint8"),
    ],
)
def test_pieces_of_a_wrong_size_or_type_are_refused(pieces, message):
    with pytest.raises(EngineError, match=message):
        random_vae().encode(pieces)


@pytest.mark.parametrize("shape", [(16, 0, 2, 2), (15, 1, 2, 2), (16, 2, 2), (1, 16, 1, 2, 2)])
def test_latents_of_a_wrong_shape_are_refused_at_once(shape):
    with pytest.raises(EngineError, match=r"latents \[16, t, h, w\], not"):
        random_vae().decode(torch.zeros(shape))


def test_a_decoding_step_below_one_latent_is_refused():
    with pytest.raises(EngineError, match="not 0"):
        random_vae().decode(random_latents(2), step=0)


def test_a_stream_that_begins_with_more_than_one_frame_is_refused():
    with pytest.raises(EngineError, match="begins with one frame, not 5"):
        random_vae().encode_step(random_clip(5), {})
    with pytest.raises(EngineError, match="begins with one frame, not 2"):
        random_vae().decode_step(random_latents(2), {})


# The loader


@pytest.fixture(scope="module")
def weights():
    return dict(random_vae(seed=9).state_dict())


def write(path, weights):
    torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "wan_2.1_vae.safetensors"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_copy_of_the_weights_is_read_exactly(tmp_path, weights, name, prefix, stored):
    held = {prefix + key: weight.to(stored) for key, weight in weights.items()}
    vae = load_vae(write(tmp_path / name, held), CPU, torch.float32)
    loaded = vae.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], held[prefix + key].float()) for key in weights)
    assert not any(weight.requires_grad for weight in vae.parameters())


def test_a_loaded_vae_computes_what_the_saved_one_did(tmp_path, weights):
    vae = load_vae(write(tmp_path / "vae.safetensors", weights), CPU, torch.float32)
    latents = random_latents(2)
    assert difference(decoded(vae, latents), decoded(random_vae(seed=9), latents)) < 1e-5


def test_the_weights_outlive_their_file(tmp_path, weights):
    vae = load_vae(write(tmp_path / "vae.pth", weights), CPU, torch.float32)
    (tmp_path / "vae.pth").write_bytes(b"")
    assert torch.equal(vae.state_dict()[FIRST], weights[FIRST])


def without(weights, name):
    return {key: weight for key, weight in weights.items() if key != name}


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: without(w, "decoder.head.2.bias"), "decoder.head.2.bias is missing, and 0 more"),
        (lambda w: without(w, FIRST), f"is not a Wan 2.1 VAE.* {FIRST}"),
        (lambda w: w | {"decoder.extra": torch.zeros(1)}, "holds decoder.extra"),
        (lambda w: w | {"conv2.bias": torch.zeros(48)}, r"conv2.bias is \(48,\), expected \(16,\)"),
        (lambda w: w | {FIRST: torch.zeros(8, 3, 3, 3, 3)}, r"is \(\d+,.*expected \(\d+,"),
        (lambda w: w | {FIRST: torch.zeros(8, 12, 3, 3, 3)}, "is not a Wan 2.1 VAE"),
        (lambda w: w | {FIRST: torch.zeros(0, 3, 3, 3, 3)}, "is not a Wan 2.1 VAE"),
        (lambda w: w | {FIRST: torch.tensor(1.0)}, "is not a Wan 2.1 VAE"),
        (lambda w: w | {"conv2.bias": torch.full((16,), torch.nan)}, "conv2.bias .* not finite"),
        (lambda w: w | {"conv2.bias": torch.zeros(16, dtype=torch.int32)}, "is torch.int32"),
        (lambda w: {"blocks.0.weight": torch.zeros(4, 4)}, "is not a Wan 2.1 VAE"),
        (lambda w: {}, "is not a Wan 2.1 VAE: among its 0 tensors"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, weights, name, damage, message):
    path = write(tmp_path / name, damage(weights))
    with pytest.raises(BadCheckpoint, match=rf"(?s)^{name}.*{message}"):
        load_vae(path, CPU, torch.float32)


def test_weights_that_overflow_in_half_precision_are_refused(tmp_path, weights):
    path = write(tmp_path / "vae.pth", weights | {"conv2.bias": torch.full((16,), 1e6)})
    with pytest.raises(BadCheckpoint, match=r"not finite in torch.float16"):
        load_vae(path, CPU, torch.float16)
    assert load_vae(path, CPU, torch.bfloat16).get_parameter("conv2.bias").isfinite().all()


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, weights, name, keep):
    path = write(tmp_path / name, weights)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BadCheckpoint, match=name):
        load_vae(path, CPU, torch.float32)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(MissingModel, match=r"vae\.pth"):
        load_vae(tmp_path / "vae.pth", CPU, torch.float32)
