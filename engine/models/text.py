"""UMT5 text encoder: prompts -> embeddings, from any of the weight files people have.

A prompt is cleaned, cut into at most 512 tokens and encoded on its real tokens alone, which is
exact; the rows of the padding are zero (docs/reference/encoders.md 2). Embeddings are kept on
disk, so that the 5.7 billion weights are read only for a prompt never seen before. They are read
once for all prompts of a clip, and pass the device block by block: it never holds two of 24.
"""

import hashlib
import html
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor

from engine.config import TEXT_TOKENS
from engine.diskcache import DiskCache, remembered_sha256
from engine.errors import BadCheckpoint, MissingModel
from engine.models.fill import Stored, check_weights, depth, dims, read_weights
from engine.models.stored_prompts import StoredPrompts
from engine.models.tensorfile import TensorFile
from engine.models.umt5 import EncoderShape, Stack

log = logging.getLogger(__name__)

END = "</s>"
END_ID = 1
CACHE_BYTES = 512 * 2**20  # 512 prompts of UMT5-XXL at 128 tokens in BF16
BUCKETS = 32  # of distances
_BLOCK = re.compile(r"(?:blocks|encoder\.block)\.(?P<n>\d+)\.")
LAYERS = {4096: 24}  # by width: a file of UMT5-XXL cut between two blocks must not pass as whole

# transformers -> official, inside a block (docs/reference/encoders.md 2.3)
OFFICIAL_NAMES = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
LINEAR = re.compile(r".+\.(SelfAttention\.[qkvo]|DenseReluDense\.\w+)")  # only these are quantised
SCALES = (".weight_scale", ".scale_weight")
EMBEDDED_TOKENIZER = "spiece_model"
# scales and settings of other programs' 8-bit activations; here 16 or 32 bits are multiplied
EXTRAS = r"scaled_fp8|spiece_model|.+\.(scale_input|input_scale|comfy_quant)"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def clean_prompt(text: str) -> str:
    """Repairs mojibake, entities and runs of whitespace (docs/reference/encoders.md 2.2)."""
    import ftfy  # a tenth of a second to import: when there is a prompt

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def embed_prompts(
    prompts: Sequence[str],
    encoder: Path,
    models: Path,
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
    stored: StoredPrompts | None = None,
) -> list[Tensor]:
    """Embeds prompts for the transformer: [512, C] fp32 each, zero after the real tokens.

    Prompts that are `stored` need no encoder. For others see `embed_rows`.
    """
    texts = [clean_prompt(prompt) for prompt in prompts]
    rows = {}
    if stored is not None and stored.suits(encoder):
        rows = {text: stored.rows[text] for text in texts if text in stored.rows}
        for text in rows:
            log.info("prompt of %d characters: its embedding is in the package", len(text))
    missing = [text for text in texts if text not in rows]
    if missing:
        rows |= embed_rows(missing, encoder, models, cache, device, dtype)
    return [_padded(rows[text].to(device)) for text in texts]


def store_prompts(
    prompts: Sequence[str], encoder: Path, models: Path, cache: Path, dtype: torch.dtype
) -> StoredPrompts:
    """Makes the embeddings for a package on the CPU. Raises what `embed_rows` raises."""
    texts = [clean_prompt(prompt) for prompt in prompts]
    rows = embed_rows(texts, encoder, models, cache, torch.device("cpu"), dtype)
    return StoredPrompts(
        encoder_sha256=remembered_sha256(encoder, cache),
        encoder_bytes=encoder.stat().st_size,
        tokenizer_sha256=find_tokenizer(encoder, models).sha256,
        precision=str(dtype).removeprefix("torch."),
        rows=rows,
    )


def passing_bytes(path: Path, dtype: torch.dtype) -> int:
    """Counts the most bytes of the weights on a device at once: a block, and as much again for what
    is made of 8 bits on the way. The table of tokens stays in its file.
    """
    file, blocks = TensorFile(path), Counter[str]()
    for name in file:
        if found := _BLOCK.match(name):
            blocks[found["n"]] += math.prod(file.shape(name))
    return 2 * max(blocks.values(), default=0) * dtype.itemsize


