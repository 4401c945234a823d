// Told of device memory, what is written and what is read of it, so that a read of what nobody
// wrote ends the program, whether or not the value is used, as initcheck of compute-sanitizer does.
// In builds without EMULATION_INITCHECK, nobody listens.
#pragma once

#include <cstddef>

namespace emulation {

#ifdef EMULATION_INITCHECK
void is_allocated(const void* address, size_t bytes);
void is_freed(const void* address);
void is_written(const void* address, size_t bytes);
void is_read(const void* address, size_t bytes);
#else
inline void is_allocated(const void*, size_t) {}
inline void is_freed(const void*) {}
inline void is_written(const void*, size_t) {}
inline void is_read(const void*, size_t) {}
#endif

}  // namespace emulation
