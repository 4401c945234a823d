"""Benchmarks: convergence throughput against peers, and the paper's experiments."""
