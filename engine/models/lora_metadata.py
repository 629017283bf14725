"""What the metadata of a LoRA file say of its strength: the factor of each pair.

PEFT and diffusers write no alpha beside a pair. Theirs is `lora_alpha` in the header's
`lora_adapter_metadata`, or in an `adapter_config.json` beside `adapter_model.safetensors`: the
factor is alpha / rank, with `use_rslora` alpha / sqrt(rank). Of PEFT's LoHa and LoKr it is `alpha`.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import BadCheckpoint
from engine.models.lora_names import HADAMARD, KRONECKER, PREFIXES, own_name, without_prefixes

log = logging.getLogger(__name__)

ADAPTER, CONFIG, CONFIGURED = "lora_adapter_metadata", "adapter_config.json", "adapter_model"
_TOLD_ALPHA = "ss_network_alpha"  # of kohya's trainers, whose files hold an alpha for each pair
_LARGEST = 1e30  # of an alpha; no NaN is below it either
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# adapter settings under which a pair means something else than up @ down
_OTHER_MEANING = (
    "fan_in_fan_out", "use_qalora", "layer_replication", "trainable_token_indices",
    "megatron_config", "alora_invocation_tokens", "modules_to_save", "target_parameters",
)  # fmt: skip
# those that say what was trained, and how: the tensors of the file tell it too, or it is over
_OF_TRAINING = frozenset((
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "adapter_type",
    "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_bias", "lora_dropout", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type", "use_dora", "alpha",
    "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both",
    "decompose_factor", "rank_dropout_scale", *_OTHER_MEANING,
))  # fmt: skip
_KINDS: Mapping[str, tuple[str, frozenset[str]]] = {  # of PEFT's adapters, what alpha is called
    "LORA": ("lora_alpha", frozenset(("down", "up"))),
    "LOHA": ("alpha", frozenset(HADAMARD)),
    "LOKR": ("alpha", frozenset(KRONECKER)),
}


@dataclass(frozen=True, slots=True)
class AdapterScale:
    """Alphas and ranks of an adapter, and of those modules that have others."""

    source: str  # as messages call it
    alpha: float
    rank: float | None = None
    is_by_root: bool = False  # divide by the rank's square root
    alphas: Mapping[str, float] = field(default_factory=dict)  # by (the end of) a module's name
    ranks: Mapping[str, float] = field(default_factory=dict)
    kind: str = "LORA"  # a key of `_KINDS`
    has_magnitudes: bool = False  # DoRA

    def check(self, modules: Mapping[str, Collection[str]]) -> None:
        """Compares what is told with the kinds of tensors of each module.

        Raises `BadCheckpoint` for a pattern's name that is that of none of the `modules`, for
        changes of another kind than is told, and for magnitudes that are not there.
        """
        endings = _KINDS[self.kind][1]
        changed = [module for module, kinds in modules.items() if endings.intersection(kinds)]
        if not changed:
            raise BadCheckpoint(
                f"{self.source} has peft_type {self.kind!r}, and the file holds changes of "
                "another kind."
            )
        if self.has_magnitudes and not any("magnitude" in modules[name] for name in changed):
            raise BadCheckpoint(
                f"{self.source} has use_dora 'True', and the file holds no magnitudes: part of it "
                "is missing."
            )
        for key in {**self.alphas, **self.ranks}:
            if not any(_is_end(key, module) for module in changed):
                raise BadCheckpoint(
                    f"{self.source} has an alpha or a rank for {key}, for which the file has no "
                    "pair."
                )

    def factor(self, module: str, rank: int | None) -> float:
        """The factor of a module's change; `rank` is None for one that has none of its own.

        Raises `BadCheckpoint` if its rank contradicts, or if there is none.
        """
        told = _of_module(self.ranks, module, self.rank)
        if rank is None:
            if told is None or told <= 0:
                raise BadCheckpoint(f"{self.source} has no r for {module}; one is expected.")
            rank = int(told)
        elif told is not None and told != rank:
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
    if path.stem != CONFIGURED and config.is_file():
        log.warning(
            "%s: the %s beside it is read for a file called %s alone, and not used",
            path.name, CONFIG, CONFIGURED,
        )  # fmt: skip
    elif config.is_file():
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
    settings = _of_the_model(source, told)
    for name in _OTHER_MEANING:
        if settings.get(name):
            raise BadCheckpoint(
                f"{source} has {name} {str(settings[name])[:40]!r}: its tensors are no plain pairs "
                "and cannot be merged as such."
            )
    kind = str(settings.get("peft_type") or "LORA")[:40]
    if kind not in _KINDS:
        raise BadCheckpoint(f"{source} has peft_type {kind!r}; {', '.join(_KINDS)} are read.")
    if unknown := [key[:40] for key in settings if settings[key] and key not in _OF_TRAINING]:
        log.warning("%s: %s is not known and not used", source, ", ".join(sorted(unknown)[:20]))
    is_by_root = settings.get("use_rslora") or False
    if not isinstance(is_by_root, bool):
        raise BadCheckpoint(
            f"{source}: use_rslora is {str(is_by_root)[:40]!r}, true or false is expected."
        )
    alpha = _KINDS[kind][0]
    if alpha not in settings:
        if left := {"alpha_pattern", "use_rslora"} & {key for key in settings if settings[key]}:
            raise BadCheckpoint(f"{source} has {min(left)} and no {alpha}.")
        if "r" in settings:
            log.warning("%s has no %s: pairs without an alpha have the factor 1", source, alpha)
        return None
    rank = settings.get("r")
    return AdapterScale(
        source,
        _number(source, alpha, settings[alpha]),
        None if rank is None else _number(source, "r", rank),
        is_by_root,
        _pattern(source, "alpha_pattern", settings.get("alpha_pattern")),
        _pattern(source, "rank_pattern", settings.get("rank_pattern")),
        kind,
        bool(settings.get("use_dora")),
    )


def _of_the_model(source: str, told: Mapping[str, object]) -> dict[str, object]:
    """Returns the settings that are for the transformer, and tells of those for other models.

    Keys may have the prefix of the model, or lie in an object that is called after it.
    """
    flat: list[tuple[str, object]] = []
    for key, value in told.items():
        if f"{key}." in PREFIXES and isinstance(value, dict):
            flat += [(f"{key}.{inner}", held) for inner, held in value.items()]
        else:
            flat.append((key, value))
    settings, others = dict[str, object](), list[str]()
    for key, value in flat:
        name = without_prefixes(key)
        if "." in name:
            others.append(key)
        elif (held := settings.setdefault(name, value)) is not value and held != value:
            raise BadCheckpoint(f"{source} gives {name[:40]} twice, with two values.")
    if others:
        log.warning("%s: %s is of another model and not used", source, min(others)[:60])
    return settings


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
        own_name(without_prefixes(key)): _number(source, f"{name}.{key}", number)
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
