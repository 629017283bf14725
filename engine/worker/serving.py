"""What a package serves: its kind of model, and the modes and recipes that its weights are for."""

from engine.config import ModelConfig
from engine.demo.presets import preset_of
from engine.errors import Unavailable
from engine.flow import RecipeName
from engine.jobs.served import Served
from engine.package.manifest import Manifest
from engine.package.merged import check_recipe_loras, served_modes
from engine.recipes import NEEDED_LORAS


def served_by(manifest: Manifest, who: str = "this worker") -> Served:
    """Reads off a manifest what can be asked of its package.

    Weights of a demo were trained for no LoRA, and carry out every recipe.
    """
    kind = manifest.model.kind
    modes = served_modes(manifest) if kind.modes else ()
    refused = {} if preset_of(manifest.model) else _refused(manifest)
    return Served(kind, modes, refused, who)


def served_of(model: ModelConfig, who: str) -> Served:
    """Tells what can be asked of a model of which no more is known than its shape."""
    return Served(model.kind, model.kind.modes, who=who)


def _refused(manifest: Manifest) -> dict[RecipeName, str]:
    """Finds the recipes that the weights are not for, and what is to be done for each."""
    found: dict[RecipeName, str] = {}
    for name, needed in NEEDED_LORAS[manifest.model.kind.name].items():
        try:
            check_recipe_loras(needed, manifest)
        except Unavailable as error:
            found[name] = str(error)
    return found
