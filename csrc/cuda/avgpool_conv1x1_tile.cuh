// The product of a block: tiles of both operands in shared memory, two of each, so that the next ones arrive while the
// present ones are multiplied; on the tensor cores (mma.sync, sums in fp32) for 16-bit types, else a thread a 4 x 4
// patch.
#pragma once

#include "avgpool_conv1x1_load.cuh"

namespace fasttricks::cuda {

// Where element `index` of a line of a tile lies in shared memory, lines being kLength long. The tensor cores read
// eight lines at once, 16 bytes of each: vectors are permuted within their lines so that these fall into different
// banks. Lines of the other types are longer by a vector.
template <typename T, int kLength>
struct AvgPoolLines {
  static constexpr int kV = kAvgPoolVector<T>, kVectors = kLength / kV;
  static constexpr int kLine = sizeof(T) == 2 ? kLength : kLength + kV;
  static constexpr int kOrders = kVectors < 8 ? kVectors : 8;  // lines, or pairs or fours of them, have one of these
  FT_DEVICE static int place(int line, int index) {
    if constexpr (sizeof(T) != 2) return line * kLine + index;
    const int permuted = line / (8 / kOrders) % kOrders;
    return line * kLine + ((index / kV) ^ permuted) * kV + index % kV;
  }
};

// One operand, kSide rows or columns: kInnerIsDepth says which index of the loader's matrix is the depth, kPixelIsOuter
// which one is the pixel.
template <typename T, int kSide, bool kInnerIsDepth>
struct AvgPoolOperandTile : AvgPoolLines<T, kInnerIsDepth ? AvgPoolTile<sizeof(T)>::kK : kSide> {
  static constexpr int kOuter = kInnerIsDepth ? kSide : AvgPoolTile<sizeof(T)>::kK;
  static constexpr int kInner = kInnerIsDepth ? AvgPoolTile<sizeof(T)>::kK : kSide;
  static constexpr int kSize = kOuter * AvgPoolLines<T, kInner>::kLine;  // elements of a tile
  static constexpr int kVectors = kOuter * kInner / kAvgPoolVector<T>;
  static_assert(kAvgPoolThreads % kInner == 0);
};

template <typename T, typename Loader, int kSide, bool kInnerIsDepth, bool kPixelIsOuter>
struct AvgPoolOperand : AvgPoolOperandTile<T, kSide, kInnerIsDepth> {
  using Tile = AvgPoolOperandTile<T, kSide, kInnerIsDepth>;
  using Tile::kInner, Tile::kOuter, Tile::place;
  static constexpr int kV = kAvgPoolVector<T>;
  static constexpr int kSlots = Tile::kVectors / kAvgPoolThreads;  // vectors of a thread
  // Whether states are kept from step to step: not where the pixels change, nor where registers are too few.
  static constexpr bool kKeepsStates = kPixelIsOuter && kInnerIsDepth;
  static_assert(kSlots >= 1 && kSlots <= 2);

  using Raw = typename Loader::Raw;
  const Loader& loader;
  int first, end;  // of the index that is not the depth, here and in all
  int depth;
  typename Loader::State states[kSlots];

  FT_DEVICE AvgPoolOperand(const Loader& loader, int first, int end, int depth)
      : loader(loader), first(first), end(end), depth(depth) {
    if constexpr (kKeepsStates)
#pragma unroll
      for (int i = 0; i < kSlots; ++i) states[i] = loader.state(first + outer(i));
  }
  FT_DEVICE static int slot(int i) { return int(threadIdx.x) + i * kAvgPoolThreads; }
  FT_DEVICE static int outer(int i) { return slot(i) / (kInner / kV); }
  FT_DEVICE static int inner(int i) { return slot(i) % (kInner / kV) * kV; }
  FT_DEVICE int outer_at(int k) const { return kInnerIsDepth ? first : k; }
  FT_DEVICE int inner_at(int k) const { return kInnerIsDepth ? k : first; }
  FT_DEVICE int outer_end() const { return kInnerIsDepth ? end : depth; }
  FT_DEVICE int inner_end() const { return kInnerIsDepth ? depth : end; }

  // Nothing is copied past the registers.
  FT_DEVICE void start(T*, int) const {}
  FT_DEVICE Raw fetch(int i, int k) {
    if (!loader.wide) return {};
    const int at_outer = outer_at(k) + outer(i), at_inner = inner_at(k) + inner(i);
    if constexpr (!kKeepsStates) states[i] = loader.state(kPixelIsOuter ? at_outer : at_inner);
    if constexpr (kPixelIsOuter)
      return loader.fetch(states[i], at_inner, inner_end(), at_outer, outer_end());
    else
      return loader.fetch(states[i], at_outer, outer_end(), at_inner, inner_end());
  }
  FT_DEVICE void put(int i, int k, const Raw& raw, T* tile) const {
    if (!loader.wide) return put_singly(i, k, tile);
    T v[kV];
    loader.settle(states[i], raw, v);
    uint4 u;
    memcpy(&u, v, 16);
    store_shared(reinterpret_cast<uint4*>(tile + place(outer(i), inner(i))), u);
  }

