"""Recipes and packages agree about the LoRAs of the weights, or a sentence says what to build."""

import re
from dataclasses import replace

import pytest

from engine.config import TINY_SCAIL2
from engine.errors import Unavailable
from engine.package.manifest import MergedLora, SourceFile
from engine.package.merged import NeededLora, check_recipe_loras, served_modes
from tests.support.packages import MANIFEST

TURBO = (NeededLora("distill", 64, 0.8), NeededLora("dpo", None, 1.0))
FAST8 = (NeededLora("distill", 128, 1.0),)
OFFICIAL = ()
DISTILL, DPO, RELIGHT, STYLE = ("steps.safetensors", "dpo.safetensors", "relight.pt", "my hat.pt")


def merged(file, strength, role, rank=128):
    return SourceFile(file, 1, "", MergedLora(strength, role, rank))


def package(*loras, kind="scail2"):
    model = MANIFEST.model if kind == "preview" else TINY_SCAIL2
    parts = [SourceFile(f"scail-0000{n}-of-00002.safetensors", 1, "", None) for n in (1, 2)]
    return replace(MANIFEST, model_kind=kind, model=model, sources=(*parts, *loras))


READY = {
    "turbo": (TURBO, (merged(DISTILL, 0.8, "distill", 64), merged(DPO, 1.0, "dpo"))),
    "turbo, in another order": (
        TURBO, (merged(DPO, 1.0, "dpo", 32), merged(DISTILL, 0.8, "distill", 64)),
    ),
    "turbo with others of one's own": (
        TURBO,
        (merged(DISTILL, 0.8, "distill", 64), merged(DPO, 1.0, "dpo"),
         merged(RELIGHT, 1.0, "relight"), merged(STYLE, 0.6, "other", 16)),
    ),
    "fast8": (FAST8, (merged(DISTILL, 1.0, "distill", 128),)),
    "official": (OFFICIAL, ()),
    "official with a style": (OFFICIAL, (merged(STYLE, 0.6, "other", 16),)),
}  # fmt: skip


@pytest.mark.parametrize(("needed", "loras"), READY.values(), ids=READY)
def test_a_package_with_the_loras_of_a_recipe_is_let_through(needed, loras):
    check_recipe_loras(needed, package(*loras))


LIGHTX2V = "lightx2v_I2V_14B_480p_cfg_step_distill_rank{}_bf16.safetensors"
PUBLISHED_DPO = "wan2.1_SCAIL_2_DPO_lora_bf16.safetensors"
OTHER = {
    "none is merged": (
        TURBO, (), "has none of these roles", [f"{LIGHTX2V.format(64)}:0.8", f"{PUBLISHED_DPO}:1"],
    ),
    "one is missing": (
        TURBO, (merged(DISTILL, 0.8, "distill", 64),), "has distill of rank 64 at 0.8 (steps",
        [f"{DISTILL}:0.8", f"{PUBLISHED_DPO}:1"],
    ),
    "another strength": (
        TURBO, (merged(DISTILL, 1.0, "distill", 64), merged(DPO, 1.0, "dpo")),
        "has distill of rank 64 at 1 (steps.safetensors) and dpo of rank 128 at 1",
        [f"{DISTILL}:0.8", f"{DPO}:1"],
    ),
    "another rank": (
        TURBO, (merged(DISTILL, 0.8, "distill", 128), merged(DPO, 1.0, "dpo")),
        "has distill of rank 128 at 0.8", [f"{LIGHTX2V.format(64)}:0.8", f"{DPO}:1"],
    ),
    "more than it needs": (
        FAST8, (merged(DISTILL, 1.0, "distill", 128), merged(DPO, 1.0, "dpo")),
        "and dpo of rank 128 at 1", [f"{DISTILL}:1"],
    ),
    "some where it needs none": (
        OFFICIAL, (merged(DPO, 1.0, "dpo"),), "with other LoRAs merged: none; the package has dpo",
        [],
    ),
    "one of them twice": (
        FAST8, (merged(DISTILL, 1.0, "distill", 128),) * 2, "and distill of rank 128 at 1",
        [f"{DISTILL}:1"],
    ),
    "those of one's own are kept": (
        FAST8, (merged(STYLE, 0.6, "other", 16), merged(RELIGHT, 1.0, "relight")),
        "has none of these roles", [f"{LIGHTX2V.format(128)}:1", f"'{STYLE}:0.6'", f"{RELIGHT}:1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("needed", "loras", "says", "line"), OTHER.values(), ids=OTHER)
def test_a_package_with_other_loras_is_refused_with_the_line_that_builds_the_right_one(
    needed, loras, says, line
):
    with pytest.raises(Unavailable, match=re.escape(says)) as caught:
        check_recipe_loras(needed, package(*loras))
    wanted = "".join(f" --lora {one}" for one in line)
    assert str(caught.value).endswith(
        "build a package for it: python build_engine.py --arch sm89 --checkpoint "
        f"scail-00001-of-00002.safetensors{wanted} --out DIR"
    )


def test_the_sentence_says_what_the_recipe_needs():
    with pytest.raises(Unavailable, match=r"merged: distill of rank 64 at 0\.8 and dpo at 1; the"):
        check_recipe_loras(TURBO, package())


@pytest.mark.parametrize(
    ("manifest", "modes"),
    [
        (package(kind="preview"), ("animation",)),
        (package(), ("animation", "replacement")),
        (package(*READY["turbo"][1]), ("animation", "replacement")),
        (package(merged(RELIGHT, 1.0, "relight")), ("replacement",)),
        (package(merged(RELIGHT, 0.3, "relight"), kind="preview"), ("animation",)),
    ],
)
def test_a_relight_lora_serves_replacement_alone(manifest, modes):
    assert served_modes(manifest) == modes
