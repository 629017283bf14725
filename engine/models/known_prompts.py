"""The embeddings of the last prompts, so that a job with one of them reads no file for it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KEPT = 32  # on the host, 8 MB each at the width of UMT5-XXL

Embed = Callable[[Sequence[str]], list[Tensor]]


class KnownPrompts:
    """Embeds prompts by a function that is asked only for those it was not asked for lately."""

    def __init__(self, embed: Embed, device: torch.device) -> None:
        """`embed` gives tensors on any device; they are handed out on `device`."""
        self._embed, self._device = embed, device
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings [512, C], in the order of the prompts. Raises what the function raises."""
        found = {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            found |= dict(zip(missing, self._embed(missing), strict=True))
        for prompt, embedding in found.items():
            self._known[prompt] = embedding.cpu()
            self._known.move_to_end(prompt)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return [found[prompt].to(self._device) for prompt in prompts]
