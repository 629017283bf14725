"""What the metadata of a LoRA file say of its strength: the factor of each pair.

PEFT and diffusers write no alpha beside a pair. Theirs is `lora_alpha` in the header's
`lora_adapter_metadata`, or in an `adapter_config.json` beside `adapter_model.safetensors`: the
factor is alpha / rank, with `use_rslora` alpha / sqrt(rank).
"""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import BadCheckpoint
from engine.models.lora_names import without_prefixes

log = logging.getLogger(__name__)

ADAPTER, CONFIG, CONFIGURED = (
    "lora_adapter_metadata",
    "adapter_config.json",
    "adapter_model.safetensors",
)
COMPONENT = "transformer."  # before the keys, in files of diffusers
_TOLD_ALPHA = "ss_network_alpha"  # of kohya's trainers, whose files hold an alpha for each pair
_LARGEST = 1e30  # of an alpha; no NaN is below it either
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# adapter settings under which a pair means something else than up @ down
_OTHER_MEANING = (
    "use_dora", "fan_in_fan_out", "use_qalora", "layer_replication", "trainable_token_indices",
    "megatron_config", "alora_invocation_tokens", "modules_to_save", "target_parameters",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterScale:
    """Alphas and ranks of an adapter, and of those modules that have others."""

    source: str  # as messages call it
    alpha: float
    rank: float | None = None
    is_by_root: bool = False  # divide by the rank's square root
    alphas: Mapping[str, float] = field(default_factory=dict)  # by (the end of) a module's name
    ranks: Mapping[str, float] = field(default_factory=dict)

    def check(self, modules: Collection[str]) -> None:
        """Raises `BadCheckpoint` for a pattern's name that is that of none of the `modules`."""
        for key in {**self.alphas, **self.ranks}:
            if not any(_is_end(key, module) for module in modules):
                raise BadCheckpoint(
                    f"{self.source} has an alpha or a rank for {key}, for which the file has no "
                    "pair."
                )

    def factor(self, module: str, rank: int) -> float:
        """The factor of a module's pair. Raises `BadCheckpoint` if its rank contradicts."""
        told = _of_module(self.ranks, module, self.rank)
        if told is not None and told != rank:
            raise BadCheckpoint(
                f"{self.source} gives {module} the rank {told:g}, its pair has {rank}: the file "
                "was changed after it was trained. Fetch it again."
            )
        alpha = _of_module(self.alphas, module, self.alpha)
        assert alpha is not None
        return alpha / (math.sqrt(rank) if self.is_by_root else rank)


def read_scale(path: Path, metadata: Mapping[str, str]) -> AdapterScale | None:
    """Reads the scale that a LoRA file's metadata or its neighbour give; None if they give none.

    Raises `BadCheckpoint` for entries that make no sense or that mean another kind of change.
    """
    if ADAPTER in metadata:
        return _scale(f"{path.name}: {ADAPTER}", metadata[ADAPTER])
    config = path.with_name(CONFIG)
    if path.name == CONFIGURED and config.is_file():
        try:
            text = config.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{config} cannot be read: {error}.") from error
        return _scale(f"{path.name}: {CONFIG} beside it", text)
    return None


def warn_of_told_alpha(path: Path, metadata: Mapping[str, str], without_alpha: int) -> None:
    """Warns if a trainer's notes name an alpha and pairs of the file have none."""
    told = metadata.get(_TOLD_ALPHA, "None")
    if without_alpha and told != "None":
        log.warning(
            "%s: %d pairs have no alpha, so they are added with the factor 1; the %s %s of its "
            "metadata is not used",
            path.name, without_alpha, _TOLD_ALPHA, told[:40],
        )  # fmt: skip


def _scale(source: str, text: str) -> AdapterScale | None:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{source} is no JSON: {error}.") from error
    if not isinstance(told, dict):
        raise BadCheckpoint(f"{source} is {text[:40]!r}, a JSON object is expected.")
    others = sorted(key for key in told if "." in key and not key.startswith(COMPONENT))
    if others:
        log.warning("%s: %s is of another model and not used", source, others[0][:60])
    settings = {key.removeprefix(COMPONENT): told[key] for key in told if key not in others}
    for name in _OTHER_MEANING:
        if settings.get(name):
            raise BadCheckpoint(
                f"{source} has {name} {str(settings[name])[:40]!r}: its tensors are no plain pairs "
                "and cannot be merged as such."
            )
    if "lora_alpha" not in settings:
        if left := {"alpha_pattern", "use_rslora"} & {key for key in settings if settings[key]}:
            raise BadCheckpoint(f"{source} has {min(left)} and no lora_alpha.")
        return None
    rank = settings.get("r")
    return AdapterScale(
        source,
        _number(source, "lora_alpha", settings["lora_alpha"]),
        None if rank is None else _number(source, "r", rank),
        bool(settings.get("use_rslora")),
        _pattern(source, "alpha_pattern", settings.get("alpha_pattern")),
        _pattern(source, "rank_pattern", settings.get("rank_pattern")),
    )


def _pattern(source: str, name: str, value: object) -> dict[str, float]:
    if not value:
        return {}
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{source}: {name} is {str(value)[:40]!r}, an object is expected.")
    for key in value:
        if not _PLAIN_NAME.fullmatch(key):
            raise BadCheckpoint(
                f"{source}: {name} has {key[:80]!r}; plain names of modules are expected."
            )
    return {
        without_prefixes(key): _number(source, f"{name}.{key}", number)
        for key, number in value.items()
    }


def _number(source: str, name: str, value: object) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not -_LARGEST < value < _LARGEST
    ):
        raise BadCheckpoint(f"{source}: {name} is {str(value)[:40]!r}, a number is expected.")
    return float(value)


def _of_module(pattern: Mapping[str, float], module: str, usual: float | None) -> float | None:
    return next((pattern[key] for key in pattern if _is_end(key, module)), usual)


def _is_end(key: str, module: str) -> bool:
    """Tells if a pattern's key is a module's name or the end of it after a dot, as PEFT does."""
    return f".{module}".endswith(f".{key}")
