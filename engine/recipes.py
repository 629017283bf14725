"""The recipes, the defaults in production, and the one check of a job's settings."""

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.config import KINDS, LIMITS
from engine.denoise.sampler import grid
from engine.errors import BadRequest, OutputError
from engine.flow import KindName, Recipe, RecipeName, Settings
from engine.media.framing import check_size
from engine.models.attention import ATTENTIONS, available
from engine.package.merged import NeededLora

# The first of a kind is the one of requests that name none.
RECIPES: Mapping[KindName, Mapping[RecipeName, Recipe]] = {
    "preview": {
        # the workflow in production (docs/reference/denoiser.md 4.6): weights are distilled, half
        # of the steps see the skeleton
        "production": Recipe(
            sampler="dpm++_sde",
            steps=6,
            cfg=1.0,
            shift=5.0,
            pose_until=0.5,
            window_frames=80,
            overlap_frames=20,
            half_render=True,
        ),
        # the released sampling script (docs/reference/denoiser.md 4)
        "official": Recipe(sampler="euler", steps=50, cfg=4.0, shift=5.0),
    },
    # SCAIL-2 sees the driving video at every step (docs/reference/scail2.md 5)
    "scail2": {
        # ComfyUI's template as it really runs: shift 8, and not the 5 that its node says
        "turbo": Recipe(sampler="euler_simple", steps=6, cfg=1.0, shift=8.0, cuts_reference=True),
        # the official program's script
        "official": Recipe(sampler="unipc", steps=40, cfg=5.0, shift=3.0),
        # the authors' fast example
        "fast8": Recipe(sampler="unipc", steps=8, cfg=1.0, shift=1.0),
    },
}

# What must be merged into the weights for a recipe; a row that is not here asks for nothing. Those
# of lightx2v distil steps and guidance away, and are known by their rank.
NEEDED_LORAS: Mapping[KindName, Mapping[RecipeName, tuple[NeededLora, ...]]] = {
    "preview": {},  # packages in use were built before anybody asked
    "scail2": {
        "turbo": (NeededLora("distill", 64, 0.8), NeededLora("dpo", None, 1.0)),
        "official": (),
        "fast8": (NeededLora("distill", 128, 1.0),),
    },
}
# Names that one kind of model is asked for under and another has by another name.
_MEANT: Mapping[KindName, Mapping[RecipeName, RecipeName]] = {"scail2": {"production": "turbo"}}

# The endpoints in production use these where a request says nothing. The negative prompt is that of
# their workflow. Source: docs/reference/runpod.md A.2 and A.4.
PROMPT = "the human starts to dance"
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"  # noqa: RUF001
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"  # noqa: RUF001
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
SEED = 779298828917358

# Maps the name of an attention in requests and workflows to the one that computes it here. None
# stands for the worker's own.
_ATTENTION = {
    "sageattn": None,  # 8-bit attention, as the worker's own is
    **{name: name for name in ("int8fp8", "int8", "fp8", "sdpa", "xformers")},
    **dict.fromkeys(("flash_attn_2", "flash_attn_3", "comfy"), "sdpa"),
    **dict.fromkeys(("sageattn_3", "sageattn_compiled", "radial_sage_attention")),
}


def attention_of(mode: str) -> tuple[str | None, tuple[str, ...]]:
    """Finds the attention that computes what `mode` names, and says what differs from it.

    None stands for the worker's own. Raises `BadRequest` for a mode that nobody knows.
    """
    if mode not in _ATTENTION:
        here = available()  # xformers is not in every image
        known = ", ".join(
            name
            for name, chosen in _ATTENTION.items()
            if chosen not in ATTENTIONS or chosen in here
        )
        raise BadRequest(f"There is no attention mode {mode!r}. Choose one of: {known}.")
    chosen = _ATTENTION[mode]
    if mode in (chosen, "sageattn"):
        return chosen, ()
    return chosen, (f"Attention {mode} is not built in; {chosen or 'the 8-bit form'} is used.",)


# Colours of masks tell fewer persons apart than skeletons do.
_MAX_PERSONS: Mapping[KindName, int] = {
    "preview": LIMITS.max_persons,
    "scail2": LIMITS.max_identities,
}


