// The scheduler behind cuda_runtime.h: one block at a time, its threads as fibers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include "initcheck.h"

#include "cuda_runtime.h"  // last: its __noinline__ is another one than the compiler's

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMostShared = kMostSharedOfDevice;
alignas(16) thread_local unsigned char dynamic_shared_memory[kMostShared];

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostRoundsHeld = 200;
constexpr size_t kWidestShuffle = 16;
constexpr size_t kWidestExchange = 24;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* fake_stack = nullptr;
  dim3 index;
  Wait waits = Wait::kNothing;
  unsigned mask = 0;
  bool done = true;
  int exchanges = 0;  // so far; its parity picks the buffer
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;  // of copies that are on their way
};

struct Exchange {
  unsigned char value[2][32][kWidestExchange];
};

std::vector<std::unique_ptr<Fiber>> fibers;  // of the block; grown as needed, stacks are used again
std::vector<Exchange> exchanges;
Fiber* running = nullptr;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void (*kernel_body)(void*) = nullptr;
void* kernel_argument = nullptr;
std::mt19937 order;
unsigned order_seed = 0;
std::map<const void*, size_t> shared_limits;

constexpr int kNobodyWrote = 0xff;  // every byte of such memory: NaN in every floating type

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u of %u)\n", what, blockIdx.x,
               running ? running->index.x : 0, blockDim.x);
  std::abort();
}

int number_of(const Fiber& fiber) { return static_cast<int>(fiber.index.x); }

void yield() {
  Fiber& self = *running;
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  // Or ASan would wipe what it knows of this stack at every switch to it, at half of the time.
  running->context.uc_stack.ss_size = 0;
  kernel_body(kernel_argument);
  for (const auto& group : running->groups) {
    if (!group.empty()) fail("a thread left before its copies arrived");
  }
  running->done = true;
  yield();
}

void start(Fiber& fiber, unsigned number) {
  fiber.index = dim3(number);
  fiber.done = false;
  fiber.waits = Wait::kNothing;
  fiber.exchanges = 0;
  fiber.fake_stack = nullptr;
  fiber.uncommitted.clear();
  fiber.groups.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, fiber.stack.data(), fiber.stack.size());
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
  running = nullptr;
}

// Lets go of the threads whose barrier is complete; false if none was.
bool release(int threads) {
  bool any = false, all_at_block = true, some_at_block = false;
  for (int t = 0; t < threads; ++t) {
    if (fibers[t]->done) continue;
    const bool here = fibers[t]->waits == Wait::kBlock;
    all_at_block = all_at_block && here;
    some_at_block = some_at_block || here;
  }
  if (some_at_block && all_at_block) {
    for (int t = 0; t < threads; ++t) fibers[t]->waits = Wait::kNothing;
    return true;
  }
  for (int first = 0; first < threads; first += 32) {
    for (int t = first; t < first + 32 && t < threads; ++t) {
      const Fiber& one = *fibers[t];
      if (one.done || (one.waits != Wait::kWarp && one.waits != Wait::kShuffle)) continue;
      bool complete = true;
      for (int l = 0; l < 32; ++l) {
        if (!(one.mask >> l & 1u)) continue;
        if (first + l >= threads || fibers[first + l]->done) {
          fail("a warp operation names a lane that does not exist or has left");
        }
        const Fiber& other = *fibers[first + l];
        complete = complete && other.waits == one.waits && other.mask == one.mask;
      }
      if (!complete) continue;
      const unsigned mask = one.mask;
      for (int l = 0; l < 32; ++l) {
        if (mask >> l & 1u) fibers[first + l]->waits = Wait::kNothing;
      }
      any = true;
    }
  }
  return any;
}

