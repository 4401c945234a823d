// The functions of api.h in a build without CUDA. setup.py says why it is one.
#include "api.h"

#ifdef FPI_NO_CUDA

namespace {
constexpr const char* kReason = "built without CUDA (" FPI_NO_CUDA ")";
}

const char* fpi_device_loop_unsupported() { return kReason; }

const char* fpi_captured_nodes(void*, int64_t*) { return kReason; }

const char* fpi_restart_capture(void*) { return kReason; }

const char* fpi_device_loop_create(void*, const int8_t*, int64_t, int32_t*, int64_t,
                                   FpiDeviceLoop**) {
  return kReason;
}

const char* fpi_device_loop_launch(FpiDeviceLoop*, void*) { return kReason; }

void fpi_device_loop_destroy(FpiDeviceLoop*) {}

#endif
