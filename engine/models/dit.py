"""The SCAIL transformer in plain PyTorch: the specification, and what packages are built from.

A Wan2.1 video transformer that is told about the character and the dance by extra tokens: the
latent of the reference picture and of the half-size skeleton clip join the noisy video in one
sequence, each with its own region of 3D RoPE. Parameters carry the names of the converted
checkpoints (docs/reference/denoiser.md 2.2).

SCAIL-2 is the same network with one module more, which adds to every token what a colour mask says
of it: who is who (docs/reference/scail2.md). Its tokens may begin with those of further pictures.
SCAIL-Preview is the special case without masks, further pictures and the mode of replacement.

Precision: the linears inside the blocks run in the dtype they are stored in; modulation, norms,
RoPE, the residual stream and all that lies outside the blocks stay FP32
(docs/reference/denoiser.md 4.5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import HEAD_SIZE, LATENT_CHANNELS, MASK_CHANNELS, ModelConfig
from engine.flow import Mode, Roles
from engine.models.attention import Attention, sdpa

PATCH = (1, 2, 2)
TIME_FREQUENCIES = 256
EPS = 1e-6  # every norm but the two of the CLIP projector
ROPE_THETA = 10_000.0
ROPE_DIMS = (44, 42, 42)  # of a head's 128, for time, rows, columns
POSE_COLUMN_SHIFT = 120  # patches between a video token and its skeleton token


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of the video beside the pictures in RoPE (docs/reference/scail2.md 3)."""

    later: int  # latent frames between the picture and the first frame
    lower: int  # rows, in patches, by which the pictures are moved


PLACEMENTS: dict[Mode, Placement] = {
    "animation": Placement(later=1, lower=0),  # SCAIL-Preview knows no other
    "replacement": Placement(later=0, lower=120),
}


@dataclass(frozen=True, slots=True)
class Context:
    """The rows that cross attention looks at, the same at every step of a clip."""

    text: Tensor  # [L, D]
    vision: Tensor  # [257, D]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of each token's 64 pairs. Skeleton tokens hold pooled tables, so they shrink too."""

    cos: Tensor  # [S, 1, K / 2] fp32
    sin: Tensor  # [S, 1, K / 2] fp32


