#include "python/device_loop.h"

namespace fpi {

DeviceLoop::DeviceLoop(std::uintptr_t graph, std::uintptr_t status, std::int64_t batch,
                       std::uintptr_t rounds, std::int64_t max_steps)
    : library_(library()) {
  check(library_.device_loop_create(reinterpret_cast<void*>(graph),
                                    reinterpret_cast<const std::int8_t*>(status), batch,
                                    reinterpret_cast<std::int32_t*>(rounds), max_steps, &loop_));
}

void DeviceLoop::launch(std::uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check(loop_ ? library_.device_loop_launch(loop_, reinterpret_cast<void*>(stream))
              : "it was closed");
}

void DeviceLoop::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (loop_) library_.device_loop_destroy(loop_);
  loop_ = nullptr;
}

}  // namespace fpi
