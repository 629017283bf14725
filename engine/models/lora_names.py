"""The names in LoRA files: which module of SCAIL a stored tensor changes, and how.

Trainers and converters write prefixes of their own before the module's name, or join its parts by
`_`. Whatever is not listed here is refused by name: left out, it would change the clip unseen.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# of wrappers around the model; they may stand one within another
PREFIXES = (
    "base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.", "pipe.", "dit.",
    "module.", "_orig_mod.",
)  # fmt: skip
JOINED = ("lora_unet_", "lycoris_")  # before a module whose dots became `_`
# In place of `.NAME.` stands the adapter of PEFT, which may have any name without dots.
ENDINGS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"(?P<module>.+)\.{pattern}"))
    for kind, pattern in (
        ("down", r"(?:lora_down|lora_A)(?:\.(?P<adapter>[^.]+))?\.weight"),
        ("up", r"(?:lora_up|lora_B)(?:\.(?P<adapter>[^.]+))?\.weight"),
        ("down", r"(?:lora_A|(?:lora|lora_linear_layer)\.down\.weight)"),
        ("up", r"(?:lora_B|(?:lora|lora_linear_layer)\.up\.weight)"),
        ("up_bias", r"(?:lora_up|lora_B)(?:\.(?P<adapter>[^.]+))?\.bias"),
        ("alpha", r"alpha"),
        ("diff", r"(?:diff|w_norm)"),
        ("diff_b", r"(?:diff_b|b_norm)"),
        ("diff_m", r"diff_m"),
    )
) + tuple(  # of older diffusers, part of the module's last name
    (kind, re.compile(rf"(?P<module>.+)_lora\.{kind}\.weight")) for kind in ("down", "up")
)
EXPECTED = (
    ".lora_down.weight, .lora_up.weight, .lora.down.weight, .lora.up.weight, .lora_A.weight, "
    ".lora_B.weight, .lora_B.bias, .alpha, .diff, .diff_b, .diff_m, .w_norm, .b_norm"
)
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core",
    "set_weight": "weights that replace others",
    "reshape_weight": "weights of another shape",
}


class LoraKey(NamedTuple):
    """What the name of a stored tensor says."""

    module: str  # as SCAIL calls it, if SCAIL has it
    kind: str  # the first of a pair in ENDINGS
    adapter: str | None  # of PEFT


def modules_by_joined_name(weights: Iterable[str]) -> Mapping[str, str]:
    """The modules of the weights' names, and the modules that they lie in, each by its name with
    `_` in place of the dots. A name cannot be split at its `_`: `k_img` has one too.
    """
    found: dict[str, str] = {}
    for weight in weights:
        module = weight.removesuffix(".weight").removesuffix(".bias")
        while module:
            found[module.replace(".", "_")] = module
            module = module.rpartition(".")[0]
    return found


def parse(name: str, joined: Mapping[str, str]) -> LoraKey | None:
    """Reads a name. None if it is no part of a LoRA that can be merged.

    `joined`: what `modules_by_joined_name` gives.
    """
    for kind, pattern in ENDINGS:
        if found := pattern.fullmatch(name):
            module = _module(found["module"], joined)
            return LoraKey(module, kind, found.groupdict().get("adapter"))
    return None


def other_kind(name: str) -> str | None:
    """The kind of change that a name which `parse` does not know belongs to; None if unknown."""
    return next((kind for part, kind in OTHER_KINDS.items() if f".{part}" in name), None)


def without_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _module(name: str, joined: Mapping[str, str]) -> str:
    name = without_prefixes(name)
    if prefix := next((p for p in JOINED if name.startswith(p)), None):
        short = name.removeprefix(prefix).removeprefix("_")  # Wan-Fun writes two
        return joined.get(short, short)
    return name
