"""Which file in a models folder is which model: people's volumes hold them under many names."""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import MissingModel


@dataclass(frozen=True, slots=True)
class KnownModel:
    """The names under which one model goes about (docs/reference/runpod.md A.6), best first."""

    what: str
    folders: tuple[str, ...]
    names: tuple[str, ...]


ANYWHERE = ("", "SCAIL-Preview")

VAE = KnownModel(
    "VAE",
    ("vae",),
    (
        "Wan2.1_VAE.pth",
        "wan_2.1_vae.safetensors",
        "Wan2_1_VAE_fp32.safetensors",
        "Wan2_1_VAE_bf16.safetensors",
    ),
)
TEXT_ENCODER = KnownModel(
    "text encoder",
    ("text_encoders", "clip", "umt5-xxl"),
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
    ("clip_vision",),
    (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "clip_vision_h.safetensors",
        "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors",
    ),
)


def find_model(models: Path, known: KnownModel) -> Path:
    """The first file there is, best name first, in the folders people use.

    Raises `MissingModel` with the names that would have been taken, or why a folder is unreadable.
    """
    try:
        found = _search(models, known)
    except OSError as error:
        raise MissingModel(
            f"The {known.what} cannot be looked for: {error.filename} cannot be read: "
            f"{error.strerror}."
        ) from error
    if found is not None:
        return found
    folders = ", ".join(f"{folder}/" for folder in known.folders)
    raise MissingModel(
        f"No {known.what} in {models} or its folders {folders}; expected one of "
        f"{', '.join(known.names)}."
    )


def _search(models: Path, known: KnownModel) -> Path | None:
    if not models.is_dir():
        raise MissingModel(
            f"There is no models folder {models}. Name it with --models or SCAIL_MODELS."
        )
    for name in known.names:
        for folder in (*known.folders, *ANYWHERE):
            if (models / folder / name).is_file():
                return models / folder / name
    return None
