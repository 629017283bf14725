"""What a LoRA file is for, told from what is in it, and where that cannot tell from its names.

1. A file that adds whole tensors to more than the linears of the blocks (norms, tables, embeddings,
   the head) is the difference of two models: so step-distilled ones are published. `distill`.
2. Files of pairs alone look alike whatever they do: DPO, relighting, a style. A word of the file's
   name, or of a title in its metadata, tells: the rows of `WORDS`. `dpo` and `relight` are believed
   of files alone that change neither `k_img` nor `v_img`, as SCAIL-2's two do not
   (docs/reference/scail2.md 1.4).
3. Else it is `other`.

A name or a title may also say which model of the family a LoRA was trained on: `require_kind`.
"""

import logging
import re
from collections.abc import Iterator, Mapping

from engine.config import KINDS
from engine.errors import BadCheckpoint
from engine.flow import KindName, LoraRole
from engine.models.lora import Lora

log = logging.getLogger(__name__)

WORDS: Mapping[LoraRole, tuple[str, ...]] = {
    "relight": ("relight",),
    "dpo": ("dpo",),
    "distill": ("distill", "lightx2v", "lightning"),
}
ALIGNED: tuple[LoraRole, ...] = ("relight", "dpo")  # trained on SCAIL-2, in its layout
KINDS_TOLD: Mapping[KindName, re.Pattern[str]] = {
    "scail2": re.compile(r"scail[-_. ]?2(?![0-9])"),
    "preview": re.compile(r"scail[-_. ]?preview"),
}
TITLES = (  # entries of the metadata that name the LoRA or what it was trained on
    "modelspec.title", "modelspec.architecture", "ss_output_name", "ss_sd_model_name",
    "ss_base_model_version", "base_model",
)  # fmt: skip
_LINEAR = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.(?:q|k|v|o|k_img|v_img)|ffn\.[02])\..+")
_PICTURE = re.compile(r"\.[kv]_img\.")


def role_of(lora: Lora) -> LoraRole:
    """Tells what a LoRA that was checked against its model is for."""
    if lora.changes_other_input or not all(map(_LINEAR.fullmatch, lora.differences)):
        return "distill"
    looks_aligned = not any(map(_PICTURE.search, lora.changed))
    for role, words in WORDS.items():
        is_told = any(word in text for text in _names(lora) for word in words)
        if is_told and (looks_aligned or role not in ALIGNED):
            return role
    return "other"


def require_kind(lora: Lora, kind: KindName) -> None:
    """Raises `BadCheckpoint` for a LoRA that says it is of another model of the family than `kind`,
    and warns of one whose role none but SCAIL-2 has.
    """
    told = [one for one in KINDS.values() if any(map(KINDS_TOLD[one.name].search, _names(lora)))]
    if told and KINDS[kind] not in told:
        other = told[0].title
        raise BadCheckpoint(
            f"{lora.path.name} says that it is for {other}, and the checkpoint is "
            f"{KINDS[kind].title}: its changes belong to other weights. Leave it out, or take the "
            f"checkpoint of {other}."
        )
    if kind == "preview" and (role := role_of(lora)) in ALIGNED:
        log.warning(
            "%s looks like the %s LoRA of %s, and is merged into %s, which it was not trained on",
            lora.path.name, role, KINDS["scail2"].title, KINDS[kind].title,
        )  # fmt: skip


def _names(lora: Lora) -> Iterator[str]:
    """What a file is called, by its name and by its metadata, in small letters."""
    yield lora.path.stem.lower()
    yield from (lora.metadata[key].lower() for key in TITLES if key in lora.metadata)
