// What a warp does together: shuffles, votes, mma.sync, ldmatrix; and cp.async.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

namespace emu {

// The one warp primitive: every lane of `mask` posts `arg`; the last to arrive evaluates for all.
EMU_UNSEEN inline void collective(unsigned mask, int op, void* arg, void (*evaluate)(Fiber** lanes, unsigned mask),
                                  [[maybe_unused]] bool orders_memory, const char* file, int line) {
  Fiber& f = *world.current;
  Fiber** lanes = &f.block->fibers[size_t(f.warp) * 32];
  const int threads = int(world.block.x * world.block.y * world.block.z), width = std::min(32, threads - f.warp * 32);
  mask &= width == 32 ? ~0u : (1u << width) - 1;  // lanes that never existed are not waited for
  if (!(mask >> f.lane & 1)) fail("the calling lane is not in the mask");
  meet(f);
  f.op = op;
  f.mask = mask;
  f.arg = arg;
  f.file = file;
  f.line = line;
  f.state = State::warp_op;
  WarpSync& s = f.block->warps[f.warp][std::countr_zero(mask)];
  [[maybe_unused]] char* order = &s.order[s.generation & 1];
  EMU_TSAN(if (orders_memory) __tsan_release(order);)
  bool all = true;
  for (int l = 0; l < 32 && all; ++l) {
    if (!(mask >> l & 1)) continue;
    if (lanes[l]->state == State::done) fail("a lane named in the mask has returned");
    all = lanes[l]->state == State::warp_op && lanes[l]->mask == mask;
    if (all && lanes[l]->op != op) fail("lanes of one mask meet in different warp operations");
  }
  if (all) {
    EMU_TSAN(AnnotateIgnoreReadsBegin(file, line); AnnotateIgnoreWritesBegin(file, line);)
    if (evaluate) evaluate(lanes, mask);
    EMU_TSAN(AnnotateIgnoreWritesEnd(file, line); AnnotateIgnoreReadsEnd(file, line);)
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) lanes[l]->state = State::ready;
    ++s.generation;
    if (world.options.order == Order::random) suspend();  // let another lane go first
  } else {
    suspend();
  }
  EMU_TSAN(if (orders_memory) __tsan_acquire(order);)
}

enum WarpOp { kSyncWarp, kShuffle, kShuffleXor, kShuffleDown, kShuffleUp, kBallot, kMma, kLdmatrix };

struct Exchange {
  unsigned char bytes[16];
  int source;
};
template <class T>
EMU_UNSEEN T shuffle_from(unsigned mask, T value, int source, int op, const char* file, int line) {
  static_assert(sizeof(T) <= 16);
  Exchange e;
  std::memcpy(e.bytes, &value, sizeof value);
  e.source = source;
  collective(
      mask, op, &e,
      +[](Fiber** lanes, unsigned m) {
        Exchange in[32];
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) in[l] = *static_cast<Exchange*>(lanes[l]->arg);
        for (int l = 0; l < 32; ++l) {
          if (!(m >> l & 1)) continue;
          unsigned char* out = static_cast<Exchange*>(lanes[l]->arg)->bytes;
          if (m >> in[l].source & 1)
            std::memcpy(out, in[in[l].source].bytes, 16);
          else
            std::memset(out, 0xFF, 16);  // a lane that takes no part: undefined on the device, garbage here
        }
      },
      false, file, line);
  std::memcpy(&value, e.bytes, sizeof value);
  return value;
}

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
  float (*to_float)(uint16_t);
};
// mma.sync.m16n8k16.row.col with 16-bit inputs and fp32 accumulation.
EMU_UNSEEN inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float (*to_float)(uint16_t), const char* file = __builtin_FILE(),
                                    int line = __builtin_LINE()) {
  MmaArgument arg{d, a, b, to_float};
  collective(
      ~0u, kMma, &arg,
      +[](Fiber** lanes, unsigned mask) {
        if (mask != ~0u) fail("mma.sync needs a full warp");
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
          const auto& p = *static_cast<MmaArgument*>(lanes[l]->arg);
          const int g = l / 4, t = l % 4;
          for (int h = 0; h < 2; ++h) {
            for (int i = 0; i < 4; ++i)
              A[g + 8 * (i & 1)][t * 2 + h + 8 * (i >> 1)] = p.to_float(uint16_t(p.a[i] >> (16 * h)));
            for (int i = 0; i < 2; ++i) B[t * 2 + h + 8 * i][g] = p.to_float(uint16_t(p.b[i] >> (16 * h)));
          }
        }
        for (int l = 0; l < 32; ++l) {
          const auto& p = *static_cast<MmaArgument*>(lanes[l]->arg);
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i) {
            float s = 0;
            for (int k = 0; k < 16; ++k) s += A[g + 8 * (i >> 1)][k] * B[k][t * 2 + (i & 1)];
            p.d[i] += s;
          }
        }
      },
      false, file, line);
}

