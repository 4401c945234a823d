// The device and the stream of a tensor, for the kernels behind an op.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "require.h"

// In libtorch_cuda: weak, so that the library loads under a torch without it, where no CUDA tensor
// can reach the ops.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fpi {

// Makes the device of x the current one while it lives.
class OnCuda {
 public:
  OnCuda(const char* op, const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    require(aoti_torch_get_current_cuda_stream &&
                aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_) == 0,
            op, ": torch has no current CUDA stream");
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fpi
