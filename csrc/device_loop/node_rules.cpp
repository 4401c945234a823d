#include "node_rules.h"

#include "api.h"

namespace fpi {

const char* node_refusal(NodeType type) {
  switch (type) {
    case NodeType::kKernel:
    case NodeType::kMemcpy:
    case NodeType::kMemset:
    case NodeType::kGraph:
    case NodeType::kEmpty: return nullptr;
    case NodeType::kHost: return "it runs a function on the host";
    case NodeType::kWaitEvent:
    case NodeType::kEventRecord: return "it waits for or records an event of another stream";
    case NodeType::kSemaphoreSignal:
    case NodeType::kSemaphoreWait: return "it uses an external semaphore";
    case NodeType::kMemAlloc:
    case NodeType::kMemFree: return "it allocates or frees memory on the stream";
    case NodeType::kConditional: return "it holds a conditional node of its own";
  }
  return "it holds a node of a type that this version does not know";
}

}  // namespace fpi

extern "C" const char* fpi_node_refusal(int type) {
  return fpi::node_refusal(static_cast<fpi::NodeType>(type));
}
