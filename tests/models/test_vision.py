"""The CLIP image encoder: its preprocessing, every file layout, and refusal of wrong files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import BadCheckpoint, BadMedia, MissingModel
from engine.golden import encoders as golden_encoders
from engine.models.vision import MEAN, STD, VisionEncoder, preprocess

CPU = torch.device("cpu")
WIDTH, BLOCKS, PATCH, SIDE, HIDDEN = 160, 3, 14, 3, 320


def clip(width=WIDTH, blocks=BLOCKS):
    """Weights under the official names; 2 heads of 80, pictures of 42 x 42."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, SIDE * SIDE + 1, width),
        "visual.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "visual.head": (width, 32),
    }
    layers = {"norm1": (width,), "norm2": (width,)}
    layers |= {"attn.to_qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.0": (HIDDEN, width), "mlp.2": (width, HIDDEN)}
    named = {f"transformer.{n}.{k}": shape for n in range(blocks) for k, shape in layers.items()}
    for name, shape in {**named, "pre_norm": (width,), "post_norm": (width,)}.items():
        shapes |= {f"visual.{name}.weight": shape, f"visual.{name}.bias": shape[:1]}
    return {
        name: torch.randn(shape, generator=generator) * 0.15 + ("norm" in name)
        for name, shape in shapes.items()
    }


def with_library_names(weights):
    """Names of clip_vision_h.safetensors: blocks named as in transformers, q, k and v apart."""
    renamed = {
        "embeddings.class_embedding": weights["visual.cls_embedding"][0, 0],
        "embeddings.position_embedding.weight": weights["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": weights["visual.patch_embedding.weight"],
    }
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    names |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = weights[f"visual.pre_norm.{kind}"]
        renamed[f"post_layernorm.{kind}"] = weights[f"visual.post_norm.{kind}"]
        for n in range(BLOCKS):
            for theirs, ours in names.items():
                source = weights[f"visual.transformer.{n}.{theirs}.{kind}"]
                renamed[f"encoder.layers.{n}.{ours}.{kind}"] = source
            qkv = weights[f"visual.transformer.{n}.attn.to_qkv.{kind}"].chunk(3)
            for part, third in zip("qkv", qkv):
                renamed[f"encoder.layers.{n}.self_attn.{part}_proj.{kind}"] = third.clone()
    renamed = {f"vision_model.{name}": weight for name, weight in renamed.items()}
    return {**renamed, "visual_projection.weight": torch.randn(8, WIDTH)}


def encode(folder, weights, name="clip.safetensors", dtype=torch.float32):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return VisionEncoder(path, CPU, dtype)(picture())


def picture():
    return torch.rand(3, 50, 31, generator=torch.Generator().manual_seed(9)) * 2.2 - 1.1


@pytest.fixture
def weights():
    return clip()


@pytest.mark.golden
def test_every_golden_of_the_image_encoder_is_reached(golden):
    checks = list(golden_encoders.checks(golden / "encoders" / "clip_visual.safetensors"))
    assert {check.check.rpartition(".")[2] for check in checks} == {"pixels", "features"}
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
@pytest.mark.parametrize(
    ("tensor", "failing"),
    [
        ("weights.visual.transformer.2.attn.to_qkv.weight", ["48x80.features", "96x64.features"]),
        ("weights.visual.pos_embedding", ["48x80.features", "96x64.features"]),
        ("48x80.image", ["48x80.features", "48x80.pixels"]),
        ("preprocess224.160x280.pixels", ["preprocess224.160x280.pixels"]),
        ("weights.visual.transformer.3.attn.to_qkv.weight", []),  # the last block is never used
    ],
)
def test_a_damaged_golden_of_the_image_encoder_fails(golden, tmp_path, tensor, failing):
    source = golden / "encoders" / "clip_visual.safetensors"
    with golden_encoders.safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    tensors[tensor][..., 0] += 0.01
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    failed = {c.check for c in golden_encoders.checks(tmp_path / "x.safetensors") if not c.ok}
    assert failed == {f"x.safetensors: {name}" for name in failing}


def test_a_plain_picture_keeps_its_value_and_its_overshoot():
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    grey = preprocess(torch.full((3, 9, 30), 0.5), 224)
    torch.testing.assert_close(grey, ((0.75 - mean) / std).expand(3, 224, 224))
    edge = torch.full((3, 16, 16), -1.0)
    edge[:, :, 8:] = 1.0
    back = (preprocess(edge, 64) * std + mean) * 2 - 1
    assert back.max() > 1.05  # bicubic rings, and nothing clamps it
    assert back.min() < -1.05


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3),
        torch.zeros(1, 3, 8, 8),
        torch.zeros(4, 8, 8),
    ],
)
def test_a_picture_of_another_layout_is_refused(image):
    with pytest.raises(BadMedia, match=r"expected \[3, H, W\]"):
        preprocess(image)