class Scail(nn.Module):
    """Velocity (noise minus clean) of a noisy clip, given all that is known about it."""

    def __init__(self, config: ModelConfig, attention: Attention = sdpa) -> None:
        super().__init__()
        dim = config.dim
        channels = LATENT_CHANNELS + MASK_CHANNELS
        self.config = config
        self.patch_embedding = nn.Conv3d(channels, dim, PATCH, stride=PATCH)
        self.patch_embedding_pose = nn.Conv3d(channels, dim, PATCH, stride=PATCH)
        self.patch_embedding_mask = None
        if config.mask_dim:
            self.patch_embedding_mask = nn.Conv3d(config.mask_dim, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = VisionProjector(config.clip_dim, dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.head = Head(dim)

    def forward(
        self,
        latents: Tensor,
        timestep: float,
        context: Context,
        reference: Tensor,
        pose: Tensor | None,
        history: Tensor | None = None,
        pose_strength: float = 1.0,
        roles: Roles | None = None,
    ) -> Tensor:
        """One evaluation for one text (docs/reference/denoiser.md 3).

        latents [16, t, h, w]; timestep 1000 * sigma; reference [16, 1, h, w];
        pose [16, t, h/2, w/2], None leaves the skeleton out; history [4, t, h, w], 1 where a
        frame is already known; roles where the model takes masks, and only there. Returns
        [16, t, h, w] fp32. h and w are multiples of 4.
        `pose_strength` multiplies the skeleton's tokens (docs/reference/denoiser.md 7).
        """
        grid = patch_grid(latents)
        tokens = self.embed(latents, reference, pose, history, pose_strength, roles)  # [S, D]
        rope = rope_tables(grid, pose is not None, tokens.device, *places(roles))
        e, modulation = self.embed_time(timestep)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, rope)
        area = grid[1] * grid[2]
        first = area * pictures(roles)
        return self.head(tokens[first : first + area * grid[0]], e, grid)

    def embed(
        self,
        latents: Tensor,
        reference: Tensor,
        pose: Tensor | None,
        history: Tensor | None = None,
        pose_strength: float = 1.0,
        roles: Roles | None = None,
    ) -> Tensor:
        """Tokens [S, D] in the order further pictures, reference, video, skeleton.

        A mask of four channels is 1 where a frame is known. The masks of `roles` add to the tokens
        that they lie on; the video has none, and gets the bias of their embedding. Sources:
        docs/reference/denoiser.md 3.1, docs/reference/scail2.md 2.
        """
        video = _with_mask(latents, 0.0) if history is None else torch.cat([latents, history])
        picture = torch.cat([_with_mask(reference, 1.0), video], dim=1)
        tokens = _flatten(self.patch_embedding(picture))
        skeleton = None
        if pose is not None:
            skeleton = _flatten(self.patch_embedding_pose(_with_mask(pose, 1.0)))
        if (embed_mask := self.patch_embedding_mask) is None:
            assert roles is None, "this model takes no masks"
            if skeleton is None:
                return tokens
            return torch.cat([tokens, pose_strength * skeleton])
        assert roles is not None, "this model takes masks"
        unmasked = roles.reference.new_zeros(len(roles.reference), *latents.shape[1:])
        tokens = tokens + _flatten(embed_mask(torch.cat([roles.reference, unmasked], dim=1)))
        regions = [tokens]
        if roles.count:
            further = _flatten(self.patch_embedding(_with_mask(roles.additional, 1.0)))
            regions.insert(0, further + _flatten(embed_mask(roles.additional_masks)))
        if skeleton is not None:
            skeleton = skeleton + _flatten(embed_mask(roles.driving))
            regions.append(pose_strength * skeleton)
        return torch.cat(regions)

    def embed_time(self, timestep: float) -> tuple[Tensor, Tensor]:
        """The time vector [D] and the modulation that all layers share [6, D].

        Source: docs/reference/denoiser.md 3.2.
        """
        e, modulation = self.embed_times([timestep])
        return e[0], modulation[0]

    def embed_times(self, timesteps: Sequence[float]) -> tuple[Tensor, Tensor]:
        """`embed_time` for several timesteps: [n, D] and [n, 6, D]."""
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        times = torch.tensor(timesteps, dtype=torch.float64)
        angles = times[:, None] * torch.exp(-math.log(10_000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        e = self.time_embedding(sinusoids.to(next(self.time_embedding.parameters()).device))
        return e, self.time_projection(e).unflatten(1, (6, -1))

    def embed_context(self, text: Tensor, vision: Tensor) -> Context:
        """Embeds text [L, text_dim], in which zero rows take part, and vision [257, clip_dim]."""
        return Context(self.text_embedding(text), self.img_emb(vision))


class Block(nn.Module):
    """Self attention over all tokens, cross attention to text and picture, feed forward.

    Source: docs/reference/denoiser.md 3.5.
    """

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config, attention)
        self.norm3 = nn.LayerNorm(config.dim, eps=EPS)
        self.cross_attn = CrossAttention(config, attention)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn), nn.GELU("tanh"), Linear(config.ffn, config.dim)
        )

    def forward(self, x: Tensor, modulation: Tensor, context: Context, rope: Rope) -> Tensor:
        """x [S, D] fp32; modulation [6, D], shared by all layers."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation + self.modulation[0]
        x = x + gate1 * self.self_attn(modulate(x, shift1, scale1), rope)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2))


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        dim = config.dim
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=EPS) for _ in range(2))
        self.attention = attention

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        v = self.v(x)
        q, k = (side.to(v.dtype) for side in self.rotated_queries_and_keys(x, rope))
        return self.o(self.attention(q, k, split_heads(v)).flatten(1))

    def rotated_queries_and_keys(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """RMSNorm over all D features, before the heads are split, then RoPE: [S, N, K] fp32."""
        q, k = self.norm_q(self.q(x).float()), self.norm_k(self.k(x).float())
        return rotate(split_heads(q), rope), rotate(split_heads(k), rope)


class CrossAttention(nn.Module):
    """Text and picture have a softmax each; their results are added before the projection."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        dim = config.dim
        self.q, self.k, self.v, self.k_img, self.v_img, self.o = (
            Linear(dim, dim) for _ in range(6)
        )
        self.norm_q, self.norm_k, self.norm_k_img = (nn.RMSNorm(dim, eps=EPS) for _ in range(3))
        self.attention = attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.norm_q(self.q(x).float())
        text = self.norm_k(self.k(context.text).float()), self.v(context.text)
        vision = self.norm_k_img(self.k_img(context.vision).float()), self.v_img(context.vision)
        out = self._attend(q, *text) + self._attend(q, *vision)
        return self.o(out.flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.attention(split_heads(q), split_heads(k), split_heads(v))


class VisionProjector(nn.Module):
    """CLIP features to the width of the model, with the exact GELU.

    Source: docs/reference/denoiser.md 3.3.
    """

    def __init__(self, clip_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim, eps=1e-5),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim, eps=1e-5),
        )

    def forward(self, vision: Tensor) -> Tensor:
        return self.proj(vision)


