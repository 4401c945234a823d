"""Flow as a picture: the direction is the hue, the length the saturation."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import hsv_to_rgb
from torch import Tensor


def colour_coded(flow: Tensor, longest: float) -> np.ndarray:
    """(H, W, 3) in [0, 1] of a (2, H, W) flow; white is no motion, full colour is `longest`.

    Source:
        The idea of Baker et al., IJCV 2011, section 4.1, on the hue circle.
    """
    right, down = flow.double().numpy()
    hue = (np.arctan2(-down, -right) / (2 * math.pi) + 0.5) % 1.0
    saturation = np.clip(np.hypot(right, down) / max(longest, 1e-9), 0, 1)
    return hsv_to_rgb(np.stack((hue, saturation, np.ones_like(hue)), -1))
