// Scratch memory on the boundaries of cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fpi {

constexpr int64_t kCacheLine = 64;

// One allocation that is handed out in pieces.
class Arena {
 public:
  explicit Arena(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(kCacheLine, padded(bytes > 0 ? bytes : 1)))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Bytes that a piece of `count` elements takes.
  template <class T>
  static int64_t size_of(int64_t count) {
    return padded(count * static_cast<int64_t>(sizeof(T)));
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += size_of<T>(count);
    return piece;
  }

 private:
  static int64_t padded(int64_t bytes) {
    return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  }

  char* memory_;
  int64_t used_ = 0;
};

}  // namespace fpi
