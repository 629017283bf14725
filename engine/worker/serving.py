"""What a package serves: its kind of model, the modes and the recipes that its weights are for."""

from engine.config import ModelConfig
from engine.jobs.served import Served
from engine.package.manifest import Manifest


def served_by(manifest: Manifest, who: str = "this worker") -> Served:
    """Reads off a manifest what can be asked of its package."""
    return served_of(manifest.model, who)


def served_of(model: ModelConfig, who: str) -> Served:
    """Tells what can be asked of a model of which no more is known than its shape."""
    return Served(model.kind, model.kind.modes, who=who)
