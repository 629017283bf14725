"""Every kind of change that LoRA files hold is merged by its definition, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from tests.support.checkpoints import save, small_weights
from tests.support.loras import ONE, merged

MODULE = "blocks.0.ffn.0"  # [192, 128]
NAME = f"{MODULE}.weight"
STEM = f"diffusion_model.{MODULE}"
ALPHA, RANK = 2.0, 4


def base():
    return small_weights()[NAME]


def close(got, want):
    return (got - want).abs().max() <= 1e-6 * max(1.0, want.abs().max().item())


def loha(stem=STEM):
    shapes = {"w1_a": (192, RANK), "w1_b": (RANK, 128), "w2_a": (192, RANK), "w2_b": (RANK, 128)}
    held = {f"{stem}.hada_{key}": torch.randn(shape) for key, shape in shapes.items()}
    w1a, w1b, w2a, w2b = held.values()
    return held | {f"{stem}.alpha": torch.tensor(ALPHA)}, ALPHA / RANK * (w1a @ w1b) * (w2a @ w2b)


def lokr(w1, w2, stem=STEM, rank=RANK):
    """Factors [12, 8] and [16, 16], each whole or a product of a rank."""
    held, factors = {}, []
    for name, shape, is_whole in (("w1", (12, 8), w1), ("w2", (16, 16), w2)):
        if is_whole:
            held[f"{stem}.lokr_{name}"] = torch.randn(shape)
            factors.append(held[f"{stem}.lokr_{name}"])
        else:
            a, b = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
            held |= {f"{stem}.lokr_{name}_a": a, f"{stem}.lokr_{name}_b": b}
            factors.append(a @ b)
    factor = 1.0 if w1 and w2 else ALPHA / rank
    alpha = 10000.0 if w1 and w2 else ALPHA
    return held | {f"{stem}.alpha": torch.tensor(alpha)}, factor * torch.kron(*factors)


def lora():
    held = {f"{STEM}.lora_down.weight": torch.randn(RANK, 128),
            f"{STEM}.lora_up.weight": torch.randn(192, RANK)}  # fmt: skip
    down, up = held.values()
    return held | {f"{STEM}.alpha": torch.tensor(ALPHA)}, ALPHA / RANK * (up @ down)


KINDS = {
    "pair": lora,
    "LoHa": loha,
    "LoKr of whole factors": lambda: lokr(True, True),
    "LoKr of a product": lambda: lokr(True, False),
    "LoKr of products": lambda: lokr(False, False),
    "LoKr of the other product": lambda: lokr(False, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_every_kind_of_change_is_added(tmp_path, kind, strength):
    held, change = KINDS[kind]()
    assert close(merged(tmp_path, held, strength)[NAME], base() + strength * change)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_magnitudes_turn_the_changed_weight_to_their_length(tmp_path, kind, axis, strength):
    held, change = KINDS[kind]()
    w = base()
    magnitude = torch.rand((192, 1) if axis == "out" else (1, 128)) + 0.5
    held[f"{STEM}.dora_scale"] = magnitude
    v = w + change
    turned = magnitude * v / (v.norm(dim=1 if axis == "out" else 0, keepdim=True) + 1e-7)
    got = merged(tmp_path, held, strength)[NAME]
    assert close(got, w + strength * (turned - w))


@pytest.mark.parametrize(
    "ending",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ],
)
def test_magnitudes_of_peft_are_one_an_output(tmp_path, ending):
    held, change = lora()
    del held[f"{STEM}.alpha"]
    magnitude = torch.rand(192)
    held[f"{STEM}.{ending}"] = magnitude
    v = base() + change * RANK / ALPHA
    assert close(merged(tmp_path, held)[NAME], magnitude[:, None] * v / v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_magnitudes_of_a_convolution_go_over_all_its_taps(tmp_path, axis):
    name = "patch_embedding.weight"  # [128, 20, 1, 2, 2]
    w = small_weights()[name]
    down, up = torch.randn(RANK, 20, 1, 2, 2), torch.randn(128, RANK, 1, 1, 1)
    shape = (128, 1, 1, 1, 1) if axis == "out" else (1, 20, 1, 1, 1)
    magnitude = torch.rand(shape)
    got = merged(tmp_path, {
        "patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up,
        "patch_embedding.dora_scale": magnitude,
    })[name]  # fmt: skip
    v = w + (up.flatten(1) @ down.flatten(1)).view(w.shape)
    over = (1, 2, 3, 4) if axis == "out" else (0, 2, 3, 4)
    assert close(got, magnitude * v / v.square().sum(over, keepdim=True).sqrt())


def test_a_lokr_of_a_convolution_is_flat_behind_its_rows(tmp_path):
    name = "patch_embedding.weight"
    w1, w2 = torch.randn(8, 5), torch.randn(16, 4, 1, 2, 2)
    got = merged(tmp_path, {"patch_embedding.lokr_w1": w1, "patch_embedding.lokr_w2": w2})[name]
    w = small_weights()[name]
    assert close(got, w + torch.kron(w1, w2.flatten(1)).view(w.shape))
    by_hand = w[3, 7, 0, 1, 0] + w1[0, 1] * w2[3, 3, 0, 1, 0]  # 7 = 1 * 4 + 3
    assert torch.allclose(got[3, 7, 0, 1, 0], by_hand)


def test_magnitudes_come_before_what_another_file_adds(tmp_path):
    weights = small_weights()
    with_magnitudes, change = lora()
    magnitude = torch.rand(192, 1)
    with_magnitudes[f"{STEM}.dora_scale"] = magnitude
    plain = {f"{STEM}.diff": torch.randn(192, 128)}
    model = save(weights, tmp_path / "m.safetensors")
    one = save(with_magnitudes, tmp_path / "1.safetensors")
    two = save(plain, tmp_path / "2.safetensors")
    v = weights[NAME] + change
    want = magnitude * v / v.norm(dim=1, keepdim=True) + 0.5 * plain[f"{STEM}.diff"]
    for order in ((Lora(one), Lora(two, 0.5)), (Lora(two, 0.5), Lora(one))):
        got = torch.empty(192, 128)
        Checkpoint(model, loras=order).read_into(NAME, got)
        assert close(got, want)


def test_two_files_with_magnitudes_for_one_weight_are_refused(tmp_path):
    held, _ = lora()
    held[f"{STEM}.dora_scale"] = torch.rand(192, 1)
    model = save(small_weights(), tmp_path / "m.safetensors")
    loras = [Lora(save(held, tmp_path / f"{n}.safetensors")) for n in range(2)]
    with pytest.raises(BadCheckpoint, match=r"0\.safetensors and 1\.safetensors both set the magn"):
        Checkpoint(model, loras=loras)


def test_a_weight_that_is_set_is_not_scaled_and_comes_first(tmp_path):
    held, change = lora()
    value = torch.randn(192, 128)
    held |= {f"{STEM}.set_weight": value, f"{STEM}.reshape_weight": torch.tensor([192, 128])}
    assert close(merged(tmp_path, held, 0.5)[NAME], value + 0.5 * change)


def test_a_bias_may_be_set_by_its_own_name(tmp_path):
    value = torch.randn(192)
    got = merged(tmp_path, {f"{STEM}.bias.set_weight": value})
    assert torch.equal(got[f"{MODULE}.bias"], value)


@pytest.mark.parametrize("settings", [
    {"peft_type": "LOHA", "alpha": 8, "r": RANK}, {"peft_type": "LOHA", "alpha": 8},
])  # fmt: skip
def test_the_alpha_of_pefts_loha_is_in_its_configuration(tmp_path, settings):
    held, change = loha(f"base_model.model.{MODULE}")
    held = {f"{n}.default": t for n, t in held.items() if not n.endswith("alpha")}
    path = tmp_path / "lora.safetensors"
    save_file(held, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    model = save(small_weights(), tmp_path / "m.safetensors")
    got = torch.empty(192, 128)
    Checkpoint(model, loras=[Lora(path)]).read_into(NAME, got)
    assert close(got, base() + change * (8 / RANK) / (ALPHA / RANK))


def test_the_alpha_of_pefts_lokr_counts_whole_or_not(tmp_path):
    held, change = lokr(True, True)
    held = {n: t for n, t in held.items() if not n.endswith("alpha")}
    path = tmp_path / "lora.safetensors"
    settings = {"peft_type": "LOKR", "alpha": 8, "r": 16}
    save_file(held, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    model = save(small_weights(), tmp_path / "m.safetensors")
    got = torch.empty(192, 128)
    Checkpoint(model, loras=[Lora(path)]).read_into(NAME, got)
    assert close(got, base() + 0.5 * change)


def less(held, *endings):
    return {n: t for n, t in held.items() if not n.endswith(endings)}


REFUSED = {
    "LoHa without a factor": (less(loha()[0], "w2_b"), r"lacks hada_w2_b of the LoHa for blocks"),
    "LoHa of two widths": (
        loha()[0] | {f"{STEM}.hada_w2_b": torch.ones(RANK, 64)}, "cannot be added to blocks",
    ),
    "LoHa of rank 0": (
        {n: t[:, :0] if "_a" in n else t[:0] for n, t in less(loha()[0], "alpha").items()},
        "cannot be added to blocks",
    ),
    "half a factor of LoKr": (less(lokr(False, False)[0], "w2_b"), "lokr_w2 neither whole nor"),
    "a factor of LoKr twice": (
        lokr(False, False)[0] | {f"{STEM}.lokr_w1": torch.ones(12, 8)}, "lokr_w1 neither whole nor",
    ),
    "LoKr of another shape": (
        lokr(True, True)[0] | {f"{STEM}.lokr_w1": torch.ones(11, 8)}, "cannot be added to blocks",
    ),
    "LoKr of nothing": (
        lokr(True, True)[0] | {f"{STEM}.lokr_w1": torch.ones(0, 8)}, "cannot be added to blocks",
    ),
    "two kinds at once": (loha()[0] | lora()[0], "more than one kind of change for blocks.0.ffn.0"),
    "magnitudes alone": ({f"{STEM}.dora_scale": torch.ones(192, 1)}, "belongs to a pair that"),
    "magnitudes of another weight": (
        lora()[0] | {f"{STEM}.dora_scale": torch.ones(7, 1)}, r"\[7, 1\] is no magnitude of a weig",
    ),
    "magnitudes of each value": (
        lora()[0] | {f"{STEM}.dora_scale": torch.ones(192, 128)}, "is no magnitude of a weight",
    ),
    "magnitudes that are NaN": (
        lora()[0] | {f"{STEM}.dora_scale": torch.full((192, 1), torch.nan)}, "is not finite once",
    ),
    "magnitudes of integers": (
        lora()[0] | {f"{STEM}.dora_scale": torch.ones(192, 1).int()}, "is stored as torch.int32",
    ),
    "a shape with more inputs": (
        {"patch_embedding.reshape_weight": torch.tensor([128, 36, 1, 2, 2])} | ONE,
        r"asks for the shape \[128, 36, 1, 2, 2\]",
    ),
    "a shape of floats": ({f"{STEM}.reshape_weight": torch.ones(2)} | ONE, "asks for the shape"),
    "a shape without end": (
        {f"{STEM}.reshape_weight": torch.ones(5000).int()} | ONE, "asks for the shape",
    ),
    "a weight set to another shape": (
        {f"{STEM}.set_weight": torch.ones(192, 64)}, "cannot be added to blocks",
    ),
    "a core of LoHa": (loha()[0] | {f"{STEM}.hada_t1": torch.ones(4, 4, 1, 1)}, "LoHa with a core"),
    "a core of LoKr": (
        lokr(True, True)[0] | {f"{STEM}.lokr_t2": torch.ones(4, 4, 1, 1)}, "LoKr with a core",
    ),
    "OFT": ({f"{STEM}.oft_blocks": torch.ones(4, 4, 4)}, "belongs to OFT or BOFT, which"),
    "GLoRA": ({f"{STEM}.a1.weight": torch.ones(4, 4)}, "belongs to GLoRA"),
    "IA3": ({f"{STEM}.on_input": torch.ones(1)}, "belongs to IA3"),
    "an absurd rank": (
        {f"{STEM}.lora_down.weight": torch.zeros(400, 128),
         f"{STEM}.lora_up.weight": torch.zeros(192, 400)},
        "cannot be added to blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_change_that_cannot_be_made_is_refused(tmp_path, case):
    held, message = REFUSED[case]
    with pytest.raises(BadCheckpoint, match=message) as caught:
        merged(tmp_path, held)
    assert str(caught.value).startswith("lora.safetensors")


# --- names of diffusers


DIFFUSERS = {
    "blocks.1.attn1.to_q": "blocks.1.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.0.ffn.net.2": "blocks.0.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
TABLES = {
    "blocks.0.scale_shift_table.diff": "blocks.0.modulation",
    "scale_shift_table.diff": "head.modulation",
    "blocks.0.norm2.diff": "blocks.0.norm3.weight",
    "blocks.0.norm2.diff_b": "blocks.0.norm3.bias",
    "blocks.0.attn2.norm_added_k.diff": "blocks.0.cross_attn.norm_k_img.weight",
    "condition_embedder.image_embedder.norm1.diff": "img_emb.proj.0.weight",
    "condition_embedder.image_embedder.norm2.diff_b": "img_emb.proj.4.bias",
}


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
def test_the_names_of_diffusers_are_those_of_the_model(tmp_path, prefix):
    weights = small_weights()
    held, want = {}, dict(weights)
    for theirs, ours in DIFFUSERS.items():
        rows, columns = weights[f"{ours}.weight"].shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        held |= {f"{prefix}{theirs}.lora_A.weight": down, f"{prefix}{theirs}.lora_B.weight": up}
        want[f"{ours}.weight"] = weights[f"{ours}.weight"] + up @ down
    for theirs, ours in TABLES.items():
        held[f"{prefix}{theirs}"] = torch.randn(weights[ours].shape)
        want[ours] = weights[ours] + held[f"{prefix}{theirs}"]
    got = merged(tmp_path, held)
    for name, weight in want.items():
        assert torch.allclose(got[name], weight, atol=1e-5), name


def test_patterns_of_alphas_may_have_the_names_of_diffusers(tmp_path):
    down, up = torch.randn(RANK, 128), torch.randn(128, RANK)
    stem = "transformer.blocks.0.attn1.to_q"
    path = tmp_path / "lora.safetensors"
    settings = {"lora_alpha": 4, "r": RANK, "alpha_pattern": {"attn1.to_q": 8}}
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path,
              metadata={"lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    weights = small_weights()
    got, name = torch.empty(128, 128), "blocks.0.self_attn.q.weight"
    checkpoint = Checkpoint(save(weights, tmp_path / "m.safetensors"), loras=[Lora(path)])
    checkpoint.read_into(name, got)
    assert torch.allclose(got, weights[name] + 2 * up @ down, atol=1e-5)
