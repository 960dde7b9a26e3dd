// csrc/cuda/sgd_plan.h for ctypes; see tests/test_sgd_plan.py.
#include "cuda/sgd_plan.h"

using namespace fasttricks::cuda;

#pragma GCC visibility push(default)  // ctypes finds them
extern "C" {

int64_t sgd_block() { return kSgdBlock; }
int64_t sgd_piece() { return kSgdPiece; }

int64_t sgd_find_first(const int64_t* firsts, int64_t n, int64_t at) { return sgd_find(firsts, n, at); }

// groups, pointers, counts, first_blocks, tensors, bytes
void sgd_offsets(int64_t entries, int64_t groups, int64_t pointers, int64_t* out) {
  const SgdLayout at = sgd_layout(entries, groups, pointers);
  const int64_t all[] = {at.groups, at.pointers, at.counts, at.first_blocks, at.tensors, at.bytes};
  std::copy(std::begin(all), std::end(all), out);
}

// Writes for each launch the counts of its entries, groups, blocks and bytes, then its entries (5 numbers each) and the
// starts of its groups. Returns how many numbers there are, and writes nothing if they do not fit.
int64_t sgd_plan_of(const int64_t* numels, const int64_t* keys, int64_t n, int64_t pointers, int64_t limit,
                    int64_t* out, int64_t room) {
  std::vector<SgdTensor> tensors(n);
  for (int64_t i = 0; i < n; ++i) tensors[i] = {numels[i], keys[i]};
  std::vector<int64_t> all;
  for (const SgdLaunch& l : sgd_plan(tensors, pointers, limit)) {
    all.insert(all.end(), {int64_t(l.entries.size()), int64_t(l.group_starts.size()), l.blocks, l.bytes});
    for (const SgdEntry& e : l.entries)
      all.insert(all.end(), {e.tensor, e.begin, e.count, e.first_block, int64_t(e.last)});
    all.insert(all.end(), l.group_starts.begin(), l.group_starts.end());
  }
  if (int64_t(all.size()) <= room) std::copy(all.begin(), all.end(), out);
  return int64_t(all.size());
}
}
