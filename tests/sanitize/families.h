// The families of kernels that the driver runs.
#pragma once

#include "family.h"

void picard(Family& family);
void anderson_warp(Family& family);
void anderson_block(Family& family);
void anderson_split(Family& family);
void broyden_warp(Family& family);
void broyden_block(Family& family);
void broyden_split(Family& family);
void cell_loop_float64(Family& family);
void cell_loop_float32(Family& family);
void cell_loop_tf32x3(Family& family);
void cell_loop_tf32(Family& family);
void cell_loop_bf16(Family& family);
void device_loop(Family& family);  // needs a real device
