"""Will it converge, and how to make it: spectra, penalties and bounds of g's Jacobian."""

from fpi_cuda.diagnostics.contraction import contract_, operator_norm_bound
from fpi_cuda.diagnostics.jacobian import jacobian_penalty, spectral_radius

__all__ = ["contract_", "jacobian_penalty", "operator_norm_bound", "spectral_radius"]
