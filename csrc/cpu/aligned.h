// Scratch memory on the boundaries of cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace fpi {

constexpr int64_t kCacheLine = 64;

// One allocation that is handed out in pieces.
class Arena {
 public:
  Arena() = default;
  ~Arena() { std::free(memory_); }
  Arena(Arena&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        used_(std::exchange(other.used_, 0)) {}
  Arena& operator=(Arena&&) = delete;

  // Takes all pieces back, and has room for `bytes` of new ones; what they hold is undefined.
  // Memory is allocated only where there never was as much.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = static_cast<char*>(std::aligned_alloc(kCacheLine, padded(bytes)));
    if (!memory_) throw std::bad_alloc();
    size_ = padded(bytes);
  }
  int64_t bytes() const { return size_; }
  const void* data() const { return memory_; }

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

  char* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

}  // namespace fpi
