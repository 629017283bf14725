"""Rays through pixels, met with the capsules of one frame (see kernels/capsules.py)."""

import triton
import triton.language as tl


@triton.jit
def capsules_kernel(
    bones_ptr, count_ptr, frames_ptr,
    BONES, PIXELS, WIDTH, fx, fy, cx, cy, radius, reach, bright, fading,
    FIELDS: tl.constexpr, NEAR: tl.constexpr, TOUCH: tl.constexpr, STEP: tl.constexpr,
    PARALLEL: tl.constexpr, TINY: tl.constexpr, ALPHA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program draws BLOCK pixels of one frame. bones [T, BONES, FIELDS], frames [T, PIXELS]."""
    frame = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr + frame)
    bone_ptr = bones_ptr + frame * BONES * FIELDS

    x = tl.div_rn((pixel % WIDTH).to(tl.float32) - cx, fx)
    y = tl.div_rn((pixel // WIDTH).to(tl.float32) - cy, fy)
    stretch = tl.sqrt_rn(x * x + y * y + 1)
    dx, dy, dz = tl.div_rn(x, stretch), tl.div_rn(y, stretch), tl.div_rn(1.0, stretch)

    hit = tl.full([BLOCK], float("inf"), tl.float32)  # distance along the ray
    for bone in range(count):
        at = bone_ptr + bone * FIELDS
        ax, ay, az = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        ux, uy, uz = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        length = tl.load(at + 6)

        # The ray begins anew beside the bone's middle, where FP32 is fine enough.
        half = 0.5 * length
        t0 = dx * (ax + half * ux) + dy * (ay + half * uy) + dz * (az + half * uz)
        wx, wy, wz = dx * t0 - ax, dy * t0 - ay, dz * t0 - az
        q = dx * ux + dy * uy + dz * uz
        s = wx * ux + wy * uy + wz * uz
        nx, ny, nz = uy * dz - uz * dy, uz * dx - ux * dz, ux * dy - uy * dx
        a = tl.maximum(nx * nx + ny * ny + nz * nz, PARALLEL)
        b = wx * dx + wy * dy + wz * dz - s * q
        aside = wx * nx + wy * ny + wz * nz
        around = a * (radius * radius) - aside * aside  # below 0: passes by the endless cylinder
        t = (-b - tl.sqrt(tl.maximum(around, 0.0))) / a

        # Before or behind the bone the ray enters the sphere around that end, or nothing.
        place = s + t * q
        foot = tl.minimum(tl.maximum(place, 0.0), length)
        ex, ey, ez = wx - foot * ux, wy - foot * uy, wz - foot * uz
        along = ex * dx + ey * dy + ez * dz
        ex, ey, ez = ex - along * dx, ey - along * dy, ez - along * dz
        deep = radius * radius - (ex * ex + ey * ey + ez * ez)
        is_beside = (place > 0) & (place < length)
        t = t0 + tl.where(is_beside, t, -along - tl.sqrt(tl.maximum(deep, 0.0)))
        meets = (around >= 0) & (is_beside | (deep >= 0)) & (t >= NEAR) & (t <= reach)

        if tl.load(at + 7) > 0:  # the camera is in or at this bone
            px, py, pz = dx * NEAR - ax, dy * NEAR - ay, dz * NEAR - az
            foot = tl.minimum(tl.maximum(px * ux + py * uy + pz * uz, 0.0), length)
            px, py, pz = px - foot * ux, py - foot * uy, pz - foot * uz
            begins_inside = tl.sqrt_rn(px * px + py * py + pz * pz) < radius + TOUCH
            t = tl.where(begins_inside, NEAR, t)
            meets = meets | begins_inside
        hit = tl.minimum(hit, tl.where(meets, t, float("inf")))

    is_hit = hit < float("inf")
    rgba = tl.zeros([BLOCK], tl.int32)
    if tl.max(is_hit.to(tl.int32)) > 0:
        t = tl.where(is_hit, hit, 0.0)
        px, py, pz = dx * t, dy * t, dz * t

        # The first of the nearest bones shows, rounded as in the official program.
        gap = tl.full([BLOCK], float("inf"), tl.float32)
        vx, vy, vz = tl.zeros_like(px), tl.zeros_like(px), tl.zeros_like(px)
        red, green, blue = tl.zeros_like(px), tl.zeros_like(px), tl.zeros_like(px)
        for bone in range(count):
            at = bone_ptr + bone * FIELDS
            ux, uy, uz = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
            gx, gy, gz = px - tl.load(at), py - tl.load(at + 1), pz - tl.load(at + 2)
            foot = tl.minimum(tl.maximum((gx * ux + gy * uy) + gz * uz, 0.0), tl.load(at + 6))
            gx, gy, gz = gx - foot * ux, gy - foot * uy, gz - foot * uz
            distance = tl.sqrt_rn((gx * gx + gy * gy) + gz * gz)
            is_nearer = distance < gap
            gap = tl.where(is_nearer, distance, gap)
            vx, vy, vz = (
                tl.where(is_nearer, gx, vx),
                tl.where(is_nearer, gy, vy),
                tl.where(is_nearer, gz, vz),
            )
            red = tl.where(is_nearer, tl.load(at + 8), red)
            green = tl.where(is_nearer, tl.load(at + 9), green)
            blue = tl.where(is_nearer, tl.load(at + 10), blue)

        # The official normal is a difference quotient whose step is rounded to FP32.
        vx *= (px + STEP) - (px - STEP)
        vy *= (py + STEP) - (py - STEP)
        vz *= (pz + STEP) - (pz - STEP)
        size = tl.maximum(tl.sqrt_rn((vx * vx + vy * vy) + vz * vz), TINY)
        vx, vy, vz = tl.div_rn(vx, size), tl.div_rn(vy, size), tl.div_rn(vz, size)
        hz = -dz - 1
        facing = tl.maximum(-vz, 0.0)
        shine = tl.div_rn(vz * hz - (vx * dx + vy * dy), tl.sqrt_rn(dx * dx + dy * dy + hz * hz))
        shine = tl.maximum(shine, 0.0)
        for _ in tl.static_range(5):
            shine *= shine  # to the power of 32
        fade = tl.minimum(tl.maximum(1 - tl.div_rn(pz - bright, fading), 0.0), 1.0)
        light = (0.3 + 0.7 * facing) * fade
        glow = 0.5 * shine * fade
        r = (tl.minimum(tl.maximum(red * light + glow, 0.0), 1.0) * 255).to(tl.int32)
        g = (tl.minimum(tl.maximum(green * light + glow, 0.0), 1.0) * 255).to(tl.int32)
        b = (tl.minimum(tl.maximum(blue * light + glow, 0.0), 1.0) * 255).to(tl.int32)
        rgba = tl.where(is_hit, r | (g << 8) | (b << 16) | ALPHA, 0)
    tl.store(frames_ptr + frame * PIXELS + pixel, rgba, mask=pixel < PIXELS)
