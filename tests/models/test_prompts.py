"""Prompts become embeddings: cleaning, tokenizers, and embeddings kept on disk or in a package."""

import gc
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint, BadPackage, MissingModel
from engine.models.stored_prompts import load_prompts
from engine.models.text import (
    TextEncoder,
    clean_prompt,
    embed_prompts,
    find_tokenizer,
    load_tokenizer,
    store_prompts,
)
from engine.models.umt5 import Stack
from tests.support.umt5 import (
    CPU,
    WIDTH,
    embed,
    sentence_pieces,
    umt5,
    with_library_names,
    write_tokenizer,
)


@pytest.fixture
def weights():
    return umt5()


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("\ud800 half a pair", "\ufffd half a pair"),
        ("\x1b[31mred\x1b[0m\x00", "red"),
        ("&amp;nbsp; a &lt;b&gt; ", "a <b>"),
    ],
)
def test_prompts_that_break_tokenizers_are_cleaned(raw, cleaned):
    assert clean_prompt(raw) == cleaned
    assert clean_prompt(cleaned) == cleaned


def test_ids_end_with_the_end_token_and_unknown_letters_become_bytes(tmp_path):
    write_tokenizer(tmp_path)
    ids = load_tokenizer(tmp_path)("ab \u5973")
    space, a = 260, 261
    assert ids.tolist() == [space, a, a + 1, space, 4 + 0xE5, 4 + 0xA5, 4 + 0xB3, 1]
    assert load_tokenizer(tmp_path)("").tolist() == [1]


