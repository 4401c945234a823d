"""Solvers over a flat batch: every sample has its own history, stop test and status."""