def row_of(kind: KindName, name: RecipeName | None) -> tuple[RecipeName, str | None]:
    """Finds the row of `RECIPES` that a name means for a kind of model; None means the first.

    The sentence says if it has another name. Raises `BadRequest` for a name of another kind.
    """
    rows = RECIPES[kind]
    if name is None:
        return next(iter(rows)), None
    if name in rows:
        return name, None
    title = KINDS[kind].title
    if (meant := _MEANT.get(kind, {}).get(name)) is not None:
        return meant, f"The recipe {name} is called {meant} for {title}."
    raise BadRequest(f"There is no recipe {name} for {title}, only {' and '.join(rows)}.")


def recipe_of(kind: KindName, name: RecipeName | None) -> tuple[Recipe, str | None]:
    """Finds the recipe that a name means for a kind of model, as `row_of` does."""
    row, said = row_of(kind, name)
    return RECIPES[kind][row], said


def same_row(recipe: Recipe, kind: KindName) -> RecipeName | None:
    """Finds the row of `RECIPES` with the solver and the figures of a recipe, if there is one.

    Who walks the same noise levels with the same guidance asks for the same weights.
    """
    rows = RECIPES[kind].items()
    return next((name for name, row in rows if _levels(row) == _levels(recipe)), None)


def _levels(recipe: Recipe) -> tuple[str, int, float, float]:
    return recipe.sampler, recipe.steps, recipe.cfg, recipe.shift


def check_settings(settings: Settings, kind: KindName = "preview") -> None:
    """Raises `BadRequest` for settings that no clip can be made with. Runs once a job."""
    _check_recipe(settings.recipe)
    check_range("seed", settings.seed, 0, 2**64 - 1)
    check_range("persons", settings.persons, 1, _MAX_PERSONS[kind])
    if settings.fps is not None:
        check_range("fps", settings.fps, 1, LIMITS.max_fps)
    if settings.frames is not None:
        check_range("frames", settings.frames, 1, LIMITS.max_frames)
    if (settings.width is None) != (settings.height is None):
        raise BadRequest("Width and height are given together, or neither.")
    if settings.width is not None and settings.height is not None:
        check_size(settings.height, settings.width)
    _check_text("prompt", settings.prompt)
    _check_text("negative prompt", settings.negative_prompt)
    grid(settings.recipe.sampler, settings.recipe.steps, settings.recipe.shift)


def _check_recipe(recipe: Recipe) -> None:
    check_range("steps", recipe.steps, 1, LIMITS.max_steps)
    check_range("cfg", recipe.cfg, 0, LIMITS.max_cfg)
    check_range("shift", recipe.shift, 0.01, LIMITS.max_shift)
    check_range("start of the skeleton", recipe.pose_from, 0, 1)
    check_range("end of the skeleton", recipe.pose_until, 0, 1)
    if recipe.pose_from > recipe.pose_until:
        raise BadRequest(
            f"The skeleton starts at {recipe.pose_from:g} of the steps and ends at "
            f"{recipe.pose_until:g}; it must start first."
        )
    check_range("strength of the skeleton", recipe.pose_strength, 0, LIMITS.max_pose_strength)
    check_range("window", recipe.window_frames, 1, LIMITS.max_frames)
    check_range("overlap of windows", recipe.overlap_frames, 0, recipe.window_frames - 1)


def check_output(path: Path, suffix: str, *inputs: Path) -> None:
    """Raises `OutputError` now rather than after minutes of work.

    `inputs`: files that the result must not replace.
    """
    if path.suffix.lower() != suffix:
        raise OutputError(f"{path.name} should end in {suffix}.")
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; the name of a file is expected.")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"There is no folder {path.absolute().parent} for {path.name}.")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe; the name of a file is expected.")
        if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
            raise OutputError(f"{path} is an input; the result needs a name of its own.")
        with TemporaryDirectory(dir=path.absolute().parent, prefix=".probe-"):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def _check_text(name: str, text: str) -> None:
    if len(text) > LIMITS.max_prompt_chars:
        raise BadRequest(
            f"The {name} has {len(text)} characters; at most {LIMITS.max_prompt_chars} fit."
        )
    for place, character in enumerate(text, start=1):
        # Control characters and halves of surrogate pairs, which the tokenizer chokes on.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise BadRequest(
                f"The {name} has the character U+{ord(character):04X} at place {place}, which no "
                "text has; remove it."
            )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises `BadRequest` for a number outside of low .. high, and for NaN."""
    if not low <= value <= high:  # false for NaN too; no huge integer becomes a float
        raise BadRequest(f"The {name} is {value}; it must be {low:g} to {high:g}.")
