"""The names in LoRA files: which module of SCAIL a stored tensor changes, and how.

Trainers and converters write prefixes of their own before the module's name, join its parts by `_`,
or call the modules as diffusers or the official program do (docs/reference/formats.md 7.1). What is
not listed here is refused by name: left out, it would change the clip unseen.
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
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
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
        ("magnitude", r"dora_scale"),
        ("magnitude", r"lora_magnitude_vector(?:(?:\.(?P<adapter>[^.]+))?\.weight)?"),
        ("set_weight", r"set_weight"),
        ("reshape_weight", r"reshape_weight"),
        *((kind, rf"{kind}(?:\.(?P<adapter>[^.]+))?") for kind in (*HADAMARD, *KRONECKER)),
    )
) + tuple(  # of older diffusers part of the module's last name, of the official program alone
    (kind, re.compile(rf"(?P<module>.+){before}{kind}\.weight"))
    for before in (r"_lora\.", r"\.")
    for kind in ("down", "up")
)
EXPECTED = (
    ".lora_down.weight, .lora_up.weight, .lora.down.weight, .lora.up.weight, .lora_A.weight, "
    ".lora_B.weight, .lora_B.bias, .alpha, .dora_scale, .lora_magnitude_vector, .hada_w1_a, "
    ".lokr_w1, .diff, .diff_b, .diff_m, .w_norm, .b_norm, .set_weight"
)
OTHER_KINDS = {
    "oft_": "OFT or BOFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with a core",
    "hada_t1": "LoHa with a core",
    "hada_t2": "LoHa with a core",
    "lokr_t1": "LoKr with a core",
    "lokr_t2": "LoKr with a core",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "on_input": "IA3",
    "ia3_": "IA3",
    "lora_E": "AdaLoRA",
    "vera_": "VeRA",
}
_DIFFUSERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?P<before>^|\.){pattern}(?=\.|$)"), rf"\g<before>{name}")
    for pattern, name in (
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        (r"to_out\.0", "o"),
        ("add_k_proj", "k_img"),
        ("add_v_proj", "v_img"),
        ("norm_added_k", "norm_k_img"),
        ("norm2", "norm3"),
        ("proj_out", "head.head"),
        (r"(?<=\.)scale_shift_table", "modulation"),
        ("scale_shift_table", "head.modulation"),
    )
)
_SAT_LAYER = re.compile(r"layers\.(?P<n>[0-9]+)\.(?P<linear>.+?)\.lora_layer(?:\.(?P<part>[0-9]))?")
_SAT: Mapping[tuple[str, str | None], str] = {  # by the linear and the part of its rows
    ("attention.query_key_value", "0"): "self_attn.q",
    ("attention.query_key_value", "1"): "self_attn.k",
    ("attention.query_key_value", "2"): "self_attn.v",
    ("attention.dense", None): "self_attn.o",
    ("cross_attention.query", None): "cross_attn.q",
    ("cross_attention.key_value", "0"): "cross_attn.k",
    ("cross_attention.key_value", "1"): "cross_attn.v",
    ("cross_attention.dense", None): "cross_attn.o",
    ("mlp.dense_h_to_4h", None): "ffn.0",
    ("mlp.dense_4h_to_h", None): "ffn.2",
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


def is_lora(name: str) -> bool:
    """Tells if a name is one of a LoRA's; an alpha is also beside some quantised weights."""
    return name.rpartition(".")[2] != "alpha" and (
        any(pattern.fullmatch(name) for _, pattern in ENDINGS) or other_kind(name) is not None
    )


def other_kind(name: str) -> str | None:
    """The kind of change that a name which `parse` does not know belongs to; None if unknown."""
    return next((kind for part, kind in OTHER_KINDS.items() if f".{part}" in name), None)


def without_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def own_name(name: str) -> str:
    """The name of SCAIL for a module, or for the end of a module's name, that diffusers or the
    official program call otherwise; other names as they are.
    """
    if found := _SAT_LAYER.fullmatch(name):
        linear = _SAT.get((found["linear"], found["part"]))
        return name if linear is None else f"blocks.{found['n']}.{linear}"
    for pattern, own in _DIFFUSERS:
        name = pattern.sub(own, name)
    return name


def _module(name: str, joined: Mapping[str, str]) -> str:
    name = without_prefixes(name)
    if prefix := next((p for p in JOINED if name.startswith(p)), None):
        short = name.removeprefix(prefix).removeprefix("_")  # Wan-Fun writes two
        return joined.get(short, short)
    return own_name(name)
