"""The paper's experiments: multi-label text, image denoising, optical flow.

Source:
    Jeon, Lee, Choi, Differentiable Forward and Backward Fixed-Point Iteration Layers, IEEE Access
    2021.
"""
