"""Flying Chairs: .flo and .ppm files, and where the pairs of a folder are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAGIC = b"PIEH"
"""The first four bytes of a .flo file: the float 202021.25, little-endian."""

LAYOUTS = (("-img0.ppm", "-img1.ppm", "-gt.flo"), ("_img1.ppm", "_img2.ppm", "_flow.flo"))
"""How the example pairs and the data set itself name two images and the flow."""


class Pair(NamedTuple):
    """Two images and the motion between them.

    Attributes:
        first, second: (..., 3, H, W) float32 in [0, 1].
        flow: (..., 2, H, W) pixels to the right and down, from `first` to `second`.
    """

    first: Tensor
    second: Tensor
    flow: Tensor


def read_flo(path: Path) -> Tensor:
    """(2, H, W) float32.

    Raises:
        ValueError: not a .flo file, or one that is cut short.
    Source:
        Baker et al., A Database and Evaluation Methodology for Optical Flow, IJCV 2011.
    """
    content = path.read_bytes()
    if content[:4] != MAGIC or len(content) < 12:
        raise ValueError(f"read_flo: {path} must start with {MAGIC!r}, got {content[:4]!r}")
    width, height = np.frombuffer(content, "<i4", 2, 4).tolist()
    if width < 1 or height < 1 or len(content) != 12 + 8 * width * height:
        raise ValueError(
            f"read_flo: {path} must hold {width} x {height} vectors of 8 bytes, got "
            f"{len(content) - 12} bytes"
        )
    vectors = np.frombuffer(content, "<f4", 2 * width * height, 12)
    return torch.from_numpy(vectors.reshape(height, width, 2).copy()).permute(2, 0, 1).contiguous()


def write_flo(path: Path, flow: Tensor) -> None:
    """The inverse of read_flo; flow is (2, H, W)."""
    height, width = flow.shape[1:]
    vectors = flow.permute(1, 2, 0).contiguous().numpy().astype("<f4")
    path.write_bytes(MAGIC + np.array([width, height], "<i4").tobytes() + vectors.tobytes())


def read_rgb(path: Path) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def find_pairs(folder: Path) -> list[tuple[Path, Path, Path]]:
    """First image, second image and flow of every complete pair in the folder, by name."""
    found = []
    for first_end, second_end, flow_end in LAYOUTS:
        for flow in sorted(folder.glob(f"*{flow_end}")):
            stem = str(flow).removesuffix(flow_end)
            images = Path(stem + first_end), Path(stem + second_end)
            if all(image.is_file() for image in images):
                found.append((*images, flow))
    return found


def read_pair(files: tuple[Path, Path, Path]) -> Pair:
    """A pair without batch dimension.

    Raises:
        ValueError: the images and the flow differ in size.
    """
    first, second, flow = read_rgb(files[0]), read_rgb(files[1]), read_flo(files[2])
    if not first.shape[1:] == second.shape[1:] == flow.shape[1:]:
        raise ValueError(
            f"read_pair: sizes differ: {tuple(first.shape)}, {tuple(second.shape)} and flow "
            f"{tuple(flow.shape)} ({files[2]})"
        )
    return Pair(first, second, flow)
