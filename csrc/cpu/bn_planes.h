// NCHW: the order in which planes are computed. Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once per
// ISA.
#pragma once

#include "cpu/bn_relu.h"
#include "cpu/vec.h"

namespace fasttricks::cpu::FT_ISA {

// How many channels are computed together, row by row. Their planes lie next to each other in memory.
constexpr int64_t kMostTogether = 16;
FT_INLINE int64_t channels_together(const BnArguments& a) {
  const int64_t channels = kAhead / a.inner;
  return channels < 1 ? 1 : channels < kMostTogether ? channels : kMostTogether;
}

// The distance from a plane of row r to the plane of the same channel `rows` rows later or, after the last row,
// to that of the channel that is computed next.
FT_INLINE int64_t planes_ahead(const BnArguments& a, int64_t r, int64_t rows) {
  if (rows > a.rows) rows = a.rows;
  return (r + rows < a.rows ? rows * a.channels : channels_together(a) + (rows - a.rows) * a.channels) * a.inner;
}

// Channels [begin, end), at most kMostTogether. Each: what a pass knows of one of them.
template <class Each>
struct ChannelGroup {
  int64_t begin, end;
  Each of[kMostTogether];
  template <class Make>
  ChannelGroup(int64_t begin, int64_t end, Make make) : begin(begin), end(end) {
    for (int64_t c = begin; c < end; ++c) of[c - begin] = make(c);
  }
  // Calls f(one, r, c, ahead) for every plane, row by row; memory is prefetched `ahead`, in the next row.
  template <class F>
  FT_INLINE void planes(const BnArguments& a, F f) {
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t ahead = planes_ahead(a, r, 1);
      for (int64_t c = begin; c < end; ++c) f(of[c - begin], r, c, ahead);
    }
  }
};

}  // namespace fasttricks::cpu::FT_ISA