 private:
  // As many elements as a vector has, of neighbours in memory by neighbouring threads.
  FT_DEVICE void put_singly(int i, int k, T* tile) const {
    constexpr int kLines = kAvgPoolThreads / kInner;
    const int line = i * kV * kLines + int(threadIdx.x) / kInner, index = int(threadIdx.x) % kInner;
    const int at_inner = inner_at(k) + index;
    [[maybe_unused]] typename Loader::Single pixel;
    if constexpr (!kPixelIsOuter) pixel = loader.single(at_inner);
#pragma unroll 4
    for (int j = 0; j < kV; ++j) {
      const int at_outer = outer_at(k) + line + j * kLines;
      T value(0);
      if (at_outer < outer_end() && at_inner < inner_end()) {
        if constexpr (kPixelIsOuter)
          value = loader.one(loader.single(at_outer), at_inner);
        else
          value = loader.one(pixel, at_outer);
      }
      tile[place(line + j * kLines, index)] = value;
    }
  }
};

template <typename T, int kSide, bool kInnerIsDepth, bool kPixelIsOuter>
struct AvgPoolOperand<T, RowLoader<T>, kSide, kInnerIsDepth, kPixelIsOuter>
    : AvgPoolOperandTile<T, kSide, kInnerIsDepth> {
  using Tile = AvgPoolOperandTile<T, kSide, kInnerIsDepth>;
  using Tile::kInner, Tile::kOuter, Tile::place;
  static constexpr int kV = kAvgPoolVector<T>;
  static constexpr int kSlots = 0;  // of vectors that go through registers
  struct Raw {};

  const RowLoader<T>& loader;
  int first;  // of the index that is not the depth

  FT_DEVICE AvgPoolOperand(const RowLoader<T>& loader, int first, int, int) : loader(loader), first(first) {}
  FT_DEVICE void start(T* tile, int k) const {
    const int outer0 = kInnerIsDepth ? first : k, inner0 = kInnerIsDepth ? k : first;
    if (loader.wide) {
      static_assert(Tile::kVectors % kAvgPoolThreads == 0);
#pragma unroll
      for (int k = 0; k < Tile::kVectors / kAvgPoolThreads; ++k) {  // a number of times that the compiler knows
        const int i = int(threadIdx.x) + k * kAvgPoolThreads;
        const int outer = i / (kInner / kV), inner = i % (kInner / kV) * kV;
        loader.copy(tile + place(outer, inner), outer0 + outer, inner0 + inner);
      }
    } else {
#pragma unroll 1
      for (int i = int(threadIdx.x); i < kOuter * kInner; i += kAvgPoolThreads)
        tile[place(i / kInner, i % kInner)] = loader.one(outer0 + i / kInner, inner0 + i % kInner);
    }
  }
};

// Bytes of dynamic shared memory: two tiles of both operands; the result's tile afterwards.
template <typename T>
constexpr int kAvgPoolSharedBytes = 2 * int(sizeof(T)) * (AvgPoolTile<sizeof(T)>::kM + AvgPoolTile<sizeof(T)>::kN) *
                                    AvgPoolLines<T, AvgPoolTile<sizeof(T)>::kK>::kLine;

// The sums of a thread on the tensor cores: 8 warps, each 32 x 32 of the tile, 2 x 4 or 4 x 2 of them.
template <typename T, typename A, typename B>
struct AvgPoolSums {
  using Acc = float;
  static constexpr int kAcross = (B::kInner == AvgPoolTile<2>::kK ? B::kOuter : B::kInner) / 32;  // warps side by side
  static constexpr int kSteps = AvgPoolTile<2>::kK / 16;
  float sums[2][4][4] = {};

  FT_DEVICE static int lane() { return int(threadIdx.x) % 32; }
  FT_DEVICE static int row0() { return int(threadIdx.x) / 32 / kAcross * 32; }
  FT_DEVICE static int column0() { return int(threadIdx.x) / 32 % kAcross * 32; }

