// A stream of bits into or out of bytes, from any bit on: the ReLU mask of neighbouring threads may share a byte.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace fasttricks::cpu::FT_ISA {

// Bytes that are wholly this stream's are stored; the first and last are or-ed in, for their other bits may be another
// thread's (all bytes are zero beforehand; or-ing is the same in any order).
class BitWriter {
 public:
  FT_INLINE BitWriter(uint8_t* bytes, int64_t bit)
      : at_(bytes + bit / 8), held_(int(bit % 8)), bits_(0), shared_(bit % 8 != 0) {}
  FT_INLINE void push(uint32_t bits, int n) {  // n <= 16
    bits_ |= bits << held_;
    for (held_ += n; held_ >= 8; held_ -= 8, bits_ >>= 8) {
      if (shared_)
        __atomic_fetch_or(at_, uint8_t(bits_), __ATOMIC_RELAXED);
      else
        *at_ = uint8_t(bits_);
      shared_ = false;
      ++at_;
    }
  }
  FT_INLINE void finish() {
    if (held_ > 0) __atomic_fetch_or(at_, uint8_t(bits_), __ATOMIC_RELAXED);
  }

 private:
  uint8_t* at_;
  int held_;
  uint32_t bits_;
  bool shared_;
};

class BitReader {
 public:
  FT_INLINE BitReader(const uint8_t* bytes, int64_t bit) : at_(bytes + bit / 8), held_(0), bits_(0) {
    if (const int skip = int(bit % 8)) bits_ = uint32_t(*at_++) >> skip, held_ = 8 - skip;
  }
  FT_INLINE uint32_t pull(int n) {  // n <= 16; reads no byte before it is needed
    for (; held_ < n; held_ += 8) bits_ |= uint32_t(*at_++) << held_;
    const uint32_t out = bits_ & ((1u << n) - 1u);
    bits_ >>= n;
    held_ -= n;
    return out;
  }

 private:
  const uint8_t* at_;
  int held_;
  uint32_t bits_;
};

}  // namespace fasttricks::cpu::FT_ISA
