"""Bones -> shaded capsules, RGBA: the skeleton pictures that the denoiser follows.

A ray leaves the camera through each pixel along (X, Y, 1) and stops where it first enters a
capsule, a cylinder around a bone closed by half spheres. The light shines from the camera along z
and falls off with depth. What the official sphere tracer draws, in closed form.

Shapes    start, end, rgb [T, B, 3] fp32, count [T] i32  ->  frames [T, H, W, 4] u8
Numerics  FP32 with the ray's origin moved beside each bone; no fused multiply-add, as the choice
          between bones that share a joint follows the last bit
Source    docs/reference/pose.md 6, 9 and 11
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.arch import SM89, SM90, SM120
from kernels.spec import Bank, KernelError, KernelSpec, Tuning

ALPHA = 204  # of a bone's pixel; 0 elsewhere
NEAR = 0.1  # mm; rays start here
TOUCH = 1e-3  # mm; a ray this close to a surface has hit it
STEP = 1e-3  # mm; the official normal is a difference over this step
SHORT = 1e-8  # mm; a shorter bone is a sphere
PARALLEL = 1e-12  # sine squared; below it a ray runs along the bone
TINY = 1e-30
FIELDS = 12  # numbers a bone: start 3, unit 3, length, is the camera near, colour 3, none


@dataclass(frozen=True, slots=True)
class Skeletons:
    """The bones of a clip in drawing order, frames padded to one length. Millimetres."""

    start: Tensor  # [T, B, 3] fp32
    end: Tensor  # [T, B, 3] fp32
    rgb: Tensor  # [T, B, 3] fp32, 0..1
    count: Tensor  # [T] i32, bones in each frame; what follows them is padding


@dataclass(frozen=True, slots=True)
class View:
    """The picture and its pinhole camera, and the depths between which brightness falls."""

    height: int
    width: int
    fx: float  # pixels
    fy: float
    cx: float
    cy: float
    nearest: float  # mm, smallest z of all bone ends of the whole clip
    farthest: float  # mm, largest
    radius: float = 21.5  # mm

    @property
    def reach(self) -> float:
        """Rays end at this distance."""
        return max(min(self.farthest, 25000.0), 10000.0)

    @property
    def bright(self) -> float:
        """Full brightness up to this depth."""
        return max(self.nearest, NEAR)

    @property
    def fading(self) -> float:
        return min(self.farthest + 6000.0, 20000.0) - 0.1


def capsules_reference(bones: Skeletons, view: View) -> Tensor:
    """The definition, in plain PyTorch. Frames [T, H, W, 4] u8."""
    frames = []
    for start, end, rgb, count in zip(bones.start, bones.end, bones.rgb, bones.count.tolist()):
        frames.append(_frame(start[:count], end[:count], rgb[:count], view))
    return torch.stack(frames)


def _frame(start: Tensor, end: Tensor, rgb: Tensor, view: View) -> Tensor:
    """start, end, rgb [B, 3] -> [H, W, 4] u8."""
    y, x = torch.meshgrid(
        (torch.arange(view.height, device=start.device).double() - view.cy) / view.fy,
        (torch.arange(view.width, device=start.device).double() - view.cx) / view.fx,
        indexing="ij",
    )
    ray = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    ray = ray / ray.norm(dim=-1, keepdim=True)  # [H, W, 3] fp64
    if not len(start):
        return torch.zeros(*ray.shape[:2], 4, dtype=torch.uint8, device=start.device)
    hit = torch.stack([_entry(a, b, ray, view) for a, b in zip(start, end)]).amin(dim=0)
    is_hit = hit.isfinite()
    ray = ray.float()
    point = ray * torch.where(is_hit, hit, 0).float()[..., None]

    outward = torch.stack([_off_axis(a, b, point) for a, b in zip(start, end)])  # [B, H, W, 3]
    owner = _norm(outward).argmin(dim=0)  # the first of the nearest
    outward = outward.gather(0, owner[None, ..., None].expand(1, *ray.shape))[0]
    frame = _shade(rgb[owner], outward, point, ray, view)
    return torch.where(is_hit[..., None], frame, 0)


def _entry(start: Tensor, end: Tensor, ray: Tensor, view: View) -> Tensor:
    """Distance [H, W] at which each ray enters the capsule; infinite where it does not."""
    start, end = start.double(), end.double()
    axis = end - start
    length = axis.norm()
    unit = axis / length if length >= SHORT else torch.zeros_like(axis)
    q, s = ray @ unit, -start @ unit
    beside = ray - q[..., None] * unit  # of the ray, at a right angle to the bone
    a = (beside * beside).sum(dim=-1).clamp_min(PARALLEL)
    b = -(beside @ start)
    c = start @ start - s * s - view.radius**2
    t = (-b - (b * b - a * c).sqrt()) / a  # NaN where the ray passes by
    place = s + t * q
    foot = place.clamp_min(0).minimum(length * (length >= SHORT))
    centre = start + foot[..., None] * unit
    along = (ray * centre).sum(dim=-1)
    ball = along - (along**2 - (centre * centre).sum(dim=-1) + view.radius**2).sqrt()
    t = torch.where((place > 0) & (place < length), t, ball)
    t = torch.where((t >= NEAR) & (t <= view.reach), t, math.inf)  # false for NaN
    begins_inside = _norm(_off_axis(start, end, ray * NEAR)) < view.radius + TOUCH
    return torch.where(begins_inside, NEAR, t)


def _off_axis(start: Tensor, end: Tensor, point: Tensor) -> Tensor:
    """From the nearest place of the bone to the points [..., 3], in their precision."""
    unit, length = _axis(start.to(point.dtype), end.to(point.dtype))
    away = point - start
    along = (away[..., 0] * unit[0] + away[..., 1] * unit[1]) + away[..., 2] * unit[2]
    return away - torch.minimum(along.clamp_min(0), length)[..., None] * unit


def _axis(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [..., 3] along bones, and their lengths [...]; 0 for spheres."""
    along = end - start
    length = _norm(along)
    length = torch.where(length < SHORT, 0, length)
    return along / torch.where(length > 0, length, math.inf)[..., None], length