  // value(column): what the sums of a column start from.
  template <typename Value>
  FT_DEVICE void start(Value value) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float v = value(column0() + j * 8 + lane() % 4 * 2 + r);
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[i][j][r] = sums[i][j][r + 2] = v;
      }
  }

  FT_DEVICE void multiply(const T* a, const T* b, int step) {
    uint32_t right[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) load_side<B, true>(right[j], b, column0(), j, step);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t left[4];
      load_side<A, false>(left, a, row0(), i, step);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        multiply_add<T>(sums[i][j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]});
    }
  }
  // 16 rows (columns) of an operand from side + part * 16 on, 16 of its depth from step * 16 on. Lines 8 further have
  // the same order of vectors, and steps of 16 along a line are one bit of the place: a lane needs two addresses.
  template <typename Operand, bool kColumns>
  FT_DEVICE static void load_side(uint32_t (&r)[4], const T* tile, int side, int part, int step) {
    const int l = lane(), low = kColumns ? l / 16 * 8 + l % 8 : l % 16, high = (kColumns ? l / 8 % 2 : l / 16) * 8;
    if constexpr (Operand::kInner == AvgPoolTile<2>::kK) {
      load_matrices<false>(r, tile + (side + part * 16) * Operand::kLine + (Operand::place(low, high) ^ step * 16));
    } else {
      // transposed: a lane names a line of the depth
      const int line = kColumns ? l % 16 : l / 16 * 8 + l % 8, index = (kColumns ? l / 16 : l / 8 % 2) * 8;
      load_matrices<true>(r, tile + step * 16 * Operand::kLine + (Operand::place(line, side + index) ^ part * 16));
    }
  }

  FT_DEVICE void fold() const {}

  // use(row, column, value) of the tile.
  template <typename Use>
  FT_DEVICE void for_each(Use use) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          use(row0() + i * 16 + lane() / 4 + r / 2 * 8, column0() + j * 8 + lane() % 4 * 2 + r % 2, sums[i][j][r]);
  }
  // use(row, column, values): four neighbours in a row at a time. Two lanes have two columns each of two rows: one
  // takes the first row, the other the second.
  template <typename Use>
  FT_DEVICE void for_fours(Use use) const {
    const bool odd = lane() % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const d = sums[i][j];
        const float give0 = odd ? d[0] : d[2], give1 = odd ? d[1] : d[3];
        const float got0 = __shfl_xor_sync(kAllLanes, give0, 1), got1 = __shfl_xor_sync(kAllLanes, give1, 1);
        const float v[4] = {odd ? got0 : d[0], odd ? got1 : d[1], odd ? d[2] : got0, odd ? d[3] : got1};
        use(row0() + i * 16 + lane() / 4 + (odd ? 8 : 0), column0() + j * 8 + lane() % 4 / 2 * 4, v);
      }
  }
};

// The sums of a thread on the general cores: a patch of 4 x 4. They are summed up in parts, as the types have no wider
// one to sum in.
template <typename T, typename A, typename B>
struct AvgPoolPatch {
  using Acc = acc_t<T>;
  static constexpr int kSteps = 2;
  Acc sums[4][4] = {}, totals[4][4] = {};

  FT_DEVICE static int row0() { return int(threadIdx.x) / 16 * 4; }
  FT_DEVICE static int column0() { return int(threadIdx.x) % 16 * 4; }

  template <typename Value>
  FT_DEVICE void start(Value value) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Acc v = value(column0() + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i][j] = v;
    }
  }

  FT_DEVICE void multiply(const T* a, const T* b, int step) {
    constexpr int kDepth = AvgPoolTile<sizeof(T)>::kK / kSteps;
#pragma unroll 4  // all at once, their loads would take too many registers
    for (int k = step * kDepth; k < (step + 1) * kDepth; ++k) {
      T left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        constexpr int kK = AvgPoolTile<sizeof(T)>::kK;
        left[i] = load_shared(a + (A::kInner == kK ? A::place(row0() + i, k) : A::place(k, row0() + i)));
        right[i] = load_shared(b + (B::kInner == kK ? B::place(column0() + i, k) : B::place(k, column0() + i)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fma(left[i], right[j], sums[i][j]);
    }
  }
  FT_DEVICE void fold() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        totals[i][j] += sums[i][j];
        sums[i][j] = 0;
      }
  }

  // After fold.
  template <typename Use>
  FT_DEVICE void for_each(Use use) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) use(row0() + i, column0() + j, totals[i][j]);
  }
  template <typename Use>
  FT_DEVICE void for_fours(Use use) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) use(row0() + i, column0(), totals[i]);
  }
};

template <typename T, typename A, typename B>
using AvgPoolSumsOf = std::conditional_t<sizeof(T) == 2, AvgPoolSums<T, A, B>, AvgPoolPatch<T, A, B>>;

