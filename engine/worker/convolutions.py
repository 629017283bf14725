"""Lets cuDNN choose how the VAE's convolutions run, for the sizes that jobs will have.

Its choice for a size is made when the size is first met, by timing some ways for each convolution,
and kept by the thread that asked: so before the first job, in the thread of the jobs.
Source: docs/reference/encoders.md 1.6.
"""

import logging
import time
from collections.abc import Callable, Iterable

import torch

from engine.config import LATENT_CHANNELS, VAE_STRIDE
from engine.machine.exhausted import ran_out
from engine.media.framing import Size
from engine.models.vae import ENCODE_STEP
from engine.models.vae_decode import fastest_convolutions
from engine.pipeline import Pipeline

log = logging.getLogger(__name__)


def choose_plans(
    pipeline: Pipeline,
    sizes: Iterable[Size],
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Encodes a picture and half-size skeleton of nothing, and decodes two latents, at each size
    (height, width). On a CPU nothing is chosen. A size that does not fit now is left to its job,
    with a line in the log; each of the others has a line with its time.
    """
    if device.type != "cuda":
        return
    for height, width in sizes:
        begin, size = now(), f"{width}x{height}"
        try:
            _run(pipeline, height, width)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            reason = str(error).partition("\n")[0]
            log.warning("the VAE's convolutions at %s are left to the first job: %s", size, reason)
        else:
            log.info("%-12s %8.0f ms, of the VAE at %s", "plans", 1000 * (now() - begin), size)


@torch.inference_mode()
def _run(pipeline: Pipeline, height: int, width: int) -> None:
    encoders = pipeline.encoders
    frames, rows, columns = VAE_STRIDE
    half = 3, 1 + ENCODE_STEP, height // 2, width // 2
    latents = torch.zeros(LATENT_CHANNELS, 2, height // rows, width // columns)
    with (
        pipeline.memory.stage("decode"),  # gives the decoder's buffers back
        encoders.vae_home.present(),
        fastest_convolutions(),
    ):
        encoders.vae.encode([torch.zeros(3, 1, height, width)])
        encoders.vae.encode([torch.zeros(*half)])
        made = sum(len(piece) for piece in encoders.decode(latents))
    assert made == 1 + frames
