"""FlowNetS of any width, with and without a small fixed-point layer at its end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fpi_cuda as fpi

FLOW_UNIT = 20.0
"""Pixels per unit of the network's output."""

MULTIPLE = 64
"""Height and width of images must be multiples: the network halves them six times."""

SCALE_WEIGHTS = (0.32, 0.08, 0.02, 0.01, 0.005)
"""Of the loss at the five scales, coarsest first."""


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """Convolution and leaky relu."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.LeakyReLU(0.1))


def enlarging(inputs: int, outputs: int) -> nn.Module:
    """Transposed convolution to twice the size, and leaky relu."""
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.1))


class FlowNetS(nn.Module):
    """Two images stacked, down six times, up four times; a flow at each of five scales.

    Args:
        width: share of the channels of the original.
    Source:
        Dosovitskiy et al., FlowNet: Learning Optical Flow with Convolutional Networks, ICCV
        2015, figure 2 (FlowNetSimple) and section 3.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4, c5, c6 = (
            max(4, round(width * channels)) for channels in (64, 128, 256, 512, 512, 1024)
        )
        self.down = nn.ModuleList(
            [
                convolution(6, c1, 7, 2),
                convolution(c1, c2, 5, 2),
                nn.Sequential(convolution(c2, c3, 5, 2), convolution(c3, c3)),
                nn.Sequential(convolution(c3, c4, 3, 2), convolution(c4, c4)),
                nn.Sequential(convolution(c4, c5, 3, 2), convolution(c5, c5)),
                nn.Sequential(convolution(c5, c6, 3, 2), convolution(c6, c6)),
            ]
        )
        inner, ups, skips = c6, (c5, c3, c2, c1), (c5, c4, c3, c2)
        self.predict = nn.ModuleList([nn.Conv2d(inner, 2, 3, 1, 1)])
        self.up = nn.ModuleList()
        self.up_flow = nn.ModuleList()
        for up, skip in zip(ups, skips, strict=True):
            self.up.append(enlarging(inner, up))
            self.up_flow.append(nn.ConvTranspose2d(2, 2, 4, 2, 1))
            inner = skip + up + 2
            self.predict.append(nn.Conv2d(inner, 2, 3, 1, 1))
        self.features = inner

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Flows in units of FLOW_UNIT, coarsest first, the last at a quarter of the size."""
        return self.analyse(first, second)[0]

    def analyse(self, first: Tensor, second: Tensor) -> tuple[list[Tensor], Tensor]:
        """The flows, and the features from which the last is predicted."""
        h = torch.cat((first, second), 1) - 0.5
        stages = []
        for layer in self.down:
            h = layer(h)
            stages.append(h)
        flows = [self.predict[0](h)]
        for k, (up, up_flow) in enumerate(zip(self.up, self.up_flow, strict=True)):
            h = torch.cat((stages[4 - k], up(h), up_flow(flows[-1])), 1)
            flows.append(self.predict[k + 1](h))
        return flows, h


class Refinement(fpi.cells.Cell):
    """g(x, z) = W leaky(A x + B z + b) + flow: what is next to a flow corrects it.

    x: (B, 2, H, W), the flow; z: the features, and the flow that FlowNetS predicts from them.
    With ||A||, ||W|| <= norm its Lipschitz constant in x is at most norm^2.
    """

    def __init__(self, features: int, channels: int, norm: float) -> None:
        super().__init__()
        self.A = fpi.contract_(nn.Conv2d(2, channels, 3, padding=1, bias=False), norm)
        self.B = nn.Conv2d(features, channels, 3, padding=1)
        self.W = nn.Conv2d(channels, 2, 3, padding=1)
        with torch.no_grad():
            self.W.weight.mul_(0.1)
        fpi.contract_(self.W, norm)

    def prepare(self, features: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """B z + b, and the flow."""
        return self.B(features), flow

    def step(self, x: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """The next x."""
        injected, flow = prepared
        return flow + self.W(functional.leaky_relu(self.A(x) + injected, 0.1))


class FlowNetSFPI(nn.Module):
    """FlowNetS whose last flow goes through a fixed-point layer."""

    def __init__(self, width: float, channels: int, norm: float) -> None:
        super().__init__()
        self.base = FlowNetS(width)
        self.layer = fpi.FPILayer(
            Refinement(self.base.features, channels, norm),
            init=last_flow,
            solver=fpi.Anderson(m=5),
            rtol=1e-3,
            max_steps=50,
        )

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """As FlowNetS."""
        flows, features = self.base.analyse(first, second)
        return [*flows[:-1], self.layer(features, flows[-1])]


def last_flow(features: Tensor, flow: Tensor) -> Tensor:
    """Where the solve starts: what FlowNetS says."""
    return flow.detach()


def loss_of(flows: list[Tensor], truth: Tensor) -> Tensor:
    """Endpoint error at every scale, in units of FLOW_UNIT, weighted; truth is in pixels."""
    total = truth.new_zeros(())
    for weight, flow in zip(SCALE_WEIGHTS, flows, strict=True):
        coarse = functional.adaptive_avg_pool2d(truth, flow.shape[2:]) / FLOW_UNIT
        # Differentiable where the error is zero, too.
        total = total + weight * ((flow - coarse).square().sum(1) + 1e-12).sqrt().sum((1, 2)).mean()
    return total


def full_size(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """The network's last flow in pixels, at the size of the images."""
    return FLOW_UNIT * functional.interpolate(flow, size, mode="bilinear", align_corners=False)


def endpoint_errors(flow: Tensor, truth: Tensor) -> Tensor:
    """(B,) mean endpoint error of each pair, in pixels."""
    return (flow - truth).norm(dim=1).mean((1, 2))