def test_a_long_prompt_is_cut_to_512_tokens_and_keeps_its_end(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a" * 4096).tolist() == [260] + [261] * 510 + [1]
    assert len(tokenizer("a" * 509)) == 511
    assert len(tokenizer("a" * 510)) == len(tokenizer("a" * 511)) == 512


def test_a_sentencepiece_model_is_read_without_a_json_file(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentence_pieces())
    ids = load_tokenizer(tmp_path)("rain \u5973").tolist()
    assert ids[-4:] == [4 + 0xE5, 4 + 0xA5, 4 + 0xB3, 1]
    write_tokenizer(tmp_path)  # the JSON file is the official one and goes first
    assert load_tokenizer(tmp_path)("a").tolist() == [260, 261, 1]


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe\x00not a tokenizer"])
def test_a_damaged_tokenizer_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadCheckpoint, match=rf"{name}: not a tokenizer \({len(data)} bytes\)"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    write_tokenizer(tmp_path, end="<|endoftext|>")
    with pytest.raises(BadCheckpoint, match="</s> has id None, expected 1"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_is_looked_for_beside_the_encoder_then_in_the_models_folder(
    tmp_path, weights
):
    home = tmp_path / "text_encoders"
    folders = [
        home,
        home / "umt5-xxl",
        home / "google" / "umt5-xxl",
        home / "tokenizer",
        tmp_path / "tokenizer",
        tmp_path / "umt5-xxl",
    ]
    encoder = home / "umt5.safetensors"
    home.mkdir()
    spiece = torch.frombuffer(bytearray(sentence_pieces()), dtype=torch.uint8)
    save_file({**with_library_names(weights), "spiece_model": spiece}, encoder)
    found = [find_tokenizer(encoder, tmp_path).sha256]  # the one inside the encoder's file
    for number, folder in enumerate(reversed(folders)):
        write_tokenizer(folder, extra=chr(0x100 + number))
        assert find_tokenizer(encoder, tmp_path).sha256 == load_tokenizer(folder).sha256
        found.append(load_tokenizer(folder).sha256)
    assert len(set(found)) == len(folders) + 1


def test_a_missing_tokenizer_names_files_and_folders(tmp_path, weights):
    embed(tmp_path, weights)
    with pytest.raises(MissingModel, match=r"tokenizer\.json or spiece\.model") as raised:
        find_tokenizer(tmp_path / "umt5.safetensors", tmp_path / "models")
    assert str(tmp_path / "google" / "umt5-xxl") in str(raised.value)
    assert str(tmp_path / "models" / "tokenizer") in str(raised.value)
    with pytest.raises(MissingModel, match=r"no tokenizer\.json or spiece\.model"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.fixture
def home(tmp_path, weights):
    """A models folder with encoder and tokenizer."""
    write_tokenizer(tmp_path / "tokenizer")
    embed(tmp_path, weights)
    return tmp_path


def prompts_of(home, *prompts, dtype=torch.float32, stored=None):
    encoder, cache = home / "umt5.safetensors", home / "cache"
    return embed_prompts(prompts, encoder, home, cache, CPU, dtype, stored)


def blank(path):
    """Zeros in place of the weights, same size and time of change: loading it would be noticed."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_embeddings_are_those_of_the_cleaned_prompt_with_zeros_behind(home):
    tokenizer = load_tokenizer(home / "tokenizer")
    encoder = TextEncoder(home / "umt5.safetensors", CPU, torch.float32)
    first, second, empty = prompts_of(home, "  a &lt;b\n\tc", "a <b c", "")
    rows = encoder.embed(tokenizer("a <b c"))
    assert first.shape == (512, WIDTH)
    assert len(rows) == 8
    assert torch.equal(first[:8], rows)
    assert torch.equal(first, second)
    assert not first[8:].any()
    assert torch.equal(empty[:1], encoder.embed(torch.tensor([1])))
    assert not empty[1:].any()


def test_a_known_prompt_never_opens_the_encoder(home):
    expected = prompts_of(home, "dance", "")
    blank(home / "umt5.safetensors")
    for _ in range(2):
        got = prompts_of(home, "", " dance ")
        assert torch.equal(got[0], expected[1])
        assert torch.equal(got[1], expected[0])
    with pytest.raises(BadCheckpoint, match=r"umt5\.safetensors"):
        prompts_of(home, "dance", "sing")


def test_the_encoder_is_freed_once_the_prompts_are_known(home):
    def encoders():
        return sum(issubclass(type(held), Stack) for held in gc.get_objects())

    before = encoders()
    gc.disable()  # nothing may wait for the collector: the transformer needs the memory next
    try:
        prompts_of(home, "dance")
        after = encoders()
    finally:
        gc.enable()
    assert after == before


def test_another_encoder_tokenizer_or_dtype_gets_its_own_embedding(home, weights):
    before = prompts_of(home, "ab")[0]
    bf16 = prompts_of(home, "ab", dtype=torch.bfloat16)[0]
    assert bf16.dtype == torch.float32
    assert 0 < (bf16 - before).norm() / before.norm() < 3e-2
    weights["norm.weight"] *= 2
    embed(home, weights)
    assert torch.equal(prompts_of(home, "ab")[0], 2 * before)
    shutil.rmtree(home / "tokenizer")
    (home / "spiece.model").write_bytes(sentence_pieces())
    assert not torch.equal(prompts_of(home, "ab")[0], 2 * before)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:-1] + b"?", lambda d: b""])
def test_a_damaged_entry_is_computed_again_and_logged(home, caplog, damage):
    expected = prompts_of(home, "dance")[0]
    (entry,) = (home / "cache").glob("*.entry")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(prompts_of(home, "dance")[0], expected)
    assert "damaged" in caplog.text
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(home, caplog):
    expected = prompts_of(home, "dance")[0]
    shutil.rmtree(home / "cache")
    (home / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(prompts_of(home, "dance")[0], expected)
    assert "could not be kept" in caplog.text


def test_weights_that_are_not_finite_are_refused_and_nothing_is_kept(home, weights):
    weights["blocks.2.ffn.fc2.weight"][3, 3] = float("nan")
    embed(home, weights)
    with pytest.raises(BadCheckpoint, match=r"umt5\.safetensors gives .* not finite"):
        prompts_of(home, "dance")
    assert list((home / "cache").glob("*.entry")) == []


def test_a_missing_encoder_is_named_even_if_its_embeddings_are_known(home):
    prompts_of(home, "dance")
    (home / "umt5.safetensors").unlink()
    with pytest.raises(MissingModel, match=r"no text encoder .*umt5\.safetensors"):
        prompts_of(home, "dance")


# Prompts of a package


def stored_of(home, *prompts):
    encoder = home / "umt5.safetensors"
    return store_prompts(prompts, encoder, home, home / "package-cache", torch.float32)


def test_a_stored_prompt_has_the_embedding_that_the_encoder_gives_and_needs_none(home, tmp_path):
    want = prompts_of(home, " a  dance", "", "another")
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(stored_of(home, "a dance", "", "another").dump())
    stored = load_prompts(path)
    (home / "umt5.safetensors").unlink()
    got = prompts_of(home, "a dance ", "", "another", stored=stored)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert got[0].shape == (512, WIDTH)
    with pytest.raises(MissingModel, match=r"no text encoder .*umt5\.safetensors"):
        prompts_of(home, "a dance", "a new one", stored=stored)


def test_what_made_the_prompts_is_kept_with_them(home, tmp_path):
    stored = stored_of(home, "a", "b")
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(stored.dump())
    found = load_prompts(path)
    assert (found.encoder_bytes, found.precision) == (
        (home / "umt5.safetensors").stat().st_size, "float32",
    )  # fmt: skip
    assert (found.encoder_sha256, found.tokenizer_sha256) == (
        stored.encoder_sha256, stored.tokenizer_sha256,
    )  # fmt: skip
    assert list(found.rows) == ["a", "b"]


def test_another_text_encoder_at_hand_is_asked_itself(home, caplog):
    stored = stored_of(home, "a dance")
    save_file(umt5(layers=2), home / "umt5.safetensors")
    want = prompts_of(home, "a dance")[0]
    with caplog.at_level(logging.WARNING):
        got = prompts_of(home, "a dance", stored=stored)[0]
    assert torch.equal(got, want)
    assert "umt5.safetensors is not the text encoder of the package's prompts" in caplog.text
    rows = stored.rows["a dance"]
    assert not torch.allclose(got[: len(rows)], rows)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-9], lambda d: d.replace(b"prompts", b"prempts"), lambda d: b""]
)
def test_a_file_that_holds_no_prompts_is_refused(home, tmp_path, damage):
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(damage(stored_of(home, "a dance").dump()))
    with pytest.raises(BadPackage, match=r"prompts\.safetensors holds no prompt embeddings"):
        load_prompts(path)
