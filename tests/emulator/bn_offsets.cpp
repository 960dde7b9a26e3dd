// The offset at which bn_relu's kernels access the last element of a tensor that is too large to allocate.
#include "bn_relu_run.cuh"

using namespace fasttricks::cuda;

// The highest offset of any row of the last block, and the channel that it is taken to belong to.
__global__ void last_offset(BnShape s, BnTiling t, int64_t* out) {
  if (blockIdx.x + 1 != gridDim.x) return;
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    tile.for_rows<1>([&](int64_t at, auto) {
      const int64_t end = at + tile.valid - 1;
      if (end <= out[0]) return;
      out[0] = end;
      tile.for_slots([&](int j, int slot) {
        if (j + 1 == tile.valid) out[1] = tile.channel(slot);
      });
    });
  }
}

extern "C" __attribute__((visibility("default"))) void emu_bn_last_offset(int64_t n, int64_t c, int64_t hw,
                                                                          int64_t channels_last, int64_t max_blocks,
                                                                          int64_t* out) {
  const BnShape s = bn_shape(n, int(c), hw, channels_last != 0);
  const BnTiling t = bn_tile(s, max_blocks);
  out[0] = out[1] = -1;
  launch(&last_offset, dim3(unsigned(t.blocks)), kBnThreads, 0, nullptr, s, t, out);
}
