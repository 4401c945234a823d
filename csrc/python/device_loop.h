// fpi_cuda._C.DeviceLoop: an executable CUDA graph that repeats a captured one.
#pragma once

#include <cstdint>
#include <mutex>

#include "python/library.h"

namespace fpi {

// Holds no reference to Python: its methods run without the GIL, for CUDA may wait in each.
class DeviceLoop {
 public:
  // Integers are addresses or handles; see fpi_device_loop_create.
  DeviceLoop(std::uintptr_t graph, std::uintptr_t status, std::int64_t batch, std::uintptr_t rounds,
             std::int64_t max_steps);
  ~DeviceLoop() { close(); }
  DeviceLoop(const DeviceLoop&) = delete;
  DeviceLoop& operator=(const DeviceLoop&) = delete;

  void launch(std::uintptr_t stream);
  void close();

 private:
  const Library& library_;
  std::mutex mutex_;  // or one thread could close what another launches
  FpiDeviceLoop* loop_ = nullptr;
};

}  // namespace fpi
