"""The fused loop: g, the solver and the stop test in one call of native code."""
