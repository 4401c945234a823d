// Which nodes the body of a WHILE node may hold. Free of CUDA headers, so that any build tests it.
#pragma once

namespace fpi {

// The values of cudaGraphNodeType.
enum class NodeType : int {
  kKernel = 0,
  kMemcpy = 1,
  kMemset = 2,
  kHost = 3,
  kGraph = 4,
  kEmpty = 5,
  kWaitEvent = 6,
  kEventRecord = 7,
  kSemaphoreSignal = 8,
  kSemaphoreWait = 9,
  kMemAlloc = 10,
  kMemFree = 11,
  kConditional = 13,
};

// Why a body may not hold a node of this type, or null. A child graph is allowed where all that it
// holds is, and a copy where both ends are device memory.
const char* node_refusal(NodeType type);

}  // namespace fpi
