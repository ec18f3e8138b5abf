// The functions of csrc/cuda/ptx.cuh for the machine on the host, from the PTX manual and not from the kernels that call them.

#pragma once

#include "machine.h"

namespace trapo {

namespace gpu = host_gpu;

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - gpu::block->shared) + gpu::kSharedStart;
}

// cp.async: the destination is NaN until the wait.
inline void start_copy(void* to, const void* from, int valid) {
  gpu::pause();
  if (shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) gpu::fail("cp.async of 16 bytes that are not aligned");
  if (valid < 0 || valid > 16) gpu::fail("cp.async of " + std::to_string(valid) + " bytes");
  gpu::Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), static_cast<size_t>(valid), gpu::cluster->chance(50), {}};
  if (copy.early) copy.read();
  std::memset(to, 0xFF, 16);
  gpu::self().copies.back().push_back(copy);
}
inline void start_copy(void* to, const void* from) { start_copy(to, from, 16); }
inline void commit_copies() { gpu::self().copies.emplace_back(); }

template <size_t kPending>
void wait_copies() {
  auto& groups = gpu::self().copies;
  for (; groups.size() > 1 + kPending; groups.pop_front()) {
    for (gpu::Copy& copy : groups.front()) {
      if (!copy.early) copy.read();
      std::memcpy(copy.to, copy.bytes, 16);
    }
  }
}

// An mbarrier: how many arrivals a phase takes, how many are still to come, bytes still to come, the phase's parity.
struct Barrier {
  uint64_t expected : 20, pending : 20, parity : 1;
  int64_t bytes : 23;

  void complete() {
    if (pending != 0 || bytes != 0) return;
    parity ^= 1;
    pending = expected;
  }
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline Barrier& barrier_at(uint64_t* place) {
  Barrier& barrier = *reinterpret_cast<Barrier*>(place);
  if (barrier.expected == 0xFFFFF) gpu::fail("an mbarrier is used before it is initialised");
  return barrier;
}

inline void barrier_init(uint64_t* place, uint32_t arrivals) {
  *reinterpret_cast<Barrier*>(place) = {arrivals, arrivals, 0, 0};
  gpu::block->unfenced.push_back(place);
}
inline void barrier_fence() { gpu::block->unfenced.clear(); }

inline void arrive(Barrier& barrier) {
  if (barrier.pending == 0) gpu::fail("more threads arrive at an mbarrier than it was initialised for");
  --barrier.pending;
  barrier.complete();
}

inline void barrier_arrive(uint64_t* place, uint32_t rank) {
  gpu::pause();
  arrive(barrier_at(gpu::in_block(place, rank)));
}

inline void barrier_arrive_expect(uint64_t* place, uint32_t bytes) {
  gpu::pause();
  barrier_at(place).bytes += bytes;
  arrive(barrier_at(place));
}

inline void barrier_wait(uint64_t* place, uint32_t parity) {
  gpu::wait_until("an mbarrier", [=] { return barrier_at(place).parity != parity; });
}

// The bytes at `to` are NaN from now on, in every block, until the load is delivered there.
inline void tma_load_multicast(void* to, const CUtensorMap* map, int32_t x, int32_t y, uint64_t* barrier, uint16_t ranks) {
  gpu::pause();
  const auto& unfenced = gpu::block->unfenced;
  if (std::find(unfenced.begin(), unfenced.end(), barrier) != unfenced.end()) {
    gpu::fail("a load to an mbarrier without a fence after its init");
  }
  if (shared_address(to) % 128) gpu::fail("a load to an address that is no multiple of 128");
  for (uint32_t rank = 0; ranks >> rank; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    barrier_at(gpu::in_block(barrier, rank));  // stands there
    char* const there = gpu::in_block(static_cast<char*>(to), rank);
    std::memset(there, 0xFF, static_cast<size_t>(map->box_rows) * 128);
    gpu::cluster->loads.push_back({&gpu::other_block(rank), there, *map, x, y, gpu::in_block(barrier, rank)});
  }
}
inline void tma_load(void* to, const CUtensorMap* map, int32_t x, int32_t y, uint64_t* barrier) {
  tma_load_multicast(to, map, x, y, barrier, static_cast<uint16_t>(1 << gpu::block->rank));
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void wgmma_fence() { gpu::self().fenced = true; }
inline void wgmma_commit() { gpu::self().group_ends.push_back(gpu::self().waited + gpu::self().products.size()); }

// Element [row, k] of the bf16 operand that a descriptor describes.
inline float operand(uint64_t descriptor, uint32_t row, uint32_t k) {
  if (descriptor >> 62 != 1) gpu::fail("only operands swizzled by 128 bytes are modelled");
  const uint32_t start = (descriptor & 0x3FFF) << 4, eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t plain = start + row / 8 * eight_rows + row % 8 * 128 + k * 2;
  const uint32_t address = plain ^ (plain >> 7 & 7) << 4;
  if (address < gpu::kSharedStart || address - gpu::kSharedStart + 2 > gpu::cluster->shared_bytes) {
    gpu::fail("a wgmma reads outside the shared memory");
  }
  __nv_bfloat16 value;
  std::memcpy(&value, gpu::block->shared + (address - gpu::kSharedStart), 2);
  return static_cast<float>(value);
}

// Carries out the warp's product with this number: 16 of the warpgroup's 64 rows against 256 columns.
inline void multiply(size_t number) {
  gpu::Thread* const lanes = gpu::warp_threads();
  const auto product_of = [=](int lane) { return lanes[lane].products[number - lanes[lane].waited]; };
  const gpu::Product product = product_of(0);
  for (int lane = 1; lane < gpu::kWarpThreads; ++lane) {
    if (product_of(lane) != product) gpu::fail("the threads of a warp disagree about a wgmma");
  }
  const uint32_t first_row = static_cast<uint32_t>(lanes->index / gpu::kWarpThreads % 4) * 16;
  float a[16][16], b[16][256], sum[16][256] = {};
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t row = 0; row < 16; ++row) a[row][k] = operand(product.a, first_row + row, k);
    for (uint32_t column = 0; column < 256; ++column) b[k][column] = operand(product.b, column, k);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 256; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < gpu::kWarpThreads; ++lane) {
    for (int i = 0; i < gpu::kAccumulators; ++i) {  // the manual's figure of the D fragment of m64nNk16
      const int row = lane / 4 + 8 * (i >> 1 & 1), column = 8 * (i >> 2) + 2 * (lane % 4) + (i & 1);
      float& d = lanes[lane].held[static_cast<size_t>(i)];
      d = (product.add ? d : 0.0f) + sum[row][column];
    }
  }
}

