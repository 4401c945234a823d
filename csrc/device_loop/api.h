// The solve loop on the device, for callers of any language: plain C, so that one build serves
// every Python and every torch. csrc/python calls it. A build without CUDA has all of it too, and
// answers with the reason.
//
// A function that can fail returns null, or what went wrong: a text that is valid until the same
// thread's next call. Nothing is thrown, and nothing is left behind where one fails.
#pragma once

#include <cstdint>

#include "../common/export.h"

// Why a WHILE body may not hold a node of this cudaGraphNodeType, or null.
FPI_API const char* fpi_node_refusal(int type);

struct FpiDeviceLoop;

// Null where runtime, driver and the current device have conditional nodes.
FPI_API const char* fpi_device_loop_unsupported();

// The number of nodes captured on `stream` (a cudaStream_t) so far; -1 where it is not capturing.
FPI_API const char* fpi_captured_nodes(void* stream, int64_t* count);

// Ends the capture on `stream` that a call has made void, and begins one in its place that can be
// ended without an error: torch gives up its memory pools only then.
FPI_API const char* fpi_restart_capture(void* stream);

// An executable graph that repeats `body` (a cudaGraph_t, copied) while any of status (batch,) is 0
// and fewer than `max_steps` rounds were run, on the current device. `rounds` (1,) counts them. The
// memory that body, status and rounds live in must outlast the loop.
FPI_API const char* fpi_device_loop_create(void* body, const int8_t* status, int64_t batch,
                                           int32_t* rounds, int64_t max_steps,
                                           FpiDeviceLoop** loop);

// Enqueues the loop on `stream`, without waiting for it. Not from two threads at once.
FPI_API const char* fpi_device_loop_launch(FpiDeviceLoop* loop, void* stream);

// Also while the loop runs: CUDA frees it when it has ended.
FPI_API void fpi_device_loop_destroy(FpiDeviceLoop* loop);
