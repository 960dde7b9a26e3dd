// C functions for ctypes: tests set the schedule of the emulated kernels and read the bytes that they moved.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

// settings: order, seed, poison, landing.
extern "C" __attribute__((visibility("default"))) void emu_schedule(const int64_t* settings) {
  emu::world.options = {emu::Order(settings[0]), unsigned(settings[1]), settings[2] != 0, emu::Landing(settings[3])};
}

// The meter's numbers since the last call; whether bank conflicts are counted from here on.
extern "C" __attribute__((visibility("default"))) void emu_meter(int64_t* meter, int64_t count_conflicts) {
  const emu::Meter& m = emu::world.meter;
  const int64_t all[] = {m.loaded,       m.stored, m.launches,   m.cooperative_launches,
                         m.first_loaded, m.blocks, m.wavefronts, m.least_wavefronts};
  std::copy(std::begin(all), std::end(all), meter);
  emu::world.meter = {};
  emu::world.count_conflicts = count_conflicts != 0;
}

// Whether cooperative launches are refused.
extern "C" __attribute__((visibility("default"))) void emu_refuse_cooperative(int64_t refuse) {
  emu::world.refuse_cooperative = refuse != 0;
}

// The shared memory of a multiprocessor that launch plans count on.
extern "C" __attribute__((visibility("default"))) void emu_shared_per_sm(int64_t bytes) {
  emu::world.shared_per_sm = bytes;
}