struct LdmatrixArgument {
  uint32_t* r;
  const void* row;
  bool transpose;
  const void* all[32] = {};  // every lane's row
};
// ldmatrix.x4 (.trans): four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
EMU_UNSEEN inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transpose,
                                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) & 15) fail("ldmatrix: a row address is not 16-byte aligned");
  count_shared(row, 16);
  LdmatrixArgument arg{r, row, transpose, {}};
  collective(
      ~0u, kLdmatrix, &arg,
      +[](Fiber** lanes, unsigned mask) {
        if (mask != ~0u) fail("ldmatrix needs a full warp");
        for (int l = 0; l < 32; ++l)
          for (int k = 0; k < 32; ++k)
            static_cast<LdmatrixArgument*>(lanes[l]->arg)->all[k] = static_cast<LdmatrixArgument*>(lanes[k]->arg)->row;
        for (int i = 0; i < 4; ++i) {
          uint16_t m[8][8];
          for (int k = 0; k < 8; ++k) std::memcpy(m[k], static_cast<LdmatrixArgument*>(lanes[i * 8 + k]->arg)->row, 16);
          for (int l = 0; l < 32; ++l) {
            auto& p = *static_cast<LdmatrixArgument*>(lanes[l]->arg);
            const int g = l / 4, t = l % 4 * 2;
            const uint16_t low = p.transpose ? m[t][g] : m[g][t], high = p.transpose ? m[t + 1][g] : m[g][t + 1];
            p.r[i] = low | uint32_t(high) << 16;
          }
        }
      },
      false, file, line);
  // The reads inside the collective are not recorded: each lane has read the rows that its values come from.
  EMU_TSAN(const int lane = world.current->lane;
           for (int i = 0; i < 4; ++i) for (int h = 0; h < (transpose ? 2 : 1); ++h) {
             const int from = transpose ? lane % 4 * 2 + h : lane / 4;
             __tsan_read_range(const_cast<void*>(arg.all[i * 8 + from]), 16);
           })
}

// cp.async of 16 bytes of which the first `bytes` are read and the rest are zeros. The data lands late (at the wait),
// early (at once) or at random, so that a forgotten wait and a buffer overwritten too soon both show.
EMU_UNSEEN inline void cp_async16(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) fail("cp.async: misaligned");
  PendingCopy p{to, {}};
  std::memset(p.bytes, 0, 16);
  std::memcpy(p.bytes, from, size_t(bytes));
  if (bytes) count_load(from, size_t(bytes));
  count_shared(to, 16);
  EMU_TSAN(__tsan_read_range(const_cast<void*>(from), size_t(bytes)); __tsan_write_range(to, 16);)
  const bool now = world.options.order == Order::random ? draw() & 1 : world.options.landing == Landing::early;
  if (now) std::memcpy(to, p.bytes, 16);
  world.current->copies.back().push_back(p);
}
EMU_UNSEEN inline void cp_async_commit() { world.current->copies.emplace_back(); }
EMU_UNSEEN inline void cp_async_wait(int pending) {
  auto& groups = world.current->copies;
  while (int(groups.size()) - 1 > pending) {
    for (const PendingCopy& p : groups.front()) std::memcpy(p.to, p.bytes, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace emu
