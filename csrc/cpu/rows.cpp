// The row sweeps, compiled for every instruction set and chosen at run time.

#include "rows.h"

#include <atomic>
#include <cstring>
#include <limits>

#define TRAPO_INLINE static inline __attribute__((always_inline))

#define TRAPO_SET portable
#define TRAPO_WIDTH 4
#include "simd.h"
#include "rows.inl"
#undef TRAPO_SET
#undef TRAPO_WIDTH

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TRAPO_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define TRAPO_SET avx2
#define TRAPO_WIDTH 8
#include "simd.h"
#include "rows.inl"
#undef TRAPO_SET
#undef TRAPO_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,fma")
#endif
#define TRAPO_SET avx512
#define TRAPO_WIDTH 16
#include "simd.h"
#include "rows.inl"
#undef TRAPO_SET
#undef TRAPO_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace trapo {
namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const RowSweeps* sweeps;
};

const InstructionSet kSets[] = {
#if defined(TRAPO_X86)
    {"avx512", [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }, &avx512::kSweeps},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &avx2::kSweeps},
#endif
    {"portable", [] { return true; }, &portable::kSweeps},
};

const InstructionSet* widest() {
  for (const InstructionSet& set : kSets) {
    if (set.supported()) return &set;
  }
  return nullptr;  // never: the portable set comes last
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{widest()};
  return set;
}

}  // namespace

const RowSweeps& row_sweeps() { return *chosen().load()->sweeps; }

const char* instruction_set() { return chosen().load()->name; }

bool use_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.supported()) {
      chosen() = &set;
      return true;
    }
  }
  return false;
}

}  // namespace trapo
