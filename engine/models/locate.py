"""The one search of a models folder: people's volumes hold each model under many names."""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import MissingModel


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model under the names that its file may have (docs/reference/runpod.md A.6)."""

    what: str  # as error sentences call it
    folders: tuple[str, ...]  # of the models folder, nearest first; "": the folder itself
    names: tuple[str, ...]  # best first


ANYWHERE = ("", "SCAIL-Preview")

VAE = KnownModel(
    "VAE",
    ("vae", *ANYWHERE),
    (
        "Wan2.1_VAE.pth",
        "wan_2.1_vae.safetensors",
        "Wan2_1_VAE_fp32.safetensors",
        "Wan2_1_VAE_bf16.safetensors",
    ),
)
TEXT_ENCODER = KnownModel(
    "text encoder",
    ("text_encoders", "clip", "umt5-xxl", *ANYWHERE),
    (
        "models_t5_umt5-xxl-enc-bf16.pth",
        "umt5-xxl-enc-bf16.safetensors",
        "umt5_xxl_fp16.safetensors",
        "umt5-xxl-enc-fp8_e4m3fn.safetensors",
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "models_t5_umt5-xxl-enc-fp8.pth",
        "models_t5_umt5-xxl-enc-int8.pth",
    ),
)
IMAGE_ENCODER = KnownModel(
    "image encoder",
    ("clip_vision", *ANYWHERE),
    (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "clip_vision_h.safetensors",
        "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors",
    ),
)


def find_model(models: Path, known: KnownModel) -> Path:
    """The file that `search` finds.

    Raises `MissingModel` with the names and folders that would have been taken, or with the folder
    that cannot be read.
    """
    found = search(models, known)
    if found is not None:
        return found
    if not models.is_dir():
        raise MissingModel(
            f"There is no models folder {models}. Name it with --models or SCAIL_MODELS."
        )
    folders = ", ".join(f"{folder}/" for folder in known.folders if folder)
    raise MissingModel(
        f"No {known.what} in {models} or its folders {folders}; expected one of "
        f"{', '.join(known.names)}."
    )


def search(models: Path, known: KnownModel) -> Path | None:
    """The first file there is, or None; a better name wins over a nearer folder.

    Raises `MissingModel` if a folder cannot be read.
    """
    places = (models / folder / name for name in known.names for folder in known.folders)
    try:
        return next((place for place in places if place.is_file()), None)
    except OSError as error:
        raise MissingModel(
            f"The {known.what} cannot be looked for: {error.filename} cannot be read: "
            f"{error.strerror}."
        ) from error
