// A CUDA graph that iterates on the device: a WHILE node around a captured step.
#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device_loop/api.h"
#include "device_loop/node_rules.h"

#if CUDART_VERSION < 12040
#error \
    "fpi_cuda: the device loop needs a CUDA toolkit of at least 12.4. Set FPI_CUDA=0 to build without CUDA."
#endif

namespace fpi {
namespace {

static_assert(static_cast<int>(NodeType::kConditional) == cudaGraphNodeTypeConditional, "");
static_assert(static_cast<int>(NodeType::kMemFree) == cudaGraphNodeTypeMemFree, "");
static_assert(static_cast<int>(NodeType::kEmpty) == cudaGraphNodeTypeEmpty, "");

constexpr int kThreads = 256;
constexpr int kMostDepth = 16;  // of graphs inside graphs

// Sets whether another round is run. One block; `starts` marks the call before the first round.
__global__ void __launch_bounds__(kThreads)
    set_condition_kernel(cudaGraphConditionalHandle handle, const int8_t* __restrict__ status,
                         int64_t batch, int32_t* rounds, int64_t max_steps, bool starts) {
  bool active = false;
  for (int64_t i = threadIdx.x; i < batch && !active; i += kThreads) active = status[i] == 0;
  const bool any = __syncthreads_or(active);
  if (threadIdx.x != 0) return;
  const int32_t done = starts ? 0 : *rounds + 1;
  *rounds = done;
  cudaGraphSetConditional(handle, any && done < max_steps ? 1u : 0u);
}

std::string& last_error() {
  thread_local std::string text;
  return text;
}

// Runs `body`, which returns an empty text or what went wrong; lets no exception out.
template <class Body>
const char* guarded(const Body& body) noexcept {
  try {
    std::string text = body();
    if (text.empty()) return nullptr;
    last_error() = std::move(text);
    return last_error().c_str();
  } catch (...) {
    return "out of memory";
  }
}

std::string described(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // or the next call that checks would report it as its own
  return std::string(what) + ": " + cudaGetErrorString(error);
}

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
struct DestroyExec {
  void operator()(cudaGraphExec_t exec) const { cudaGraphExecDestroy(exec); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;
using Exec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyExec>;

bool on_device(const void* pointer) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeDevice;
}

// Why the copy may not be repeated without the host, or an empty text.
std::string copy_refusal(cudaGraphNode_t node) {
  cudaMemcpy3DParms copy{};
  const cudaError_t error = cudaGraphMemcpyNodeGetParams(node, &copy);
  if (error != cudaSuccess) return described("cudaGraphMemcpyNodeGetParams", error);
  const bool linear = !copy.srcArray && !copy.dstArray;
  if (linear && on_device(copy.srcPtr.ptr) && on_device(copy.dstPtr.ptr)) return {};
  return "it copies from or to host memory";
}

std::string graph_refusal(cudaGraph_t graph, int depth) {
  if (depth > kMostDepth) return "it nests graphs too deeply";
  size_t count = 0;
  cudaError_t error = cudaGraphGetNodes(graph, nullptr, &count);
  std::vector<cudaGraphNode_t> nodes(count);
  if (error == cudaSuccess && count) error = cudaGraphGetNodes(graph, nodes.data(), &count);
  if (error != cudaSuccess) return described("cudaGraphGetNodes", error);
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    error = cudaGraphNodeGetType(node, &type);
    if (error != cudaSuccess) return described("cudaGraphNodeGetType", error);
    if (const char* refusal = node_refusal(static_cast<NodeType>(type))) return refusal;
    std::string refusal;
    if (type == cudaGraphNodeTypeMemcpy) refusal = copy_refusal(node);
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      error = cudaGraphChildGraphNodeGetGraph(node, &child);
      refusal = error == cudaSuccess ? graph_refusal(child, depth + 1)
                                     : described("cudaGraphChildGraphNodeGetGraph", error);
    }
    if (!refusal.empty()) return refusal;
  }
  return {};
}

std::string unsupported() {
  int driver = 0, runtime = 0;
  std::string text = described("cudaDriverGetVersion", cudaDriverGetVersion(&driver));
  if (text.empty()) text = described("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&runtime));
  if (!text.empty()) return text;
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < runtime / 1000 || driver < 12040) {
    return "the driver is for CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", the loop needs " +
           std::to_string(runtime / 1000) + "." + (runtime / 1000 == 12 ? "4" : "0");
  }
  return {};
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphNode_t after,
                     cudaGraphNodeParams* params) {
  const size_t count = after ? 1 : 0;
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, count ? &after : nullptr, nullptr, count, params);
#else
  return cudaGraphAddNode(node, graph, count ? &after : nullptr, count, params);
#endif
}

struct Condition {
  cudaGraphConditionalHandle handle;
  const int8_t* status;
  int64_t batch;
  int32_t* rounds;
  int64_t max_steps;
};