def test_tokens_are_the_input_of_the_last_block(tmp_path, weights):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    oracle = CLIPVisionModel(config).eval()
    library = with_library_names(weights)
    library.pop("visual_projection.weight")
    oracle.load_state_dict({k.removeprefix("vision_model."): w for k, w in library.items()})
    with torch.inference_mode():
        pixels = preprocess(picture(), SIDE * PATCH)[None]
        states = oracle(pixels, output_hidden_states=True).hidden_states
    tokens = encode(tmp_path, weights)
    torch.testing.assert_close(tokens, states[-2][0], atol=2e-5, rtol=0)
    assert (tokens - states[-1][0]).abs().max() > 0.1


def test_every_layout_of_the_same_weights_gives_the_same_tokens(tmp_path, weights):
    expected = encode(tmp_path, weights)
    library = with_library_names(weights)
    ids = torch.arange(SIDE * SIDE + 1)[None]
    whole = {**weights, "textual.token_embedding.weight": torch.zeros(4, 4)}
    headless = {k: w for k, w in weights.items() if k not in ("visual.head", "log_scale")}
    without_end = {k: w for k, w in weights.items() if "post_norm" not in k}
    got = {
        "official pickle": encode(tmp_path, weights, "official.pth"),
        "without what follows the blocks": encode(tmp_path, without_end),
        "with the text tower": encode(tmp_path, whole, "whole.pth"),
        "without the head": encode(tmp_path, headless),
        "library names": encode(tmp_path, library),
        "old library": encode(tmp_path, {**library, "vision_model.embeddings.position_ids": ids}),
    }
    assert [name for name, tokens in got.items() if not torch.equal(tokens, expected)] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_and_computed_within_their_rounding(
    tmp_path, weights, dtype
):
    half = {name: weight.to(dtype) for name, weight in weights.items()}
    exact = encode(tmp_path, {name: weight.float() for name, weight in half.items()})
    assert torch.equal(encode(tmp_path, half), exact)
    tokens = encode(tmp_path, half, dtype=dtype)
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - exact).norm() / exact.norm() < 2e-2


def test_the_number_of_heads_matters_and_must_divide_the_width(tmp_path, weights):
    tokens = encode(tmp_path, weights)
    path = tmp_path / "clip.safetensors"
    two = VisionEncoder(path, CPU, torch.float32, heads=2)(picture())
    four = VisionEncoder(path, CPU, torch.float32, heads=4)(picture())
    assert torch.equal(two, tokens)
    assert not torch.allclose(four, tokens, atol=1e-3)
    with pytest.raises(BadCheckpoint, match="width 160 does not divide into 7 heads"):
        VisionEncoder(path, CPU, torch.float32, heads=7)
    with pytest.raises(BadCheckpoint, match="width 64 does not divide into 0 heads"):
        encode(tmp_path, clip(width=64))


def dropped(name):
    return lambda weights: weights.pop(name)


def changed(name, change):
    return lambda weights: weights.update({name: change(weights.get(name))})


QKV = "visual.transformer.1.attn.to_qkv.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (dropped(QKV), rf"{QKV} is missing"),
        (dropped("visual.patch_embedding.weight"), "not a CLIP image encoder"),
        (dropped("visual.pos_embedding"), r"visual\.pos_embedding is missing"),
        (changed(QKV, lambda w: w[:-1]), rf"{QKV} is \(479, 160\), expected \(480, 160\)"),
        (changed("visual.pos_embedding", lambda w: w[:, 1:]), "has 9 rows, expected a square"),
        (changed("visual.pos_embedding", lambda w: w[0]), r"\(10, 160\), expected 3 sizes"),
        (changed("visual.cls_embedding", lambda w: w[..., 1:]), r"is \(1, 1, 159\), expected"),
        (changed("visual.extra", lambda _: torch.ones(2)), r"holds visual\.extra"),
        (changed(QKV, lambda w: w.to(torch.int8)), r"torch\.int8 without a scale"),
    ],
)
def test_a_file_of_wrong_tensors_is_refused_with_their_names(tmp_path, weights, damage, said):
    damage(weights)
    with pytest.raises(BadCheckpoint, match=said) as raised:
        encode(tmp_path, weights)
    assert "clip.safetensors" in str(raised.value)


def test_a_tower_cut_between_two_blocks_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="has 2 blocks, expected 32"):
        encode(tmp_path, clip(width=1280, blocks=2))
    with pytest.raises(BadCheckpoint, match="has 1 blocks, expected at least 2"):
        encode(tmp_path, clip(blocks=1))


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pth"])
def test_a_file_cut_short_or_empty_is_refused(tmp_path, weights, name):
    encode(tmp_path, weights, name)
    path = tmp_path / name
    for data in (path.read_bytes()[:-1000], b""):
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=name):
            VisionEncoder(path, CPU, torch.float32)
    path.unlink()
    with pytest.raises(MissingModel, match=name):
        VisionEncoder(path, CPU, torch.float32)
