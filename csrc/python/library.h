// libfpi_cuda.so, as fpi_cuda._C calls it.
#pragma once

#include <string>

#include "cell_plan/api.h"
#include "device_loop/api.h"
#include "host_steps/api.h"

namespace fpi {

// The functions of the files api.h in the op library that the process has loaded. They are looked
// up by name: this module is built and imported without torch or CUDA, whose code stays in the one
// file that every Python shares.
struct Library {
  // Throws std::runtime_error where the file at `path` is not loaded or lacks a function.
  explicit Library(const std::string& path);

  decltype(&fpi_node_refusal) node_refusal;
  decltype(&fpi_captured_nodes) captured_nodes;
  decltype(&fpi_restart_capture) restart_capture;
  decltype(&fpi_device_loop_unsupported) device_loop_unsupported;
  decltype(&fpi_device_loop_create) device_loop_create;
  decltype(&fpi_device_loop_launch) device_loop_launch;
  decltype(&fpi_device_loop_destroy) device_loop_destroy;
  decltype(&fpi_cell_plan_create) cell_plan_create;
  decltype(&fpi_cell_plan_solve) cell_plan_solve;
  decltype(&fpi_cell_plan_adjoint) cell_plan_adjoint;
  decltype(&fpi_cell_plan_gradients) cell_plan_gradients;
  decltype(&fpi_cell_plan_bytes) cell_plan_bytes;
  decltype(&fpi_cell_plan_clear) cell_plan_clear;
  decltype(&fpi_cell_plan_destroy) cell_plan_destroy;
  decltype(&fpi_host_step) host_step;  // or null
};

// Calls go to the library at `path` from now on; objects keep to that of their making.
void open_library(const std::string& path);

// The one that was opened last; throws std::runtime_error before that.
const Library& library();

// Throws what a function of the library has returned, if that is an error.
void check(const char* error);

}  // namespace fpi
