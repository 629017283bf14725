"""Prompt embeddings that a package carries, so that a worker need not load UMT5 for them.

A safetensors file: the rows of prompt n are tensor "n"; the metadata holds the prompts and what
made them.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import BadPackage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredPrompts:
    """Embeddings of some prompts, and what made them."""

    encoder_sha256: str
    encoder_bytes: int
    tokenizer_sha256: str
    precision: str  # what the encoder computed in
    rows: Mapping[str, Tensor]  # cleaned prompt -> its real tokens [n, C]

    def suits(self, encoder: Path) -> bool:
        """False if the text encoder at hand is another one, which is logged.

        Sizes are compared: to hash 11 GB takes longer than to load them.
        """
        if not encoder.is_file() or encoder.stat().st_size == self.encoder_bytes:
            return True
        log.warning("%s is not the text encoder of the package's prompts", encoder.name)
        return False

    def dump(self) -> bytes:
        """The file that `load_prompts` reads."""
        facts = {
            "prompts": json.dumps(list(self.rows)),
            "encoder_sha256": self.encoder_sha256,
            "encoder_bytes": str(self.encoder_bytes),
            "tokenizer_sha256": self.tokenizer_sha256,
            "precision": self.precision,
        }
        rows = {str(n): made.cpu().contiguous() for n, made in enumerate(self.rows.values())}
        return save(rows, facts)


def load_prompts(path: Path) -> StoredPrompts:
    """Reads a file that `StoredPrompts.dump` made. Raises `BadPackage`."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            prompts = json.loads(facts["prompts"])
            rows = {prompt: file.get_tensor(str(n)) for n, prompt in enumerate(prompts)}
        return StoredPrompts(
            facts["encoder_sha256"],
            int(facts["encoder_bytes"]),
            facts["tokenizer_sha256"],
            facts["precision"],
            rows,
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise BadPackage(
            f"{path.name} holds no prompt embeddings ({error}). Build the package again."
        ) from error
