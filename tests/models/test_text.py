"""The text encoder: goldens, every file layout, and refusal of wrong files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import BadCheckpoint, MissingModel
from engine.golden import encoders as golden_encoders
from engine.models.text import TextEncoder, passing_bytes
from tests.support.umt5 import (
    CPU,
    FP8,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    IDS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    embed,
    linears,
    quantised,
    umt5,
    with_library_names,
)


@pytest.fixture
def weights():
    return umt5()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["umt5.safetensors", "text_clean.json"])
def test_every_golden_of_the_text_encoder_is_reached(golden, name):
    checks = list(golden_encoders.checks(golden / "encoders" / name))
    assert len(checks) >= 4
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
@pytest.mark.parametrize(
    ("tensor", "failing"),
    [
        ("weights.blocks.1.attn.q.weight", {"L160.embedding", "L160.raw", "L512.embedding"}),
        ("weights.token_embedding.weight", {"L160.embedding", "L160.raw"}),
        ("L160.embedding", {"L160.embedding"}),
        ("L160.raw", {"L160.raw"}),
    ],
)
def test_a_damaged_golden_of_the_text_encoder_fails(golden, tmp_path, tensor, failing):
    source = golden / "encoders" / "umt5.safetensors"
    tensors = load_file(source)
    tensors[tensor][..., 0] += 0.01
    save_file(tensors, tmp_path / "damaged.safetensors")
    failed = {c.check for c in golden_encoders.checks(tmp_path / "damaged.safetensors") if not c.ok}
    assert {f"damaged.safetensors: {name}" for name in failing} <= failed


@pytest.mark.golden
def test_values_beyond_the_real_tokens_fail_the_golden(golden, tmp_path):
    tensors = load_file(golden / "encoders" / "umt5.safetensors")
    assert tensors["L512.mask"][0, -1] == 0
    tensors["L512.embedding"][0, -1, 0] = 1e-3
    save_file(tensors, tmp_path / "damaged.safetensors")
    failed = [c.check for c in golden_encoders.checks(tmp_path / "damaged.safetensors") if not c.ok]
    assert failed == ["damaged.safetensors: L512.embedding"]


@pytest.mark.golden
def test_a_damaged_cleaning_golden_fails(golden, tmp_path):
    held = json.loads((golden / "encoders" / "text_clean.json").read_text("utf-8"))
    held["cases"][3]["cleaned"] += "."
    (tmp_path / "cases.json").write_text(json.dumps(held))
    failed = [
        check.check for check in golden_encoders.checks(tmp_path / "cases.json") if not check.ok
    ]
    assert failed == ["cases.json: case 3"]


def test_only_the_three_kinds_of_encoder_goldens_are_recognised():
    def taken(*names):
        return golden_encoders.recognises(frozenset(names), {})

    assert taken("weights.token_embedding.weight", "L8.ids")
    assert taken("weights.visual.patch_embedding.weight", "8x8.image")
    assert taken("ftfy_version", "rule", "cases")
    assert not taken("weights.encoder.conv1.weight", "encode.8x8.t1.input")  # the VAE
    assert not taken("about", "cases")  # context windows


def test_real_tokens_alone_give_what_the_padded_and_masked_run_gives(tmp_path, weights):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_SIZE,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        is_encoder_decoder=False,
    )
    oracle = UMT5EncoderModel(config).eval()
    library = with_library_names(weights)
    library["encoder.embed_tokens.weight"] = library["shared.weight"]
    oracle.load_state_dict(library)
    ids = torch.zeros(1, 512, dtype=torch.long)
    ids[0, : len(IDS)] = IDS
    with torch.inference_mode():
        padded = oracle(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[0]
    torch.testing.assert_close(embed(tmp_path, weights), padded[: len(IDS)], atol=2e-5, rtol=0)


def test_every_layout_of_the_same_weights_gives_the_same_embedding(tmp_path, weights):
    expected = embed(tmp_path, weights)
    library = with_library_names(weights)
    tied = {**library, "encoder.embed_tokens.weight": library["shared.weight"].clone()}
    marked = {**library, "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    got = {
        "official pickle": embed(tmp_path, weights, "official.pth"),
        "library names": embed(tmp_path, library, "library.safetensors"),
        "library names, table twice": embed(tmp_path, tied, "tied.safetensors"),
        "library names, tokenizer inside": embed(tmp_path, marked, "marked.safetensors"),
    }
    assert [name for name, rows in got.items() if not torch.equal(rows, expected)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_weights_cast_to_fewer_bits_are_read_as_they_are(tmp_path, weights, dtype):
    stored = {
        name: weight.to(dtype) if name in linears(weights) else weight
        for name, weight in weights.items()
    }
    rounded = {name: weight.float() for name, weight in stored.items()}
    got = embed(tmp_path, stored, "cast.safetensors")
    assert torch.equal(got, embed(tmp_path, rounded))
    assert not torch.equal(got, embed(tmp_path, weights))


@pytest.mark.parametrize(
    ("dtype", "per_row", "suffix", "library", "name"),
    [
        (FP8, True, "weight_scale", False, "rows.pth"),
        (torch.int8, True, "weight_scale", False, "rows.pth"),
        (FP8, False, "weight_scale", False, "one.safetensors"),
        (FP8, False, "scale_weight", True, "comfy.safetensors"),
    ],
)
def test_scaled_weights_are_multiplied_with_their_scales(
    tmp_path, weights, dtype, per_row, suffix, library, name
):
    stored, exact = quantised(weights, dtype, per_row, suffix)
    if library:
        scales = {key: scale for key, scale in stored.items() if key.endswith(suffix)}
        stored = with_library_names({k: w for k, w in stored.items() if k not in scales})
        for key, scale in scales.items():
            target = with_library_names({**weights, key.replace(suffix, "weight"): scale})
            stored |= {k.replace("weight", suffix): s for k, s in target.items() if s is scale}
        stored |= {"scaled_fp8": torch.empty(0, dtype=FP8)}
    got = embed(tmp_path, stored, name)
    assert torch.equal(got, embed(tmp_path, exact))
    full = embed(tmp_path, weights)
    assert 0 < (got - full).norm() / full.norm() < 0.1  # E4M3 rounds by up to 6 % a weight


def test_bfloat16_stays_within_its_rounding(tmp_path, weights):
    exact = embed(tmp_path, weights)
    rows = embed(tmp_path, weights, dtype=torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert 0 < (rows.float() - exact).norm() / exact.norm() < 3e-2


def dropped(name):
    return lambda weights: weights.pop(name)


def changed(name, change):
    return lambda weights: weights.update({name: change(weights.get(name))})


Q1 = "blocks.1.attn.q.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (dropped(Q1), rf"{Q1} is missing, and 0 more"),
        (dropped("blocks.0.attn.q.weight"), r"blocks\.0\.attn\.q\.weight is missing"),
        (dropped("norm.weight"), r"norm\.weight is missing"),
        (dropped("token_embedding.weight"), "not a UMT5 encoder"),
        (changed(Q1, lambda w: w[:, :-1]), rf"{Q1} is \(96, 63\), expected \(96, 64\)"),
        (changed("token_embedding.weight", lambda w: w[0]), r"is \(64,\), expected 2 sizes"),
        (changed("blocks.0.pos_embedding.embedding.weight", lambda w: w[:, :0]), r"\(32, 0\)"),
        (changed("blocks.0.pos_embedding.embedding.weight", lambda w: w[:31]), "31 buckets of"),
        (changed("blocks.0.pos_embedding.embedding.weight", lambda w: w[:1]), "1 buckets of"),
        (
            changed("blocks.0.pos_embedding.embedding.weight", lambda w: torch.ones(32, 5)),
            "5 heads in 96 channels",
        ),
        (changed(Q1, lambda w: w.to(torch.int8)), r"torch\.int8 without a scale"),
        (changed("blocks.1.attn.q.weight_scale", lambda _: torch.ones(5)), r"is \(5,\), expected"),
        (changed("blocks.1.norm1.weight_scale", lambda _: torch.ones(1)), "norm1.weight_scale"),
        (changed("decoder.norm.weight", lambda _: torch.ones(3)), r"holds decoder\.norm\.weight"),
        (changed(Q1 + "_2", lambda _: torch.ones(3)), "another way to quantise"),
    ],
)
def test_a_file_of_wrong_tensors_is_refused_with_their_names(tmp_path, weights, damage, said):
    damage(weights)
    with pytest.raises(BadCheckpoint, match=said) as raised:
        embed(tmp_path, weights)
    assert "umt5.safetensors" in str(raised.value)


def test_the_real_encoder_cut_between_two_blocks_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="has 1 blocks, expected 24"):
        embed(tmp_path, umt5(width=4096, layers=1))


@pytest.mark.parametrize("name", ["umt5.safetensors", "umt5.pth"])
def test_a_file_cut_short_or_empty_is_refused(tmp_path, weights, name):
    embed(tmp_path, weights, name)
    path = tmp_path / name
    for data in (path.read_bytes()[:-1000], b""):
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=name):
            TextEncoder(path, CPU, torch.float32)
    path.unlink()
    with pytest.raises(MissingModel, match=name):
        TextEncoder(path, CPU, torch.float32)


def test_a_token_beyond_the_table_names_the_mismatch(tmp_path, weights):
    embed(tmp_path, weights)
    encoder = TextEncoder(tmp_path / "umt5.safetensors", CPU, torch.float32)
    with pytest.raises(BadCheckpoint, match="knows 400 tokens, the tokenizer gave token 400"):
        encoder.embed(torch.tensor([3, 400, 1]))


class Watched(TextEncoder):
    """Counts how often weights are read, and what of them is there at once."""

    def __init__(self, path):
        super().__init__(path, CPU, torch.float32)
        self.opened, self.most = [], 0
        opened = self._file.open

        def watch(name):
            self.opened.append(name)
            held = sum(weight.nbytes for weight in self._stack.parameters() if weight.device == CPU)
            self.most = max(self.most, held)
            return opened(name)

        self._file.open = watch


def test_prompts_are_embedded_together_block_by_block(tmp_path, weights):
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    prompts = [IDS, IDS[:3], torch.tensor([1])]
    want = [TextEncoder(path, CPU, torch.float32).embed(ids) for ids in prompts]
    watched = Watched(path)
    for got, one in zip(watched.embed_all(prompts), want, strict=True):
        assert torch.equal(got, one)
    read = [name for name in watched.opened if not name.startswith("token_embedding")]
    assert sorted(read) == sorted(
        name for name in weights if not name.startswith("token_embedding")
    )
    assert watched.most == 0  # a block has left before the next one is read
    block = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith("blocks.1."))
    assert passing_bytes(path, torch.float32) == 2 * block
    assert passing_bytes(path, torch.bfloat16) == block