class Head(nn.Module):
    """Last norm and projection of the video tokens, put back into a latent.

    Source: docs/reference/denoiser.md 3.6.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, math.prod(PATCH) * LATENT_CHANNELS)

    def forward(self, x: Tensor, e: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """x [t * h/2 * w/2, D], e [D] -> [16, t, h, w]."""
        shift, scale = e + self.modulation[0]
        patches = self.head(modulate(x, shift, scale)).view(*grid, *PATCH[1:], LATENT_CHANNELS)
        t, rows, columns = grid
        return patches.permute(5, 0, 1, 3, 2, 4).reshape(-1, t, 2 * rows, 2 * columns)


class Linear(nn.Linear):
    """Computes in the dtype of its weight, whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then AdaLN. x [S, D], shift and scale [D]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_SIZE))  # [S, N, K]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates the pairs (2j, 2j + 1) of every head. x [S, N, K] fp32 -> same."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (even * rope.cos - odd * rope.sin, odd * rope.cos + even * rope.sin)
    return torch.stack(rotated, dim=-1).flatten(-2)


def patch_grid(latents: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of video tokens for latents [16, t, h, w]."""
    _, t, h, w = latents.shape
    return t, h // PATCH[1], w // PATCH[2]


def pictures(roles: Roles | None) -> int:
    """Counts the pictures whose tokens stand before those of the video: the first one is one."""
    return 1 if roles is None else 1 + roles.count


def places(roles: Roles | None) -> tuple[int, Mode]:
    """Returns what `rope_tables` asks for beside the grid: pictures beside the first, and mode."""
    return (0, "animation") if roles is None else (roles.count, roles.mode)


def rope_tables(
    grid: tuple[int, int, int],
    with_pose: bool,
    device: torch.device,
    additional: int = 0,
    mode: Mode = "animation",
) -> Rope:
    """The tables of all regions: `additional` pictures, the reference, video, skeleton.

    Each picture has a time of its own, from 0 on. A skeleton token stands on 2x2 video tokens, far
    to the right: its cos and its sin are the means of theirs, which is not the rotation at their
    middle. Sources: docs/reference/denoiser.md 3.4, docs/reference/scail2.md 3.
    """
    t, h, w = grid
    placement = PLACEMENTS[mode]
    times, rows, columns = (torch.arange(n, device=device) for n in (t, h, w))
    shown = torch.arange(additional + 1, device=device)
    times = times + additional + placement.later
    angles = torch.cat(
        [_angles(shown, rows + placement.lower, columns), _angles(times, rows, columns)]
    ).flatten(0, 2)
    cos, sin = angles.cos(), angles.sin()
    if with_pose:
        pose = _angles(times, rows, POSE_COLUMN_SHIFT + columns)
        cos = torch.cat([cos, _pool(pose.cos())])
        sin = torch.cat([sin, _pool(pose.sin())])
    return Rope(cos[:, None], sin[:, None])


def _angles(times: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Angles [t, h, w, K / 2] fp32; frequencies fall geometrically within each axis."""
    shape = len(times), len(rows), len(columns)
    parts = []
    for axis, (positions, size) in enumerate(zip((times, rows, columns), ROPE_DIMS)):
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        frequencies = ROPE_THETA**-exponents
        angles = positions.float()[:, None] * frequencies
        view = [1, 1, 1, size // 2]
        view[axis] = len(positions)
        parts.append(angles.view(view).expand(*shape, size // 2))
    return torch.cat(parts, dim=-1)


def _pool(table: Tensor) -> Tensor:
    """Means over 2x2 neighbours: [t, h, w, K / 2] -> [t * h/2 * w/2, K / 2]."""
    t, h, w, size = table.shape
    return table.view(t, h // 2, 2, w // 2, 2, size).mean(dim=(2, 4)).flatten(0, 2)


def _with_mask(latents: Tensor, value: float) -> Tensor:
    return torch.cat([latents, latents.new_full((MASK_CHANNELS, *latents.shape[1:]), value)])


def _flatten(tokens: Tensor) -> Tensor:
    return tokens.flatten(1).T  # [S, D]
