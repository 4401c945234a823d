"""Gray images: reading folders of them, random crops, and PSNR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_gray(path: Path) -> Tensor:
    """(H, W) float32 in [0, 1]; colours become luminance."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"))).float() / 255


def read_folder(folder: Path, limit: int | None = None) -> list[Tensor]:
    """The PNG images of a folder, by name; `limit` spreads over the folder.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FileNotFoundError(
            f"read_folder: no .png in {folder}. Pass the folder that holds denoise/ as --data"
        )
    if limit is not None:
        paths = [paths[k * len(paths) // limit] for k in range(min(limit, len(paths)))]
    return [read_gray(path) for path in paths]


def random_crops(images: list[Tensor], count: int, size: int) -> Tensor:
    """(count, 1, size, size), turned and mirrored at random; torch's default generator.

    Raises:
        ValueError: an image is smaller than `size`.
    """
    crops = []
    for index in torch.randint(len(images), (count,)).tolist():
        image = images[index]
        height, width = image.shape
        if min(height, width) < size:
            raise ValueError(f"random_crops: need {size} pixels, got {tuple(image.shape)}")
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        crop = image[top : top + size, left : left + size]
        crop = crop.rot90(int(torch.randint(4, ())))
        crops.append(crop.flip(1) if int(torch.randint(2, ())) else crop)
    return torch.stack(crops)[:, None]


def noisy(image: Tensor, sigma: float, seed: int) -> Tensor:
    """The image with Gaussian noise of standard deviation sigma / 255: the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return image + sigma / 255 * torch.randn(image.shape, generator=generator)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of values clipped to [0, 1]."""
    error = (image.clamp(0, 1) - reference).square().mean()
    return float(-10 * torch.log10(error))
