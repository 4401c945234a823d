// Memory of the device: each array an allocation of its own and of its exact size, so that a
// sanitizer sees its ends, and which of it was never written.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <cuda_runtime.h>

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "sanitize_kernels: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

class DeviceArray {
 public:
  DeviceArray() = default;

  // `offset` bytes into an allocation that ends where the array does; null where it has no bytes.
  explicit DeviceArray(size_t bytes, size_t offset = 0) : bytes_(bytes), offset_(offset) {
    if (bytes == 0) return;
    void* address = nullptr;
    check_cuda(cudaMalloc(&address, offset + bytes), "cudaMalloc");
    block_.reset(address);
  }

  void* data() const { return block_ ? static_cast<char*>(block_.get()) + offset_ : nullptr; }
  size_t bytes() const { return bytes_; }

  template <class T>
  void put(const std::vector<T>& values) {
    if (values.size() * sizeof(T) != bytes_) {
      std::fprintf(stderr, "sanitize_kernels: an array of another size than its values\n");
      std::exit(1);
    }
    if (bytes_ == 0) return;
    check_cuda(cudaMemcpy(data(), values.data(), bytes_, cudaMemcpyHostToDevice), "put");
  }

  template <class T>
  std::vector<T> get() const {
    std::vector<T> values(bytes_ / sizeof(T));
    if (bytes_ == 0) return values;
    check_cuda(cudaMemcpy(values.data(), data(), bytes_, cudaMemcpyDeviceToHost), "get");
    return values;
  }

  void zero() {
    if (bytes_) check_cuda(cudaMemset(data(), 0, bytes_), "cudaMemset");
  }

 private:
  struct Free {
    void operator()(void* address) const { cudaFree(address); }
  };
  std::unique_ptr<void, Free> block_;
  size_t bytes_ = 0, offset_ = 0;
};
