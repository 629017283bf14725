"""What the LoRAs of a package are good for: modes it serves, recipes it can carry out.

A recipe's figures belong to weights that certain LoRAs were merged into: other figures than theirs
make a clip that looks like a mistake of the engine. So `check_recipe_loras` compares those that
decide a recipe, `distill` and `dpo`, one by one. Others, as `relight` and a style of one's own, are
the choice of whoever built the package.
Sources: docs/reference/scail2.md 1.4 and 5.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import Unavailable
from engine.flow import LoraRole, Mode
from engine.package.manifest import Manifest, SourceFile

DECISIVE: tuple[LoraRole, ...] = ("distill", "dpo")  # roles that recipes are made for
_CLOSE = 1e-6  # strengths that differ by less are one
# The files that are published for a role and a rank, and in a build line stand for them.
_PUBLISHED: Mapping[tuple[LoraRole, int | None], str] = {
    ("distill", 64): "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",
    ("distill", 128): "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors",
    ("dpo", 128): "wan2.1_SCAIL_2_DPO_lora_bf16.safetensors",
    ("dpo", None): "wan2.1_SCAIL_2_DPO_lora_bf16.safetensors",
}


@dataclass(frozen=True, slots=True)
class NeededLora:
    """A LoRA that a recipe's weights have merged."""

    role: LoraRole
    rank: int | None  # None: any
    strength: float


def served_modes(manifest: Manifest) -> tuple[Mode, ...]:
    """Lists the modes that a package serves: a relight LoRA is trained for replacement alone.

    A model without modes animates.
    """
    modes = manifest.model.kind.modes or ("animation",)
    if any(lora.lora and lora.lora.role == "relight" for lora in manifest.loras):
        return tuple(mode for mode in modes if mode == "replacement") or modes
    return modes


def check_recipe_loras(needed: Sequence[NeededLora], manifest: Manifest) -> None:
    """Raises `Unavailable` if a package has other LoRAs merged than those that a recipe needs, with
    the line that builds the package it is for.
    """
    held = [one for one in manifest.loras if one.lora and one.lora.role in DECISIVE]
    wanted = list(needed)
    strange = []
    for source in held:
        found = next((one for one in wanted if _is(source, one)), None)
        if found is None:
            strange.append(source)
        else:
            wanted.remove(found)
    if wanted or strange:
        has = " and ".join(map(_told, held)) or "none of these roles"
        wants = " and ".join(map(_asked, needed)) or "none"
        raise Unavailable(
            f"The recipe is for weights with other LoRAs merged: {wants}; the package has {has}. "
            f"Choose another recipe, or build a package for it: {_line(needed, manifest)}"
        )


def _is(source: SourceFile, needed: NeededLora) -> bool:
    lora = source.lora
    return (
        lora is not None
        and lora.role == needed.role
        and needed.rank in (None, lora.rank)
        and abs(lora.strength - needed.strength) < _CLOSE
    )


def _told(source: SourceFile) -> str:
    assert source.lora is not None
    rank = "" if source.lora.rank is None else f" of rank {source.lora.rank}"
    return f"{source.lora.role}{rank} at {source.lora.strength:g} ({source.file})"


def _asked(needed: NeededLora) -> str:
    rank = "" if needed.rank is None else f" of rank {needed.rank}"
    return f"{needed.role}{rank} at {needed.strength:g}"


def _line(needed: Sequence[NeededLora], manifest: Manifest) -> str:
    """The command that builds a package of the same weights for a recipe, other LoRAs kept."""
    checkpoint = next((one.file for one in manifest.sources if one.lora is None), "FILE")
    merged = [f"{_file(one, manifest)}:{one.strength:g}" for one in needed]
    merged += [
        f"{one.file}:{one.lora.strength:g}"
        for one in manifest.loras
        if one.lora and one.lora.role not in DECISIVE
    ]
    loras = "".join(f" --lora {shlex.quote(one)}" for one in merged)
    return (
        f"python build_engine.py --arch {manifest.arch} --checkpoint {shlex.quote(checkpoint)}"
        f"{loras} --out DIR"
    )


def _file(needed: NeededLora, manifest: Manifest) -> str:
    """The file for a LoRA: that of the package if only its strength is another, else the published
    one.
    """
    for one in manifest.loras:
        if one.lora and one.lora.role == needed.role and needed.rank in (None, one.lora.rank):
            return one.file
    return _PUBLISHED.get((needed.role, needed.rank), f"{needed.role.upper()}_LORA")