def _norm(vectors: Tensor) -> Tensor:
    return ((vectors[..., 0] ** 2 + vectors[..., 1] ** 2) + vectors[..., 2] ** 2).sqrt()


def _shade(rgb: Tensor, outward: Tensor, point: Tensor, ray: Tensor, view: View) -> Tensor:
    """[H, W, 4] u8 of points that were hit."""
    step = torch.tensor(STEP, dtype=torch.float32, device=point.device)
    normal = outward * ((point + step) - (point - step))
    normal = normal / _norm(normal).clamp_min(TINY)[..., None]
    half = -ray - ray.new_tensor([0.0, 0.0, 1.0])
    facing = (-normal[..., 2]).clamp_min(0)
    shine = ((normal * half).sum(dim=-1) / _norm(half)).clamp_min(0) ** 32
    fade = (1 - (point[..., 2] - view.bright) / view.fading).clamp(0, 1)
    colour = rgb * ((0.3 + 0.7 * facing) * fade)[..., None] + (0.5 * shine * fade)[..., None]
    colour = (colour.clamp(0, 1) * 255).to(torch.uint8)  # truncated
    return torch.cat([colour, torch.full_like(colour[..., :1], ALPHA)], dim=-1)


def capsules(bank: Bank, bones: Skeletons, view: View) -> Tensor:
    """Frames [T, H, W, 4] u8; a pixel without a bone is 0."""
    frames, most = bones.start.shape[:2]
    for name in ("start", "end", "rgb"):
        tensor = getattr(bones, name)
        if tensor.shape != (frames, most, 3) or tensor.dtype != torch.float32:
            shape, dtype = list(tensor.shape), tensor.dtype
            raise KernelError(
                f"capsules wants {name} [{frames}, {most}, 3] fp32, got {shape} {dtype}"
            )
    if bones.count.shape != (frames,):
        raise KernelError(f"capsules wants count [{frames}], got {list(bones.count.shape)}")
    pixels = view.height * view.width
    pictures = torch.empty(frames, pixels, dtype=torch.int32, device=bones.start.device)
    grid = (frames, -(-pixels // bank.tuning(CAPSULES).blocks["BLOCK"]))
    bank.launch(
        CAPSULES, grid, _fields(bones, view), bones.count, pictures, most, pixels, view.width,
        view.fx, view.fy, view.cx, view.cy, view.radius, view.reach, view.bright, view.fading,
    )  # fmt: skip
    return pictures.view(torch.uint8).view(frames, view.height, view.width, 4)


def _fields(bones: Skeletons, view: View) -> Tensor:
    """What the kernel reads of each bone: [T, B, FIELDS] fp32."""
    unit, length = _axis(bones.start, bones.end)
    foot = (-(bones.start * unit).sum(dim=-1)).clamp_min(0).minimum(length)
    distance = _norm(bones.start + foot[..., None] * unit)  # of the camera
    fields = bones.start.new_zeros(*bones.start.shape[:2], FIELDS)
    fields[..., 0:3], fields[..., 3:6], fields[..., 6] = bones.start, unit, length
    fields[..., 7], fields[..., 8:11] = distance < view.radius + 1, bones.rgb
    return fields


CAPSULES = KernelSpec(
    name="capsules",
    device="capsules:capsules_kernel",
    signature="*fp32 *i32 *i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32",
    constants={
        "FIELDS": FIELDS,
        "NEAR": NEAR,
        "TOUCH": TOUCH,
        "STEP": STEP,
        "PARALLEL": PARALLEL,
        "TINY": TINY,
        "ALPHA": (ALPHA << 24) - 2**32,  # the fourth byte of a signed word
    },
    tuning={
        SM89: Tuning(warps=8, stages=1, blocks={"BLOCK": 1024}, toolkit="12.6"),
        SM90: Tuning(warps=8, stages=1, blocks={"BLOCK": 1024}, toolkit="12.6"),
        SM120: Tuning(warps=8, stages=1, blocks={"BLOCK": 1024}, toolkit="12.8"),
    },
    fuse_multiply_add=False,
)
