"""Solvers of linear systems, for adjoints: GMRES and conjugate gradients."""