// d is NaN from now on, until the wait. The operands are read now or at the wait.
inline void wgmma_m64n256k16(float (&d)[gpu::kAccumulators], uint64_t a, uint64_t b, int add) {
  gpu::pause();
  gpu::Thread& me = gpu::self();
  if (me.products.empty()) {
    if (!me.fenced) gpu::fail("a wgmma without a fence after its accumulators were used");
    me.accumulators = d;
    std::copy(d, d + gpu::kAccumulators, me.held.begin());
  } else if (me.accumulators != d) {
    gpu::fail("wgmmas on two accumulators at a time are not modelled");
  }
  std::fill(d, d + gpu::kAccumulators, NAN);
  me.products.push_back({a, b, add != 0});
  const size_t issued = me.waited + me.products.size();
  const gpu::Thread* const lanes = gpu::warp_threads();
  const auto has_issued = [=](const gpu::Thread& t) { return t.waited + t.products.size() >= issued; };
  const bool last = std::all_of(lanes, lanes + gpu::kWarpThreads, has_issued);
  if (!last || !gpu::cluster->chance(50)) return;
  for (size_t& done = gpu::warp().multiplied; done < issued; ++done) multiply(done);
}

template <size_t kPending>
void wgmma_wait() {
  gpu::sync("a wgmma", gpu::warp_threads(), gpu::kWarpThreads, &gpu::Thread::wgmma_waits);
  gpu::Thread& me = gpu::self();
  for (; me.group_ends.size() > kPending; me.group_ends.pop_front()) {
    for (size_t& done = gpu::warp().multiplied; done < me.group_ends.front(); ++done) multiply(done);
    for (; me.waited < me.group_ends.front(); ++me.waited) me.products.pop_front();
  }
  if (!me.products.empty() || !me.accumulators) return;
  std::copy(me.held.begin(), me.held.end(), me.accumulators);
  me.accumulators = nullptr;
  me.fenced = false;
}

template <int kCount>
void pin_registers(float (&)[kCount]) {}

}  // namespace trapo

inline void host_gpu::deliver(const Load& load) {
  if (load.to_block->left) {
    cluster->error = "a load arrives in the shared memory of a block that has left";
    return;
  }
  for (int row = 0; row < load.map.box_rows; ++row) {
    for (int column = 0; column < load.map.box_columns; ++column) {
      const int64_t x = load.x + column, y = load.y + row;
      const bool inside = x >= 0 && x < load.map.columns && y >= 0 && y < load.map.rows;
      const uint16_t value = inside ? load.map.data[y * load.map.stride + x] : uint16_t{0};
      const size_t plain = static_cast<size_t>(load.to - load.to_block->shared) + static_cast<size_t>(row * 128 + column * 2);
      std::memcpy(load.to_block->shared + (plain ^ (plain >> 7 & 7) << 4), &value, 2);
    }
  }
  trapo::Barrier& barrier = *reinterpret_cast<trapo::Barrier*>(load.barrier);
  barrier.bytes -= load.map.box_rows * 128;
  barrier.complete();
}
