"""Prompts of a package need no text encoder, and are not mistaken for those of another one."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadPackage, MissingModel
from engine.models.stored_prompts import load_prompts
from engine.models.text import embed_prompts, store_prompts
from tests.support.umt5 import CPU, WIDTH, umt5, write_tokenizer


@pytest.fixture
def home(tmp_path):
    """A models folder with encoder and tokenizer."""
    write_tokenizer(tmp_path / "tokenizer")
    save_file(umt5(), tmp_path / "umt5.safetensors")
    return tmp_path


def stored_of(home, *prompts):
    encoder = home / "umt5.safetensors"
    return store_prompts(prompts, encoder, home, home / "cache", torch.float32)


def prompts_of(home, *prompts, stored=None):
    encoder, cache = home / "umt5.safetensors", home / "other-cache"
    return embed_prompts(prompts, encoder, home, cache, CPU, torch.float32, stored)


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
