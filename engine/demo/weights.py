"""The tiny presets: seeded random weights in the layouts of the real files, written once to disk.

They make every loader and every stage run on any machine; the picture they make is noise.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from engine.config import TINY, TINY_SCAIL2, ModelConfig
from engine.errors import OutputError
from engine.models.dit import Scail
from engine.models.vae import Vae

log = logging.getLogger(__name__)

SEED = 20251123
VERSION, SCAIL2_VERSION = 1, 1  # raised when what is written changes
TRANSFORMER = "diffusion_models/{}_tiny_bf16.safetensors"
VAE_WIDTH = 8
TEXT_LAYERS, TEXT_HEADS, TEXT_HEAD_SIZE, TEXT_FFN = 2, 2, 64, 128
VISION_LAYERS, VISION_PATCH, VISION_IMAGE = 3, 14, 224
ALPHABET = [chr(code) for code in range(33, 127)]


@dataclass(frozen=True, slots=True)
class DemoWeights:
    """A checkpoint and a models folder like those that users have."""

    checkpoint: Path
    models: Path


def demo_weights(state: Path) -> DemoWeights:
    """Finds the tiny weights below `state`, or writes them there: all of them or nothing."""
    home = _written(state, f"tiny-{VERSION}", write_tiny)
    return DemoWeights(home / TRANSFORMER.format("scail"), home)


def scail2_weights(state: Path) -> DemoWeights:
    """Finds a tiny transformer of SCAIL-2, or writes it; the models beside it are those of tiny."""
    home = _written(state, f"tiny-scail2-{SCAIL2_VERSION}", write_tiny_scail2)
    return DemoWeights(home / TRANSFORMER.format("scail2"), demo_weights(state).models)


def _written(state: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Has a folder of weights written below `state` if it is not there yet."""
    home = state / name
    if not home.is_dir():
        log.info("writing the preset to %s", home)
        try:
            state.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{home.name}-", dir=state) as fresh:
                write(Path(fresh, home.name))
                Path(fresh, home.name).rename(home)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not home.is_dir():  # another process may have been first
                raise OutputError(
                    f"{state} cannot hold the demo weights: {error}. Set SCAIL_STATE to a folder."
                ) from error
    return home


def write_tiny(home: Path) -> None:
    """Writes transformer, VAE, text encoder with tokenizer, and image encoder below `home`."""
    for name in ("diffusion_models", "vae", "text_encoders/tokenizer", "clip_vision"):
        (home / name).mkdir(parents=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        transformer = tiny_transformer(TINY)
        vae = Vae(VAE_WIDTH).state_dict()
        text, vision = _umt5(), _clip()
    _save(transformer, home / TRANSFORMER.format("scail"))
    torch.save(vae, home / "vae" / "Wan2.1_VAE.pth")
    save_file(text, home / "text_encoders" / "umt5-xxl-enc-bf16.safetensors")
    _write_tokenizer(home / "text_encoders" / "tokenizer")
    torch.save(
        vision,
        home / "clip_vision" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
    )


def write_tiny_scail2(home: Path) -> None:
    """Writes a transformer of SCAIL-2 below `home`."""
    path = home / TRANSFORMER.format("scail2")
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        _save(tiny_transformer(TINY_SCAIL2), path)


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, path)


def tiny_transformer(config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a SCAIL transformer of a tiny size under their converted names."""
    model = Scail(config)
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):  # tables, which no library initialises
            nn.init.normal_(parameter, std=config.dim**-0.5)
    return model.state_dict()


def _umt5() -> dict[str, Tensor]:
    width, inner = TINY.text_dim, TEXT_HEADS * TEXT_HEAD_SIZE
    weights = {
        "token_embedding.weight": torch.randn(len(_vocabulary()), width),
        "norm.weight": torch.ones(width),
    }
    for n in range(TEXT_LAYERS):
        block = f"blocks.{n}."
        weights |= {
            f"{block}norm1.weight": torch.ones(width),
            f"{block}norm2.weight": torch.ones(width),
            f"{block}attn.q.weight": torch.randn(inner, width) * (width * TEXT_HEAD_SIZE) ** -0.5,
            f"{block}attn.k.weight": torch.randn(inner, width) * width**-0.5,
            f"{block}attn.v.weight": torch.randn(inner, width) * width**-0.5,
            f"{block}attn.o.weight": torch.randn(width, inner) * inner**-0.5,
            f"{block}pos_embedding.embedding.weight": torch.randn(32, TEXT_HEADS),
            f"{block}ffn.gate.0.weight": torch.randn(TEXT_FFN, width) * width**-0.5,
            f"{block}ffn.fc1.weight": torch.randn(TEXT_FFN, width) * width**-0.5,
            f"{block}ffn.fc2.weight": torch.randn(width, TEXT_FFN) * TEXT_FFN**-0.5,
        }
    return {name: weight.bfloat16() for name, weight in weights.items()}


def _clip() -> dict[str, Tensor]:
    width, tokens = TINY.clip_dim, (VISION_IMAGE // VISION_PATCH) ** 2 + 1
    weights = {
        "log_scale": torch.zeros(()),
        "visual.cls_embedding": torch.randn(1, 1, width) * width**-0.5,
        "visual.pos_embedding": torch.randn(1, tokens, width) * width**-0.5,
        "visual.patch_embedding.weight": torch.randn(width, 3, VISION_PATCH, VISION_PATCH) * 0.04,
        "visual.head": torch.randn(width, width) * width**-0.5,
    }
    norms = ["visual.pre_norm", "visual.post_norm"]
    linears: list[tuple[str, int, int]] = []
    for n in range(VISION_LAYERS):
        block = f"visual.transformer.{n}."
        norms += [f"{block}norm1", f"{block}norm2"]
        linears += [
            (f"{block}attn.to_qkv", 3 * width, width),
            (f"{block}attn.proj", width, width),
            (f"{block}mlp.0", 4 * width, width),
            (f"{block}mlp.2", width, 4 * width),
        ]
    for name in norms:
        weights |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    for name, rows, columns in linears:
        weights[f"{name}.weight"] = torch.randn(rows, columns) * columns**-0.5
        weights[f"{name}.bias"] = torch.zeros(rows)
    return {name: weight.half() for name, weight in weights.items()}


def _vocabulary() -> list[tuple[str, float]]:
    """Pieces and their scores in UMT5's order: padding is 0, the end of a text 1."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *ALPHABET]
    return [(piece, 0.0 if n < 3 else -float(n)) for n, piece in enumerate(pieces)]


def _write_tokenizer(folder: Path) -> None:
    """A SentencePiece-like tokenizer of single letters, in the files of the real one."""
    tokenizer = Tokenizer(models.Unigram(_vocabulary(), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