// Vector kSlot of a thread, if it has so many.
template <int kSlot, typename Operand>
FT_DEVICE typename Operand::Raw fetch_slot(Operand& operand, int k) {
  if constexpr (kSlot < Operand::kSlots)
    return operand.fetch(kSlot, k);
  else
    return {};
}
template <int kSlot, typename T, typename Operand>
FT_DEVICE void put_slot(const Operand& operand, int k, const typename Operand::Raw& raw, T* tile) {
  if constexpr (kSlot < Operand::kSlots) operand.put(kSlot, k, raw, tile);
}
template <typename T, typename Operand>
FT_DEVICE void fill_slots(Operand& operand, int k, T* tile) {
  put_slot<0>(operand, k, fetch_slot<0>(operand, k), tile);
  put_slot<1>(operand, k, fetch_slot<1>(operand, k), tile);
}

constexpr int kAvgPoolFold = 8;  // tiles of the depth whose products make a part

// sums += a[., begin .. end) * b[., begin .. end), over the depth; begin is a multiple of the tile's depth. On return
// the shared memory is free.
template <typename T, typename A, typename B, typename Sums>
FT_DEVICE void multiply_tiles(A& a, B& b, int begin, int end, unsigned char* memory, Sums& sums) {
  constexpr int kDepth = AvgPoolTile<sizeof(T)>::kK;
  T* const a_tiles = reinterpret_cast<T*>(memory);
  T* const b_tiles = a_tiles + 2 * A::kSize;
  const auto a_tile = [&](int k) { return a_tiles + (k / kDepth & 1) * A::kSize; };
  const auto b_tile = [&](int k) { return b_tiles + (k / kDepth & 1) * B::kSize; };

  a.start(a_tile(begin), begin);
  b.start(b_tile(begin), begin);
  copy_commit();
  fill_slots(a, begin, a_tile(begin));
  fill_slots(b, begin, b_tile(begin));
  copy_wait<0>();
  __syncthreads();

#pragma unroll 1
  for (int k = begin; k < end; k += kDepth) {
    const int next = k + kDepth;
    const bool more = next < end;
    if (more) {
      a.start(a_tile(next), next);
      b.start(b_tile(next), next);
      copy_commit();
    }
    // a vector of each operand is under way while half of the tile is multiplied
    const auto half = [&](auto step) {
      constexpr int kStep = decltype(step)::value;
      if (!more) return sums.multiply(a_tile(k), b_tile(k), kStep);
      const auto raw_a = fetch_slot<kStep>(a, next);
      const auto raw_b = fetch_slot<kStep>(b, next);
      sums.multiply(a_tile(k), b_tile(k), kStep);
      put_slot<kStep>(a, next, raw_a, a_tile(next));
      put_slot<kStep>(b, next, raw_b, b_tile(next));
    };
    half(std::integral_constant<int, 0>());
    half(std::integral_constant<int, 1>());
    if (k / kDepth % kAvgPoolFold == kAvgPoolFold - 1) sums.fold();
    copy_wait<0>();
    __syncthreads();
  }
  sums.fold();
}

// All of a's depth to shared memory, tile after tile. A thread has one vector of a tile; two are under way.
template <typename T, typename A>
FT_DEVICE void fill_slab(A& a, int depth, T* slab) {
  static_assert(A::kSlots == 1);
  constexpr int kDepth = AvgPoolTile<sizeof(T)>::kK;
#pragma unroll 1
  for (int k = 0; k < depth; k += 2 * kDepth) {
    const bool two = k + kDepth < depth;
    const auto first = a.fetch(0, k), second = a.fetch(0, two ? k + kDepth : k);
    T* const tile = slab + k / kDepth * A::kSize;
    a.put(0, k, first, tile);
    if (two) a.put(0, k + kDepth, second, tile + A::kSize);
  }
}

// sums += slab * b over the depth, b through two tiles at `tiles`. On return these are free.
template <typename T, typename A, typename B, typename Sums>
FT_DEVICE void multiply_slab(const T* slab, B& b, int depth, T* tiles, Sums& sums) {
  constexpr int kDepth = AvgPoolTile<sizeof(T)>::kK;
  b.start(tiles, 0);
  copy_commit();
#pragma unroll 1
  for (int step = 0; step * kDepth < depth; ++step) {
    copy_wait<0>();
    __syncthreads();  // this step's tile is there, and all have done with the other one
    if ((step + 1) * kDepth < depth) {
      b.start(tiles + (step + 1) % 2 * B::kSize, (step + 1) * kDepth);
      copy_commit();
    }
#pragma unroll
    for (int half = 0; half < Sums::kSteps; ++half)
      sums.multiply(slab + step * A::kSize, tiles + step % 2 * B::kSize, half);
  }
  __syncthreads();
}

}  // namespace fasttricks::cuda