cudaError_t add_condition(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphNode_t after,
                          Condition c, bool starts) {
  void* arguments[] = {&c.handle, &c.status, &c.batch, &c.rounds, &c.max_steps, &starts};
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeKernel;
  params.kernel.func = reinterpret_cast<void*>(&set_condition_kernel);
  params.kernel.gridDim = dim3(1);
  params.kernel.blockDim = dim3(kThreads);
  params.kernel.kernelParams = arguments;
  return add_node(node, graph, after, &params);
}

// [condition] -> WHILE { body -> condition }
std::string build(cudaGraph_t body, Condition condition, Graph* graph, Exec* built) {
  cudaGraph_t raw = nullptr;
  cudaError_t error = cudaGraphCreate(&raw, 0);
  if (error != cudaSuccess) return described("cudaGraphCreate", error);
  graph->reset(raw);
  error = cudaGraphConditionalHandleCreate(&condition.handle, raw, 0, 0);
  if (error != cudaSuccess) return described("cudaGraphConditionalHandleCreate", error);

  cudaGraphNode_t first = nullptr, loop = nullptr, step = nullptr, again = nullptr;
  error = add_condition(&first, raw, nullptr, condition, true);
  if (error != cudaSuccess) return described("adding the first condition", error);
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = condition.handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  error = add_node(&loop, raw, first, &params);
  if (error != cudaSuccess) return described("adding the WHILE node", error);
  const cudaGraph_t inside = params.conditional.phGraph_out[0];
  error = cudaGraphAddChildGraphNode(&step, inside, nullptr, 0, body);
  if (error != cudaSuccess) return described("adding the captured step", error);
  error = add_condition(&again, inside, step, condition, false);
  if (error != cudaSuccess) return described("adding the condition", error);

  cudaGraphExec_t exec = nullptr;
  error = cudaGraphInstantiate(&exec, raw, 0);
  if (error != cudaSuccess) return described("cudaGraphInstantiate", error);
  built->reset(exec);
  return {};
}

}  // namespace
}  // namespace fpi

struct FpiDeviceLoop {
  fpi::Graph graph;  // outlives its executable form, which shares its conditional handle
  fpi::Exec exec;
};

const char* fpi_device_loop_unsupported() {
  return fpi::guarded([] { return fpi::unsupported(); });
}

const char* fpi_captured_nodes(void* stream, int64_t* count) {
  return fpi::guarded([&]() -> std::string {
    cudaStreamCaptureStatus status{};
    cudaGraph_t graph = nullptr;
    unsigned long long id = 0;
    *count = -1;
    const auto at = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
    cudaError_t error =
        cudaStreamGetCaptureInfo(at, &status, &id, &graph, nullptr, nullptr, nullptr);
#else
    cudaError_t error = cudaStreamGetCaptureInfo_v2(at, &status, &id, &graph, nullptr, nullptr);
#endif
    if (error != cudaSuccess) return fpi::described("cudaStreamGetCaptureInfo", error);
    if (status != cudaStreamCaptureStatusActive) return {};
    size_t nodes = 0;
    error = cudaGraphGetNodes(graph, nullptr, &nodes);
    if (error != cudaSuccess) return fpi::described("cudaGraphGetNodes", error);
    *count = static_cast<int64_t>(nodes);
    return {};
  });
}

const char* fpi_restart_capture(void* stream) {
  return fpi::guarded([&]() -> std::string {
    const auto at = static_cast<cudaStream_t>(stream);
    cudaGraph_t partial = nullptr;
    if (cudaStreamEndCapture(at, &partial) == cudaSuccess) cudaGraphDestroy(partial);
    cudaGetLastError();  // that of the void capture
    return fpi::described("cudaStreamBeginCapture",
                          cudaStreamBeginCapture(at, cudaStreamCaptureModeThreadLocal));
  });
}

const char* fpi_device_loop_create(void* body, const int8_t* status, int64_t batch, int32_t* rounds,
                                   int64_t max_steps, FpiDeviceLoop** loop) {
  return fpi::guarded([&]() -> std::string {
    *loop = nullptr;
    std::string text = fpi::unsupported();
    if (!text.empty()) return text;
    const auto graph = static_cast<cudaGraph_t>(body);
    text = fpi::graph_refusal(graph, 0);
    if (!text.empty()) return "the captured step cannot be repeated: " + text;
    auto built = std::make_unique<FpiDeviceLoop>();
    text = fpi::build(graph, {0, status, batch, rounds, max_steps}, &built->graph, &built->exec);
    if (text.empty()) *loop = built.release();
    return text;
  });
}

const char* fpi_device_loop_launch(FpiDeviceLoop* loop, void* stream) {
  return fpi::guarded([&] {
    return fpi::described("cudaGraphLaunch",
                          cudaGraphLaunch(loop->exec.get(), static_cast<cudaStream_t>(stream)));
  });
}

void fpi_device_loop_destroy(FpiDeviceLoop* loop) { delete loop; }
