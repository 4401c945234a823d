"""Whether the rows of a linear map depend on one another, by a few products with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpi_cuda.loops.coupled import LEVELS, rows_mix

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("batch", [2, 3, LEVELS, LEVELS + 1, 100])
def test_every_pair_of_rows_is_told_apart(batch: int) -> None:
    like = torch.zeros(batch, 2)
    for i in range(batch):
        for j in {(i + 1) % batch, (i + 2) % batch, (i + LEVELS) % batch, batch - 1 - i} - {i}:

            def apply(y: Tensor, i: int = i, j: int = j) -> Tensor:
                out = 0.5 * y
                out[i] += 1e-3 * y[j]
                return out

            assert rows_mix(apply, like, batch)


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(d, None) for d in DTYPES] + [(torch.float32, d) for d in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_rows_that_stand_alone_do_not_mix(dtype: torch.dtype, inside: torch.dtype | None) -> None:
    weight = torch.randn(33, 33) / 6

    def apply(y: Tensor) -> Tensor:
        low = inside or dtype
        return (y.to(low) @ weight.to(low)).to(dtype)

    for batch in (2, 31, 129):
        assert not rows_mix(apply, torch.zeros(batch, 33, dtype=dtype), batch)


def test_rows_mix_within_a_sample_of_a_vmap_only() -> None:
    """What joins samples that cannot depend on one another is not looked for."""
    like = torch.zeros(12, 2)
    within = torch.block_diag(*[torch.rand(3, 3) for _ in range(4)])
    assert rows_mix(lambda y: within @ y, like, 3)
    assert not rows_mix(lambda y: y, like, 3)


def test_products_that_are_not_finite_show_nothing() -> None:
    def apply(y: Tensor) -> Tensor:
        out = 0.5 * y
        out[1] = torch.nan
        return out

    assert not rows_mix(apply, torch.zeros(4, 2), 4)


@pytest.mark.parametrize(("batch", "products"), [(2, 2), (8, 2), (9, 3), (64, 3), (4096, 5)])
def test_what_it_costs(batch: int, products: int) -> None:
    seen = []
    rows_mix(lambda y: seen.append(1) or y, torch.zeros(batch, 1), batch)  # type: ignore[func-returns-value]
    assert len(seen) == products
