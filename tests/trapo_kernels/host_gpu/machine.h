// A GPU on the host: runs the CUDA kernels of csrc from their own source, one random but repeatable interleaving per seed.
//
//   thread    a fiber that runs until it must wait, and says for what
//   block     an operating-system thread, so that __shared__ is thread_local; one runs at a time
//   cluster   blocks that take turns until all have finished; clusters run one after the other in random order
//
// What is asynchronous on a GPU is done early or late here, as the random numbers have it, and its result is NaN until it may be
// read: a missing wait shows as NaN, a missing barrier as a wrong number, an arrival too few as an error that says who waits for what.
// What this cannot see: races of plain loads and stores between two calls that wait or pause, the memory model, and time.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "language.h"

namespace host_gpu {

// Which of the faults that a test has put into the kernels is made; 0 for none.
inline int fault = 0;

constexpr int kWarpThreads = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 227 << 10;  // what a block may have on sm_90
constexpr uint32_t kSharedStart = 2048;     // the address of its first byte
constexpr int kAccumulators = 128;          // of m64n256, per thread

// 16 bytes on their way to shared memory. Their source is read at once (`early`) or when the copy must be there.
struct Copy {
  char* to;
  const char* from;
  size_t valid;
  bool early;
  char bytes[16];

  void read() {
    std::memset(bytes, 0, 16);
    std::memcpy(bytes, from, valid);
  }
};

// A wgmma of one warp's 16 rows.
struct Product {
  uint64_t a, b;
  bool add;
  bool operator==(const Product&) const = default;
};

struct Thread {
  ucontext_t context;
  int index = 0;
  bool finished = false;
  const char* waits_for = "its first turn";
  bool (*ready)(const void*) = nullptr;
  const void* condition = nullptr;
  unsigned block_syncs = 0, warp_syncs = 0, cluster_syncs = 0, shuffles = 0, wgmma_waits = 0;  // so far
  std::deque<std::vector<Copy>> copies = {{}};  // by group, the open one last
  // The wgmmas that this thread has not waited for; numbers count from its first one.
  std::deque<Product> products;
  std::deque<size_t> group_ends;
  size_t waited = 0;
  bool fenced = false;
  float* accumulators = nullptr;
  std::array<float, kAccumulators> held;  // the accumulators' values meanwhile
};

struct Warp {
  uint32_t slots[2][kWarpThreads];  // of a shuffle and the next
  size_t multiplied = 0;  // how many of its wgmmas have been carried out
};

struct Block {
  int rank = 0;
  char* shared = nullptr;  // its dynamic shared memory; other shared variables lie at the same distance from it in every block
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<const uint64_t*> unfenced;  // barriers that TMA has not been told of
  ucontext_t scheduler;
  Thread* running = nullptr;
  bool left = false;
};

// A box of a tensor on its way to the shared memory of a block.
struct Load {
  Block* to_block;
  char* to;
  CUtensorMap map;
  int x, y;
  uint64_t* barrier;
};

struct Cluster {
  std::mutex turn_lock;
  std::condition_variable turn_changed;
  std::vector<Block> blocks;
  size_t ready = 0;        // blocks that can start
  std::vector<int> turns;  // the ranks still to come in this round
  bool moved = false;      // whether anything happened in this round
  std::vector<Load> loads;
  std::vector<std::pair<Block*, std::array<char*, 2>>> lent;  // memory of a block that others have a pointer to
  dim3 index;
  size_t shared_bytes = 0;
  std::string error;
  std::mt19937_64 random;

  bool chance(int percent) { return static_cast<int>(random() % 100) < percent; }
  bool over() const {
    return !error.empty() || std::all_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.left; });
  }
};

}  // namespace host_gpu

namespace trapo {
alignas(1024) inline thread_local unsigned char memory[host_gpu::kSharedBytes];  // the kernels' name for dynamic shared memory
}

