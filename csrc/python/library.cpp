#include "python/library.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace fpi {
namespace {

// Never freed: a loop may outlive every other object of the process.
std::atomic<const Library*> opened{nullptr};

template <class Function>
void find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (!*function) throw std::runtime_error(std::string("the library has no ") + name);
}

}  // namespace

Library::Library(const std::string& path) {
  // Loading it registers its ops, which is torch's to do.
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error(path + " is not loaded");
  find(handle, "fpi_node_refusal", &node_refusal);
  find(handle, "fpi_captured_nodes", &captured_nodes);
  find(handle, "fpi_restart_capture", &restart_capture);
  find(handle, "fpi_device_loop_unsupported", &device_loop_unsupported);
  find(handle, "fpi_device_loop_create", &device_loop_create);
  find(handle, "fpi_device_loop_launch", &device_loop_launch);
  find(handle, "fpi_device_loop_destroy", &device_loop_destroy);
  find(handle, "fpi_cell_plan_create", &cell_plan_create);
  find(handle, "fpi_cell_plan_solve", &cell_plan_solve);
  find(handle, "fpi_cell_plan_adjoint", &cell_plan_adjoint);
  find(handle, "fpi_cell_plan_gradients", &cell_plan_gradients);
  find(handle, "fpi_cell_plan_bytes", &cell_plan_bytes);
  find(handle, "fpi_cell_plan_clear", &cell_plan_clear);
  find(handle, "fpi_cell_plan_destroy", &cell_plan_destroy);
  // Not in a library of the device loop alone.
  host_step = reinterpret_cast<decltype(host_step)>(dlsym(handle, "fpi_host_step"));
}

void open_library(const std::string& path) { opened = new Library(path); }

const Library& library() {
  const Library* const found = opened;
  if (!found) throw std::runtime_error("fpi_cuda._C: no library was opened");
  return *found;
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("device loop: ") + error);
}

}  // namespace fpi