void run_block(int threads) {
  for (int t = 0; t < threads; ++t) start(*fibers[t], static_cast<unsigned>(t));
  std::vector<int> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  // With a seed, one warp after another sits still for a while: the others run as far ahead of it
  // as the barriers let them.
  int held = -1, rounds_held = 0;
  while (true) {
    if (order_seed) std::shuffle(turn.begin(), turn.end(), order);
    if (order_seed && --rounds_held < 0) {
      held = static_cast<int>(order() % ((threads + 31) / 32 + 1)) - 1;
      rounds_held = static_cast<int>(order() % kMostRoundsHeld);
    }
    bool ran = false, left = false;
    for (const int t : turn) {
      Fiber& fiber = *fibers[t];
      if (!fiber.done && fiber.waits == Wait::kNothing && t / 32 != held) {
        resume(fiber);
        ran = true;
      }
      left = left || !fiber.done;
    }
    if (!left) return;
    if (release(threads) || ran) continue;
    if (held < 0) fail("some threads wait for others that never come");
    held = -1;
  }
}

}  // namespace

void set_seed(unsigned seed) {
  order_seed = seed;
  order.seed(seed);
}

int lane() { return number_of(*running) % 32; }

void allow_shared(const void* kernel, size_t bytes) { shared_limits[kernel] = bytes; }
size_t allowed_shared(const void* kernel) {
  constexpr size_t kUnasked = 48 * 1024;
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kUnasked : std::max(kUnasked, found->second);
}

void copy_later(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("a copy that is not aligned to its size");
  }
  running->uncommitted.push_back({to, from, bytes});
}

void commit_copies() {
  running->groups.push_back(std::move(running->uncommitted));
  running->uncommitted.clear();
}

void await_copies(int pending) {
  auto& groups = running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      is_read(copy.from, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void wait(Wait what, unsigned mask) {
  running->waits = what;
  running->mask = mask;
  if (what != Wait::kBlock && !(mask >> lane() & 1u)) fail("a lane outside its own mask");
  yield();
}

void exchange(const void* value, void* received, size_t bytes, int from, unsigned mask) {
  if (bytes > kWidestShuffle) fail("a shuffle wider than 16 bytes");
  if (from < 0 || from >= 32 || !(mask >> from & 1u))
    fail("a shuffle from a lane outside its mask");
  Exchange& warp = exchanges[number_of(*running) / 32];
  // Two buffers in turn: a fast lane may put its next value before a slow one has read this one.
  const int buffer = running->exchanges++ & 1;
  std::memcpy(warp.value[buffer][lane()], value, bytes);
  wait(Wait::kShuffle, mask);
  std::memcpy(received, warp.value[buffer][from], bytes);
}

void exchange_all(const void* value, void* received, size_t bytes) {
  if (bytes > kWidestExchange) fail("an exchange wider than 24 bytes");
  Exchange& warp = exchanges[number_of(*running) / 32];
  const int buffer = running->exchanges++ & 1;
  std::memcpy(warp.value[buffer][lane()], value, bytes);
  wait(Wait::kShuffle, ~0u);
  for (int l = 0; l < 32; ++l) {
    std::memcpy(static_cast<unsigned char*>(received) + l * bytes, warp.value[buffer][l], bytes);
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  const int threads = static_cast<int>(block.x);
  if (block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) fail("grids have one axis here");
  while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Fiber>());
  exchanges.assign((threads + 31) / 32, Exchange{});
  kernel_body = body;
  kernel_argument = argument;
  blockDim = block;
  gridDim = grid;
  std::vector<unsigned> turn(grid.x);
  std::iota(turn.begin(), turn.end(), 0u);
  if (order_seed) std::shuffle(turn.begin(), turn.end(), order);
  for (const unsigned b : turn) {
    blockIdx = dim3(b);
    ASAN_UNPOISON_MEMORY_REGION(dynamic_shared_memory, kMostShared);
    std::memset(dynamic_shared_memory, kNobodyWrote, shared_bytes);
    ASAN_POISON_MEMORY_REGION(dynamic_shared_memory + shared_bytes, kMostShared - shared_bytes);
    run_block(threads);
  }
}

}  // namespace emulation

cudaError_t cudaMalloc(void** address, size_t bytes) {
  constexpr size_t kAlignment = 256;
  if (posix_memalign(address, kAlignment, bytes)) return cudaErrorMemoryAllocation;
  std::memset(*address, emulation::kNobodyWrote, bytes);
  emulation::is_allocated(*address, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  emulation::is_freed(address);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  emulation::is_read(from, bytes);
  std::memcpy(to, from, bytes);
  emulation::is_written(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  emulation::is_written(to, bytes);
  return cudaSuccess;
}
