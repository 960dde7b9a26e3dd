// Writes or reads a stream of bits from any bit on: the ReLU masks of neighbouring slabs may share a byte.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace fasttricks::cpu::FT_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits.h moves several bytes at once");

// The bytes must be zero at the start. Full bytes are stored. The first and last byte are OR-ed, atomically if another
// thread may share them, so that the order of the threads does not matter.
class BitWriter {
 public:
  FT_INLINE BitWriter(uint8_t* bytes, int64_t bit, bool front_is_shared)
      : at_(bytes + bit / 8), held_(int(bit % 8)), bits_(0), atomic_(front_is_shared) {
    if (held_ > 0 && !atomic_) bits_ = *at_;
  }
  FT_INLINE void push(uint32_t bits, int n) {  // n <= 16
    bits_ |= uint64_t(bits) << held_;
    held_ += n;
    if (held_ < 32) return;
    if (atomic_) {
      first();
      if (held_ < 32) return;
    }
    const uint32_t whole = uint32_t(bits_);
    memcpy(at_, &whole, 4);
    at_ += 4, held_ -= 32, bits_ >>= 32;
  }
  FT_INLINE void finish(bool back_is_shared) {
    if (atomic_ && held_ >= 8) first();
    for (; held_ >= 8; held_ -= 8, bits_ >>= 8) *at_++ = uint8_t(bits_);
    if (held_ == 0) return;
    if (atomic_ || back_is_shared)
      __atomic_fetch_or(at_, uint8_t(bits_), __ATOMIC_RELAXED);
    else
      *at_ |= uint8_t(bits_);
  }

 private:
  // Another thread may still OR its bits into the first byte, so it is not stored.
  FT_INLINE void first() {
    __atomic_fetch_or(at_, uint8_t(bits_), __ATOMIC_RELAXED);
    ++at_, held_ -= 8, bits_ >>= 8;
    atomic_ = false;
  }

  uint8_t* at_;
  int held_;
  uint64_t bits_;
  bool atomic_;
};

class BitReader {
 public:
  // end: past the last byte.
  FT_INLINE BitReader(const uint8_t* bytes, int64_t bit, const uint8_t* end) : bytes_(bytes), bit_(bit), end_(end) {}
  FT_INLINE uint32_t pull(int n) {  // n <= 16
    const uint8_t* at = bytes_ + (bit_ >> 3);
    uint32_t bits = 0;
    if (end_ - at >= 4)
      memcpy(&bits, at, 4);
    else
      for (int i = 0; at + i < end_; ++i) bits |= uint32_t(at[i]) << (8 * i);
    bits = (bits >> (bit_ & 7)) & ((1u << n) - 1u);
    bit_ += n;
    return bits;
  }

 private:
  const uint8_t* bytes_;
  int64_t bit_;
  const uint8_t* end_;
};

}  // namespace fasttricks::cpu::FT_ISA
