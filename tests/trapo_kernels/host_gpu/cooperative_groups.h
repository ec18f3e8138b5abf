// A cluster of blocks, by the name that kernels call it.

#pragma once

#include <algorithm>

#include "machine.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return static_cast<unsigned>(host_gpu::cluster->blocks.size()); }
  unsigned block_rank() const { return static_cast<unsigned>(host_gpu::block->rank); }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  void barrier_arrive() const {
    ++host_gpu::self().cluster_syncs;
    host_gpu::pause();
  }
  void barrier_wait() const {
    const unsigned mine = host_gpu::self().cluster_syncs;
    host_gpu::wait_until("the cluster", [mine] {
      const auto arrived = [mine](const host_gpu::Thread& t) { return t.cluster_syncs >= mine; };
      const auto& blocks = host_gpu::cluster->blocks;
      return std::all_of(blocks.begin(), blocks.end(),
                         [&](const host_gpu::Block& b) { return std::all_of(b.threads.begin(), b.threads.end(), arrived); });
    });
  }
  template <typename T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    T* const theirs = host_gpu::in_block(mine, rank);
    char* const begin = reinterpret_cast<char*>(theirs);
    host_gpu::cluster->lent.push_back({&host_gpu::cluster->blocks[rank], {begin, begin + sizeof(T)}});
    return theirs;
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
