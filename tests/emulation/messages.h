// What the drivers of this folder read on stdin and write on stdout, in pieces. Arrays live in
// blocks of their exact size, so that ASan sees each one's ends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

inline bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
inline void write(const void* from, size_t bytes) {
  if (std::fwrite(from, 1, bytes, stdout) != bytes) fail("cannot write");
}

// `offset` bytes into an aligned block that ends where the array does; null where it is empty.
struct Memory {
  std::unique_ptr<char[]> block;
  int64_t bytes = 0;
  int64_t offset = 0;
  char* data() const { return bytes ? block.get() + offset : nullptr; }
};

inline void read_array(Memory& m, int64_t offset) {
  if (!read(&m.bytes, sizeof m.bytes)) fail("cut short");
  m.offset = offset;
  m.block.reset(new char[m.bytes + offset]);
  if (!read(m.block.get() + offset, m.bytes)) fail("cut short");
}

// An int64 of text and the text.
inline void write_text(const char* text) {
  const std::string all = text ? text : "";
  const int64_t length = static_cast<int64_t>(all.size());
  write(&length, sizeof length);
  write(all.data(), all.size());
}

// Every array as an int64 of bytes and the bytes.
inline void write_arrays(const std::vector<Memory>& arrays) {
  for (const Memory& m : arrays) {
    write(&m.bytes, sizeof m.bytes);
    if (m.bytes) write(m.data(), m.bytes);
  }
}
