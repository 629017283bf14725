"""Tells a page what can be asked for: models, presets, sizes, limits and examples."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, get_args

from engine.config import LIMITS, SIZE_MULTIPLE, TRAINED_SIZE, Defaults
from engine.flow import Framing, Recipe
from engine.jobs.usual import usual_settings
from engine.recipes import RECIPES
from engine.server import examples
from engine.server.house import House
from engine.server.models import Model, Models
from engine.server.uploads import UPLOAD_BYTES

_SEED_BITS = 53  # numbers of JSON are exact so far
_SQUARE = 640


def info(house: House, models: Models, gpu: str, features: Sequence[str]) -> dict[str, Any]:
    """Makes the reply of `GET /info`."""
    return {
        "engine": f"scail-engine {version('scail-engine')}",
        "gpu": gpu,
        "needs_token": house.token is not None,
        "takes_paths": bool(house.inputs),
        "features": [*features],
        "models": [
            _model(one, is_loaded=models.loaded == one.name) for one in models.found.values()
        ],
        "limits": {
            "min_side": LIMITS.min_side,
            "max_side": LIMITS.max_side,
            "side_multiple": SIZE_MULTIPLE,
            "max_frames": LIMITS.max_frames,
            "max_steps": LIMITS.max_steps,
            "max_prompt_chars": LIMITS.max_prompt_chars,
            "max_references": LIMITS.max_references,
            "max_upload_bytes": UPLOAD_BYTES,
            "max_image_bytes": LIMITS.max_image_bytes,
            "max_seed": 2**_SEED_BITS - 1,
        },
        "keeps": {
            "upload_s": house.keep_upload_s,
            "result_s": house.keep_s,
            "result_bytes": house.keep_bytes,
        },
        "examples": [examples.told(one) for one in examples.EXAMPLES if one.model in models.found],
    }


def _model(model: Model, *, is_loaded: bool) -> dict[str, Any]:
    served, kind = model.served, model.served.kind
    return {
        "name": model.name,
        "title": kind.title,
        "available": model.load is not None,
        "why": model.why,
        "demo": None if model.demo is None else model.demo.warning,
        "is_loaded": is_loaded,
        "modes": [*served.modes],
        "takes_masks": bool(kind.modes),
        "takes_who": bool(kind.modes),
        "framings": [*get_args(Framing)] if kind.modes else [],
        "segments": [*kind.segments],
        "max_persons": LIMITS.max_identities if kind.modes else LIMITS.max_persons,
        "presets": _presets(model),
        "sizes": _sizes(model),
    }


def _presets(model: Model) -> list[dict[str, Any]]:
    """Lists the recipes, the usual one first; a demo model has one of its own before them."""
    found = list[dict[str, Any]]()
    if model.served.usual is not None:
        recipe = model.served.usual.recipe
        found.append(_preset("demo", "Demo", {}, recipe, model.why))
    for name, recipe in RECIPES[model.name].items():
        why = model.why or model.served.refused.get(name)
        found.append(_preset(name, name.capitalize(), {"recipe": name}, recipe, why))
    return found


def _preset(
    name: str, title: str, given: dict[str, str], recipe: Recipe, why: str | None
) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "available": why is None,
        "why": why,
        "input": given,
        "sampler": recipe.sampler,
        "steps": recipe.steps,
        "cfg": recipe.cfg,
        "shift": recipe.shift,
    }


def _sizes(model: Model) -> list[dict[str, Any]]:
    """Lists sizes to choose from, the usual one first."""
    usual, _ = usual_settings(None, Defaults(), model.served)
    short, long = TRAINED_SIZE
    named = [(usual.width, usual.height)]
    if model.demo is not None and usual.width and usual.height:
        named += [(usual.height, usual.width)]
    else:
        named += [(short, long), (long, short), (_SQUARE, _SQUARE)]
    sizes = dict.fromkeys((width, height) for width, height in named if width and height)
    return [{"width": w, "height": h, "title": f"{w} x {h}"} for w, h in sizes]