def embed_rows(
    texts: Sequence[str],
    encoder: Path,
    models: Path,
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Embeds cleaned prompts: for each the rows of its real tokens [n, C].

    `cache` is the folder of known embeddings; the encoder is read only if one is missing. `dtype`
    is what it computes in: fp32 or bf16, fp16 overflows. Raises `MissingModel` without encoder or
    tokenizer, `BadCheckpoint` if one cannot be used.
    """
    if not encoder.is_file():
        raise MissingModel(f"There is no text encoder {encoder}.")
    tokenizer = find_tokenizer(encoder, models)
    made_by = f"{remembered_sha256(encoder, cache)} {tokenizer.sha256} {dtype}"
    store = DiskCache(cache, CACHE_BYTES)
    known = {text: store.read(f"{made_by}\n{text}") for text in texts}
    rows = {text: load(held)["rows"] for text, held in known.items() if held is not None}
    missing = [text for text in known if text not in rows]
    if missing:
        for text, made in _embed(missing, tokenizer, encoder, device, dtype).items():
            store.write(f"{made_by}\n{text}", save({"rows": made.cpu().contiguous()}))
            rows[text] = made
    return rows


def _embed(
    texts: Sequence[str],
    tokenizer: "Tokenizer",
    encoder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    model = TextEncoder(encoder, device, dtype)
    rows = dict(zip(texts, model.embed_all([tokenizer(text) for text in texts]), strict=True))
    if not all(torch.isfinite(made).all() for made in rows.values()):
        raise BadCheckpoint(
            f"{encoder.name} gives embeddings that are not finite; its weights are damaged."
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the transformer needs the room next
    return rows


def _padded(rows: Tensor) -> Tensor:
    embedding = rows.new_zeros(TEXT_TOKENS, rows.shape[1], dtype=torch.float32)
    embedding[: len(rows)] = rows
    return embedding


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Cleaned text -> token ids. `sha256` is that of the file the pieces come from."""

    pieces: Callable[[str], list[int]]
    sha256: str

    def __call__(self, text: str) -> Tensor:
        """Ids [n] int64, 1 <= n <= 512: as many pieces as fit, then the end token."""
        return torch.tensor([*self.pieces(text)[: TEXT_TOKENS - 1], END_ID])


def find_tokenizer(encoder: Path, models: Path) -> Tokenizer:
    """The tokenizer beside the text encoder, else in the models folder, else in the encoder's file.

    Raises `MissingModel` with the names that would have been taken.
    """
    beside = encoder.parent
    folders = (
        beside,
        beside / "umt5-xxl",
        beside / "google" / "umt5-xxl",
        beside / "tokenizer",
        models / "tokenizer",
        models / "umt5-xxl",
    )
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(folder)
    file = TensorFile(encoder)
    if EMBEDDED_TOKENIZER in file:
        with file.open(EMBEDDED_TOKENIZER) as stored:
            return _tokenizer(stored.numpy().tobytes(), _sentence_pieces, encoder.name)
    raise MissingModel(
        f"No tokenizer for {encoder.name}: expected {' or '.join(TOKENIZER_FILES)} of "
        f"google/umt5-xxl in one of {', '.join(str(folder) for folder in folders)}."
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The UMT5 tokenizer of a folder, from tokenizer.json or spiece.model.

    The files are read as they are: the class that transformers 5 makes of them puts unknown pieces
    at id 2 and knows no byte pieces, so it splits Chinese otherwise than the model was trained.
    """
    for name, parse in zip(TOKENIZER_FILES, (_json_pieces, _sentence_pieces)):
        path = folder / name
        if path.is_file():
            return _tokenizer(path.read_bytes(), parse, str(path))
    raise MissingModel(f"There is no {' or '.join(TOKENIZER_FILES)} in {folder}.")


Pieces = Callable[[str], list[int]]


def _tokenizer(
    data: bytes, parse: Callable[[bytes], tuple[Pieces, int | None]], source: str
) -> Tokenizer:
    try:
        pieces, end = parse(data)
    except (ValueError, RuntimeError) as error:
        raise BadCheckpoint(f"{source}: not a tokenizer ({len(data)} bytes): {error}") from error
    if end != END_ID:
        raise BadCheckpoint(
            f"{source} is not the tokenizer of UMT5: {END} has id {end}, expected {END_ID}."
        )
    return Tokenizer(pieces, hashlib.sha256(data).hexdigest())


def _json_pieces(data: bytes) -> tuple[Pieces, int | None]:
    tokenizer = JsonTokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.token_to_id(END)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end


def _sentence_pieces(data: bytes) -> tuple[Pieces, int | None]:
    if not data:
        raise ValueError("the file is empty")  # the library would take it for no file
    processor = SentencePieceProcessor(model_proto=data)
    return processor.encode, processor.piece_to_id(END)


class TextEncoder:
    """UMT5 on `device`, computing in `dtype`; its token table stays mapped in its file.

    Names may be the official or the transformers ones, weights fp32 to fp8 or int8, the 8-bit ones
    with a scale a tensor or a row, or fp8 plainly cast (docs/reference/encoders.md 2.3, 2.5). The
    model's dimensions are read from the shapes. Raises `MissingModel` or `BadCheckpoint`.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Checks all that the headers tell; weights are read when something is embedded."""
        self._file = TensorFile(path)
        self._device, self._dtype = device, dtype
        self._table = _table_name(self._file)
        self._stack, self._stored = _stack(self._file, self._table)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [n] of real tokens -> embedding [n, C] in the dtype of the encoder."""
        return self.embed_all([ids])[0]

    @torch.inference_mode()
    def embed_all(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Embeds the ids [n] of prompts, each by itself, with weights that are read once."""
        rows = [self._rows(ids) for ids in prompts]
        parts = {f"block.{n}.": block for n, block in enumerate(self._stack.block)}
        for prefix, part in (parts | {"final_layer_norm.": self._stack.final_layer_norm}).items():
            without = part.state_dict()
            stored = {name: self._stored[prefix + name] for name in without}
            read_weights(part, self._file, stored, self._device, self._dtype)
            rows = [part(x) for x in rows]
            part.load_state_dict(without, assign=True)
        return rows

    def _rows(self, ids: Tensor) -> Tensor:
        vocabulary, _ = self._file.shape(self._table)
        if int(ids.max()) >= vocabulary:
            raise BadCheckpoint(
                f"{self._file.path.name} knows {vocabulary} tokens, the tokenizer gave token "
                f"{int(ids.max())}: they do not belong together."
            )
        with self._file.open(self._table) as table:
            rows = table[ids.cpu()]
        return rows.to(self._device, self._dtype)


def _table_name(file: TensorFile) -> str:
    names = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
    for name in names:
        if name in file:
            return name
    raise BadCheckpoint(
        f"{file.path.name} is not a UMT5 encoder: it has none of {', '.join(names)}."
    )


def _stack(file: TensorFile, table: str) -> tuple[Stack, dict[str, Stored]]:
    """The blocks without weights, and where these lie; the table that turns ids into rows is none
    of them.
    """
    official = table == "token_embedding.weight"
    pattern = r"blocks\.(?P<n>\d+)\." if official else r"encoder\.block\.(?P<n>\d+)\."
    layers = depth(file, re.compile(pattern))
    _, width = dims(file, table, 2)
    if layers != LAYERS.get(width, layers):
        raise BadCheckpoint(f"{file.path.name} has {layers} blocks, expected {LAYERS[width]}.")

    def name(inner: str) -> str:
        return _stored_name(f"block.0.{inner}.weight", official)

    buckets, heads = dims(file, name("layer.0.SelfAttention.relative_attention_bias"), 2)
    inner, _ = dims(file, name("layer.0.SelfAttention.q"), 2)
    if buckets != BUCKETS or inner % heads:
        raise BadCheckpoint(
            f"{file.path.name} has {buckets} buckets of distances and {heads} heads in {inner} "
            f"channels, expected {BUCKETS} buckets, and heads that divide the channels."
        )
    hidden, _ = dims(file, name("layer.1.DenseReluDense.wi_0"), 2)
    with torch.device("meta"):
        stack = Stack(EncoderShape(width, heads, inner, hidden, layers, buckets)).eval()
    stored = {target: _stored(file, target, official) for target in stack.state_dict()}
    tables = r"shared\.weight|encoder\.embed_tokens\.weight"  # tied: a file may hold both
    ignored = re.compile(f"({re.escape(table) if official else tables}|{EXTRAS})$")
    check_weights(stack, file, stored, ignored)
    return stack, stored


def _stored(file: TensorFile, target: str, official: bool) -> Stored:
    name = _stored_name(target, official)
    layer = target.removesuffix(".weight")
    scales = [name.removesuffix(".weight") + suffix for suffix in SCALES]
    held = (scale for scale in scales if LINEAR.fullmatch(layer) and scale in file)
    return Stored(name, scale=next(held, None))


def _stored_name(target: str, official: bool) -> str:
    """The name in the file of a parameter of the stack."""
    if not official:
        return f"encoder.{target}"
    if target == "final_layer_norm.weight":
        return "norm.weight"
    _, block, inner = target.removesuffix(".weight").split(".", 2)
    return f"blocks.{block}.{OFFICIAL_NAMES[inner]}.weight"
