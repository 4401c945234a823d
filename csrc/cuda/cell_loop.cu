// One persistent kernel iterates the whole batch: a block holds a tile of samples, and a sample
// that stops makes room for the next of the batch. Nothing that a sample's result depends on
// depends on its slot, its tile, or what else is in the batch.
#include "cell_loop.h"

#include "cell_tile.cuh"
#include "launch.h"

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

namespace fpi {
namespace {

constexpr int kMostThreads = kMostWarps * kWarpThreads;
constexpr int kBlocksPerCore = 2;  // resident at once: bounds the registers of a thread

// Cuts the weights into chunks, zeros past the ends, and opens the queue behind the first tiles.
template <class Product>
__global__ void __launch_bounds__(kMostThreads)
    pack_kernel(const __grid_constant__ CellLoopParams p, const __grid_constant__ CellLoopPlan plan,
                unsigned char* workspace) {
  using T = typename Product::Number;
  constexpr int kInputs = Product::kShape.chunk_inputs;
  constexpr int64_t kNumbers = kInputs * kPanelOutputs;  // of a chunk
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (thread == 0) {
    *reinterpret_cast<unsigned long long*>(workspace + plan.queue) =
        static_cast<unsigned long long>(plan.blocks) * plan.slots;
  }
  for (int l = 0; l < p.num_layers; ++l) {
    const CellLayer& layer = p.layers[l];
    const LayerShape& cut = plan.layers[l];
    const int64_t count = static_cast<int64_t>(cut.panels) * cut.chunks * kNumbers;
    for (int64_t i = thread; i < count; i += threads) {
      const int64_t number = i / kNumbers;
      const int inside = static_cast<int>(i % kNumbers);
      // Neighbouring threads read neighbours, along whichever side of the weight they lie.
      const bool along = layer.input_stride <= layer.output_stride;
      const int input = along ? inside % kInputs : inside / kPanelOutputs;
      const int output = along ? inside / kInputs : inside % kPanelOutputs;
      const int64_t j = number / cut.chunks * kPanelOutputs + output;
      const int64_t k = number % cut.chunks * kInputs + input;
      T value = T(0);
      if (j < layer.outputs && k < layer.inputs) {
        value =
            static_cast<const T*>(layer.weight)[j * layer.output_stride + k * layer.input_stride];
      }
      Product::put_weight(workspace + plan.weight[l] + number * Product::kShape.chunk_bytes, output,
                          input, value);
    }
  }
}

template <class Product>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore)
    cell_loop_kernel(const __grid_constant__ CellLoopParams p,
                     const __grid_constant__ CellLoopPlan plan, unsigned char* workspace) {
  const CellTile<Product> tile(p, plan, dynamic_shared_memory, workspace);
  auto* queue = reinterpret_cast<unsigned long long*>(workspace + plan.queue);
  tile.begin();
  while (true) {
    __syncthreads();
    const uint64_t seats = tile.line_up();
    if (seats == 0) return;
    tile.gather(seats);
    __syncthreads();
    for (int l = 0; l < p.num_layers; ++l) {
      tile.apply(l, __popcll(seats));
      __syncthreads();
    }
    take_steps<typename Product::Number>(p, tile.header, plan.slots, tile.room(), queue);
  }
}

const char* attribute(cudaDeviceAttr which, int& value) {
  int device = 0;
  const char* failed = described(cudaGetDevice(&device));
  return failed ? failed : described(cudaDeviceGetAttribute(&value, which, device));
}

}  // namespace

const char* device_limits(DeviceLimits& limits) {
  int cores = 0, shared_bytes = 0;
  const char* error = attribute(cudaDevAttrMultiProcessorCount, cores);
  if (!error) error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes);
  limits = {cores, shared_bytes};
  return error;
}

namespace {

template <class Product>
const char* run(const CellLoopParams& p, const CellLoopPlan& plan, unsigned char* workspace,
                void* stream) {
  constexpr int64_t kMostPackers = 1024;  // blocks
  int64_t chunks = 1;
  for (int l = 0; l < p.num_layers; ++l) {
    chunks += static_cast<int64_t>(plan.layers[l].panels) * plan.layers[l].chunks;
  }
  const char* packed = launch(pack_kernel<Product>, chunks < kMostPackers ? chunks : kMostPackers,
                              kMostThreads, 0, stream, p, plan, workspace);
  if (packed) return packed;
  const auto kernel = cell_loop_kernel<Product>;
  // Not what this plan asks for: the limit is the kernel's, and another thread may launch it with
  // a larger plan before this one does.
  DeviceLimits limits;
  const char* failed = device_limits(limits);
  if (!failed) {
    failed = described(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(limits.shared_bytes)));
  }
  if (failed) return failed;
  return launch(kernel, plan.blocks, plan.warps * kWarpThreads, plan.shared_bytes, stream, p, plan,
                workspace);
}

}  // namespace

const char* cell_loop_cuda(const CellLoopParams& p, StateType state, const CellLoopPlan& plan,
                           void* workspace, void* stream) {
  if (p.batch == 0) return nullptr;
  int generation = 0;
  if (p.precision != Precision::kIeee) {
    const char* error = attribute(cudaDevAttrComputeCapabilityMajor, generation);
    if (error) return error;
    constexpr int kAmpere = 8;
    if (generation < kAmpere) {
      return "rounded products need a device of compute capability 8.0 or above: use "
             "precision=\"ieee\"";
    }
  }
  auto* bytes = static_cast<unsigned char*>(workspace);
  if (state == StateType::kFloat64) return run<IeeeProduct<double>>(p, plan, bytes, stream);
  switch (p.precision) {
    case Precision::kTf32x3: return run<Tf32x3Product>(p, plan, bytes, stream);
    case Precision::kTf32: return run<Tf32Product>(p, plan, bytes, stream);
    case Precision::kBf16: return run<Bf16Product>(p, plan, bytes, stream);
    default: return run<IeeeProduct<float>>(p, plan, bytes, stream);
  }
}

}  // namespace fpi
