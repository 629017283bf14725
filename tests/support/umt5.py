"""A tiny UMT5 encoder and its tokenizer, written as people's files hold them."""

import json
from io import BytesIO

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.models.text import OFFICIAL_NAMES, TextEncoder

CPU = torch.device("cpu")
LAYERS, WIDTH, HEADS, HEAD_SIZE, HIDDEN, VOCABULARY = 3, 64, 2, 48, 96, 400
IDS = torch.tensor([5, 17, 399, 2, 44, 44, 8, 1])
FP8 = torch.float8_e4m3fn


def umt5(width=WIDTH, layers=LAYERS):
    """Weights under the official names, of about the size at which UMT5 starts training."""
    generator = torch.Generator().manual_seed(7)
    inner = HEADS * HEAD_SIZE
    shapes = {
        "norm1": (width,),
        "norm2": (width,),
        "attn.q": (inner, width),
        "attn.k": (inner, width),
        "attn.v": (inner, width),
        "attn.o": (width, inner),
        "pos_embedding.embedding": (32, HEADS),
        "ffn.gate.0": (HIDDEN, width),
        "ffn.fc1": (HIDDEN, width),
        "ffn.fc2": (width, HIDDEN),
    }
    shapes = {f"blocks.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}
    shapes |= {"token_embedding": (VOCABULARY, width), "norm": (width,)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        + ("norm" in name)
        for name, shape in shapes.items()
    } | {  # its scores are not divided by the root of the head size
        f"blocks.{n}.attn.q.weight": torch.randn(inner, width, generator=generator)
        * (width * HEAD_SIZE) ** -0.5
        for n in range(layers)
    }


def with_library_names(weights):
    renamed = {}
    for name, weight in weights.items():
        parts = name.removesuffix(".weight").split(".", 2)
        if parts[0] == "blocks":
            inner = next(ours for ours, theirs in OFFICIAL_NAMES.items() if theirs == parts[2])
            renamed[f"encoder.block.{parts[1]}.{inner}.weight"] = weight
    renamed["shared.weight"] = weights["token_embedding.weight"]
    renamed["encoder.final_layer_norm.weight"] = weights["norm.weight"]
    return renamed


def linears(weights):
    return [name for name in weights if ".attn." in name or ".ffn." in name]


def quantised(weights, dtype, per_row, suffix):
    """Linears in 8 bits with their scales, and the weights that these stand for."""
    stored, exact = dict(weights), dict(weights)
    limit = 448.0 if dtype == FP8 else 127.0
    for name in linears(weights):
        peak = weights[name].abs().amax(1, keepdim=True) if per_row else weights[name].abs().max()
        scale = peak / limit
        rows = weights[name] / scale
        stored[name] = (rows if dtype == FP8 else rows.round()).to(dtype)
        stored[name.removesuffix("weight") + suffix] = scale
        exact[name] = stored[name].float() * scale
    return stored, exact


def embed(folder, weights, name="umt5.safetensors", dtype=torch.float32):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return TextEncoder(path, CPU, dtype).embed(IDS)


LETTERS = "abcdefghijklmnopqrstuvwxyz<>,"


def write_tokenizer(folder, extra="", end="</s>"):
    """UMT5's order of pieces: padding 0, end 1, unknown 3, then the bytes."""
    pieces = ["<pad>", end, "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scored = [(piece, 0.0) for piece in pieces]
    scored += [(piece, -2.0) for piece in ["\u2581", *LETTERS, *extra]]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 1)]
    )
    tokenizer.enable_truncation(7)  # what a file says about lengths is not what the model wants
    tokenizer.enable_padding(length=9)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))


def sentence_pieces():
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a girl is dancing in the rain"] * 20),
        model_writer=model,
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()
