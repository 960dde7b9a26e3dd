// csrc/cuda/bn_relu_plan.h and the dividers of csrc/math/common.h for ctypes; see tests/test_cuda_waves.py.
#include "cuda/bn_relu_plan.h"

#include <iterator>

using namespace fasttricks;
using namespace fasttricks::cuda;

#pragma GCC visibility push(default)  // ctypes finds them
extern "C" {

// rows of a unit, tiles, units of a tile, blocks, the most parts of a tile; then the first unit of every block, and the
// block of every unit, if there is room for them
int64_t bn_tiling_of(int64_t n, int64_t c, int64_t hw, int64_t channels_last, int64_t most, int64_t* out,
                     int64_t room) {
  const BnTiling t = bn_tile(bn_shape(n, int(c), hw, channels_last != 0), most);
  const int64_t all[] = {t.ty(), t.tiles, t.units, t.blocks, t.parts};
  std::copy(std::begin(all), std::end(all), out);
  const int64_t needed = 5 + t.blocks + 1 + t.tiles * t.units;
  if (needed > room) return needed;
  for (int64_t b = 0; b <= t.blocks; ++b) out[5 + b] = t.first_unit(b);
  for (int64_t u = 0; u < t.tiles * t.units; ++u) out[5 + t.blocks + 1 + u] = t.block_of(u);
  return needed;
}

// Dynamic bytes of a block of the one-launch variant.
int64_t bn_slab_bytes_of(int64_t n, int64_t c, int64_t hw, int64_t channels_last, int64_t most, int64_t arrays) {
  return bn_slab_plan(bn_shape(n, int(c), hw, channels_last != 0), most, 2, int(arrays)).bytes;
}

int64_t bn_slab_static() { return kBnSlabStatic; }

int64_t divided(int64_t n, int64_t by) { return Divider(by).divide(uint32_t(n)); }
int64_t long_divided(int64_t n, int64_t by) { return LongDivider(by).divide(n); }
}
