"""Pairs like those of Flying Chairs: textured shapes moving over real images, with exact flow."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from bench.paper.flow_files import Pair

WAVES = 4
"""Harmonics of a shape's outline."""


@dataclasses.dataclass(frozen=True)
class Motion:
    """How far things move; standard deviations.

    Attributes:
        background, shape: of the translation, as a share of the image's size; a shape moves
            relative to the background.
        turn: radians.
        zoom: of the factor, around 1.
    """

    background: float = 0.03
    shape: float = 0.06
    turn: float = 0.08
    zoom: float = 0.05


def make_pairs(
    images: Tensor,
    count: int,
    size: int,
    *,
    shapes: int = 4,
    motion: Motion = Motion(),
    generator: torch.Generator | None = None,
) -> Pair:
    """Draw pairs of size x size pixels.

    Every layer, the background first, is a picture in the plane. In the first image it lies as
    drawn, in the second it has gone through an affine map, so the flow of a visible pixel p is
    M p - p, exactly; what is hidden in the second image has its flow, too.

    Args:
        images: (N, H, W) gray textures in [0, 1].
        generator: on the CPU; None uses torch's default.
    Returns:
        Pair of (count, 3, size, size) and (count, 2, size, size), on the device of images.
    """
    draw = Draw(generator, images.device)
    grid = pixel_grid(size, images.device)
    motions = affine(draw, count, draw.zeros(count, 2), size * motion.background, motion)
    paint = texture(draw, images, count, size)
    first, second = map(paint, moved(grid, motions))
    flow = displacement(grid, motions)
    for _ in range(shapes):
        center = (draw.uniform(count, 2) - 0.5) * size
        own = affine(draw, count, center, size * motion.shape, motion)
        total = motions @ own
        paint = texture(draw, images, count, size)
        inside = outline(draw, count, center, size)
        before, after = moved(grid, total)
        first = cover(first, paint(before), inside(before))
        second = cover(second, paint(after), inside(after))
        visible = (inside(before) > 0.5)[:, None]
        flow = torch.where(visible, displacement(grid, total), flow)
    return Pair(first, second, flow)


class Draw:
    """Random numbers, drawn on the CPU so that every device sees the same."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator = generator
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)


def pixel_grid(size: int, device: torch.device) -> Tensor:
    """(size, size, 3) homogeneous pixel positions (right, down, 1), the origin in the middle."""
    line = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
    down, right = torch.meshgrid(line, line, indexing="ij")
    return torch.stack((right, down, torch.ones_like(right)), -1)


def affine(draw: Draw, count: int, center: Tensor, spread: float, motion: Motion) -> Tensor:
    """(count, 3, 3) turns and zooms about `center` (count, 2), then moves by about `spread`."""
    angle = motion.turn * draw.normal(count)
    zoom = 1 + motion.zoom * draw.normal(count).clamp(-3, 3)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack((cos, -sin, sin, cos), -1).reshape(count, 2, 2)
    shift = spread * draw.normal(count, 2) + center - (linear @ center[:, :, None])[:, :, 0]
    bottom = torch.tensor([0.0, 0.0, 1.0], device=draw.device).expand(count, 1, 3)
    return torch.cat((torch.cat((linear, shift[:, :, None]), 2), bottom), 1)


def moved(grid: Tensor, motions: Tensor) -> tuple[Tensor, Tensor]:
    """Where in a layer's own plane the pixels of both images lie: twice (count, H, W, 2)."""
    count = motions.shape[0]
    before = grid[None].expand(count, -1, -1, -1)
    after = torch.einsum("bij,hwj->bhwi", torch.linalg.inv(motions), grid)
    return before[..., :2], after[..., :2]


def displacement(grid: Tensor, motions: Tensor) -> Tensor:
    """(count, 2, H, W): M p - p."""
    there = torch.einsum("bij,hwj->bhwi", motions, grid)
    return (there - grid)[..., :2].permute(0, 3, 1, 2)


class Texture:
    """A turned, tinted cut-out of one image per sample, defined on the whole plane."""

    def __init__(self, pictures: Tensor, frame: Tensor, tint: Tensor) -> None:
        self.pictures = pictures
        self.frame = frame
        self.tint = tint

    def __call__(self, at: Tensor) -> Tensor:
        """(count, 3, H, W) colours at (count, H, W, 2) positions in pixels."""
        placed = torch.einsum("bij,bhwj->bhwi", self.frame[:, :, :2], at)
        placed = placed + self.frame[:, None, None, :, 2]
        gray = functional.grid_sample(
            self.pictures, placed, padding_mode="reflection", align_corners=False
        )
        return gray * self.tint


def texture(draw: Draw, images: Tensor, count: int, size: int) -> Texture:
    """Draw one texture per sample."""
    chosen = draw.integers(images.shape[0], count)
    angle = 2 * math.pi * draw.uniform(count)
    # One pixel of the pair is between one and one and a half pixels of the image.
    scale = (1 + 0.5 * draw.uniform(count)) * 2 / min(images.shape[1:])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 0.6 * (draw.uniform(count, 2) - 0.5)
    frame = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), -1).reshape(count, 2, 3)
    tint = 0.5 + 0.5 * draw.uniform(count, 3, 1, 1)
    return Texture(images[chosen][:, None], frame, tint)


class Outline:
    """A closed curve r(angle) around a centre, one per sample."""

    def __init__(self, center: Tensor, radius: Tensor, height: Tensor, phase: Tensor) -> None:
        self.center = center
        self.radius = radius
        self.height = height
        self.phase = phase

    def __call__(self, at: Tensor) -> Tensor:
        """(count, H, W) in [0, 1]: how much of the pixel is inside."""
        offset = at - self.center[:, None, None]
        distance = offset.norm(dim=-1)
        angle = torch.atan2(offset[..., 1], offset[..., 0])
        harmonics = torch.arange(1, WAVES + 1, device=at.device)
        waves = torch.cos(angle[..., None] * harmonics + self.phase[:, None, None])
        wobble = (self.height[:, None, None] * waves).sum(-1)
        return (self.radius[:, None, None] * (1 + wobble) - distance + 0.5).clamp(0, 1)


def outline(draw: Draw, count: int, center: Tensor, size: int) -> Outline:
    """Draw one outline per sample."""
    radius = size * (0.08 + 0.14 * draw.uniform(count))
    height = 0.15 * draw.normal(count, WAVES).clamp(-2, 2)
    return Outline(center, radius, height, 2 * math.pi * draw.uniform(count, WAVES))


def cover(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """The layer `above` over `below`, where its share of the pixel says so."""
    return torch.lerp(below, above, share[:, None])
