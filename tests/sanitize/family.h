// The solves of one family of kernels: what was run, and the end of the program where one is wrong.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

class Family {
 public:
  explicit Family(const char* name) : name_(name) {}

  // Names the solve that what follows is about.
  void begin(std::string solve) {
    solve_ = std::move(solve);
    ++solves_;
  }

  // A launcher has returned this, after so many kernels.
  void launched(const char* error, int kernels) {
    if (error) fail(error);
    launches_ += kernels;
  }

  void expect(bool holds, const std::string& what) const {
    if (!holds) fail(what.c_str());
  }

  [[noreturn]] void fail(const char* what) const {
    std::fprintf(stderr, "sanitize_kernels: %s: %s: %s\n", name_, solve_.c_str(), what);
    std::exit(1);
  }

  // Takes a result into the digest, which two runs of the same kernels agree on.
  template <class T>
  void record(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) {
      digest_ = (digest_ ^ bytes[i]) * 0x100000001b3u;  // FNV-1a
    }
  }

  void report() const {
    std::printf("%-18s %3d solves, %4d launches, digest %016llx\n", name_, solves_, launches_,
                static_cast<unsigned long long>(digest_));
    std::fflush(stdout);
  }

  int launches() const { return launches_; }

 private:
  const char* name_;
  std::string solve_ = "before the first solve";
  int solves_ = 0;
  int launches_ = 0;
  uint64_t digest_ = 0xcbf29ce484222325u;
};