namespace host_gpu {

inline thread_local Block* block;
inline Cluster* cluster;

// Ends the launch with an error; the fiber that called it never goes on.
[[noreturn]] inline void fail(const std::string& message) {
  if (cluster->error.empty()) cluster->error = message;
  while (true) swapcontext(&block->running->context, &block->scheduler);
}

// Lets others run until `ready` holds.
template <typename Ready>
void wait_until(const char* what, const Ready& ready) {
  if (ready()) return;
  Thread& me = *block->running;
  me.waits_for = what;
  me.ready = [](const void* condition) { return (*static_cast<const Ready*>(condition))(); };
  me.condition = &ready;
  swapcontext(&me.context, &block->scheduler);
  me.ready = nullptr;
}

// Now and then lets others run first: what kernels call does so on entry.
inline void pause() {
  if (!cluster->chance(5)) return;
  bool resumed = false;
  wait_until("its turn", [&] { return std::exchange(resumed, true); });
}

inline Thread& self() { return *block->running; }
inline Warp& warp() { return block->warps[static_cast<size_t>(self().index / kWarpThreads)]; }
inline Thread* warp_threads() { return &block->threads[static_cast<size_t>(self().index / kWarpThreads * kWarpThreads)]; }

// Until each of these threads has counted up `calls` as often as this one, which does so now.
inline void sync(const char* what, const Thread* first, size_t count, unsigned Thread::* calls) {
  const unsigned mine = ++(self().*calls);
  wait_until(what, [=] { return std::all_of(first, first + count, [=](const Thread& t) { return t.*calls >= mine; }); });
}

inline Block& other_block(unsigned rank) {
  if (rank >= cluster->blocks.size()) fail("the cluster has no block " + std::to_string(rank));
  Block& other = cluster->blocks[rank];
  if (other.left) fail("a block reaches into the shared memory of one that has left");
  return other;
}

// Where a shared variable lies in another block of the cluster.
template <typename T>
T* in_block(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(other_block(rank).shared + (reinterpret_cast<char*>(mine) - block->shared));
}

// A load arrives: 128 bytes per row of the box, bits 4 to 6 of an address exchanged by its bits 7 to 9.
void deliver(const Load& load);

// Runs every thread of the block that can go on, until it must wait.
inline bool run_once() {
  std::vector<Thread*> order;
  for (Thread& t : block->threads) {
    if (!t.finished) order.push_back(&t);
  }
  std::shuffle(order.begin(), order.end(), cluster->random);
  bool moved = false;
  for (Thread* t : order) {
    if (t->ready && !t->ready(t->condition)) continue;
    block->running = t;
    threadIdx.x = static_cast<unsigned>(t->index);
    blockIdx = cluster->index;
    blockIdx.x += static_cast<unsigned>(block->rank);
    swapcontext(&block->scheduler, &t->context);
    moved = true;
    if (!cluster->error.empty()) break;
  }
  return moved;
}

// After every block had its turn: loads arrive; where nothing can happen any more, that is an error.
inline void end_round() {
  std::vector<Load> later;
  std::shuffle(cluster->loads.begin(), cluster->loads.end(), cluster->random);
  for (const Load& load : cluster->loads) {
    if (cluster->chance(50)) {
      deliver(load);
      cluster->moved = true;
    } else {
      later.push_back(load);
    }
  }
  cluster->loads = later;
  if (!cluster->moved && later.empty() && cluster->error.empty()) {
    std::map<std::string, int> waiting;
    for (const Block& b : cluster->blocks) {
      for (const Thread& t : b.threads) {
        if (!t.finished) ++waiting[t.waits_for];
      }
    }
    cluster->error = "deadlock:";
    for (const auto& [what, count] : waiting) cluster->error += " " + std::to_string(count) + " threads wait for " + what + ";";
  }
  cluster->moved = false;
  for (const Block& b : cluster->blocks) {
    if (!b.left) cluster->turns.push_back(b.rank);
  }
  std::shuffle(cluster->turns.begin(), cluster->turns.end(), cluster->random);
}

inline std::vector<char*> free_stacks;  // kept: a page that is there costs less than a new one

// The stacks of a block's threads, as many as it may have.
inline char* take_stacks() {
  if (free_stacks.empty()) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return static_cast<char*>(mmap(nullptr, 1024 * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  char* const stacks = free_stacks.back();
  free_stacks.pop_back();
  return stacks;
}

inline const std::function<void()>* kernel;

inline void thread_main() {
  (*kernel)();
  block->running->finished = true;
  swapcontext(&block->running->context, &block->scheduler);
}

inline void prepare(Thread& t, int index, char* stack) {
  t.index = index;
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = stack;
  t.context.uc_stack.ss_size = kStackBytes;
  makecontext(&t.context, thread_main, 0);
}

// The life of a block, in its own operating-system thread.
inline void block_main(Block& me) {
  char* const shared = reinterpret_cast<char*>(trapo::memory);
  std::unique_lock lock(cluster->turn_lock);
  block = &me;
  me.shared = shared;
  me.threads.resize(blockDim.x);
  me.warps.resize((blockDim.x + kWarpThreads - 1) / kWarpThreads);
  std::memset(shared, 0xFF, kSharedBytes);
  char* const stacks = take_stacks();
  for (unsigned i = 0; i < blockDim.x; ++i) prepare(me.threads[i], static_cast<int>(i), stacks + i * kStackBytes);
  ++cluster->ready;
  cluster->turn_changed.notify_all();
  cluster->turn_changed.wait(lock, [] { return cluster->ready == cluster->blocks.size(); });
  while (true) {
    cluster->turn_changed.wait(lock, [&] { return cluster->over() || cluster->turns.back() == me.rank; });
    if (cluster->over()) break;
    for (auto runs = 1 + cluster->random() % 32; runs > 0 && run_once(); --runs) cluster->moved = true;
    me.left = std::all_of(me.threads.begin(), me.threads.end(), [](const Thread& t) { return t.finished; });
    if (me.left) {  // who still reads here reads NaN
      for (const auto& [owner, range] : cluster->lent) {
        if (owner == &me) std::fill(range[0], range[1], '\xFF');
      }
    }
    cluster->turns.pop_back();
    if (cluster->turns.empty()) end_round();
    cluster->turn_changed.notify_all();
  }
  if (cluster->error.empty() && std::any_of(shared + cluster->shared_bytes, shared + kSharedBytes, [](char c) { return c != '\xFF'; })) {
    cluster->error = "a block wrote beyond the shared memory it was launched with";
  }
  free_stacks.push_back(stacks);
}

// Runs `body` as a kernel; an empty string, or what went wrong.
inline std::string launch(unsigned blocks, unsigned threads, unsigned cluster_blocks, size_t shared_bytes, uint64_t seed,
                          const std::function<void()>& body) {
  kernel = &body;
  blockDim.x = threads, gridDim.x = blocks;
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(blocks / cluster_blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned which : order) {
    Cluster c;
    cluster = &c;
    c.index.x = which * cluster_blocks;
    c.shared_bytes = shared_bytes;
    c.random.seed(random());
    c.blocks = std::vector<Block>(cluster_blocks);
    std::vector<std::thread> running;
    for (Block& b : c.blocks) {
      b.rank = static_cast<int>(&b - c.blocks.data());
      c.turns.push_back(b.rank);
    }
    for (Block& b : c.blocks) running.emplace_back([&b] { block_main(b); });
    for (std::thread& t : running) t.join();
    if (c.error.empty() && !c.loads.empty()) c.error = "a load is still on its way when its block has left";
    if (!c.error.empty()) return c.error;
  }
  return "";
}

}  // namespace host_gpu

// What kernels call by name.
inline void __syncthreads() {
  const auto& threads = host_gpu::block->threads;
  host_gpu::sync("__syncthreads", threads.data(), threads.size(), &host_gpu::Thread::block_syncs);
}

inline void __syncwarp() { host_gpu::sync("__syncwarp", host_gpu::warp_threads(), host_gpu::kWarpThreads, &host_gpu::Thread::warp_syncs); }

// The value that lane `from` passes, as in all warp-wide calls of float and int.
template <typename T>
T __shfl_sync(unsigned, T mine, int from) {
  static_assert(sizeof(T) == sizeof(float));
  const int lane = host_gpu::self().index % host_gpu::kWarpThreads;
  uint32_t* const slots = host_gpu::warp().slots[host_gpu::self().shuffles % 2];
  slots[lane] = std::bit_cast<uint32_t>(mine);
  host_gpu::sync("a shuffle", host_gpu::warp_threads(), host_gpu::kWarpThreads, &host_gpu::Thread::shuffles);
  return std::bit_cast<T>(slots[from % host_gpu::kWarpThreads]);
}
template <typename T>
T __shfl_xor_sync(unsigned all, T mine, int offset) {
  return __shfl_sync(all, mine, host_gpu::self().index % host_gpu::kWarpThreads ^ offset);
}
inline int __all_sync(unsigned all, int mine) {
  int every = mine != 0;
  for (int offset = 1; offset < host_gpu::kWarpThreads; offset *= 2) every &= __shfl_xor_sync(all, every, offset);
  return every;
}
