// C functions for ctypes: tests set the schedule of the emulated kernels and read the bytes that they moved.
#include <cuda_runtime.h>

// settings: order, seed, poison, landing.
extern "C" __attribute__((visibility("default"))) void emu_schedule(const int64_t* settings) {
  emu::world.options = {emu::Order(settings[0]), unsigned(settings[1]), settings[2] != 0, emu::Landing(settings[3])};
}

// Bytes loaded, bytes stored, launches, cooperative launches since the last call.
extern "C" __attribute__((visibility("default"))) void emu_meter(int64_t* meter) {
  meter[0] = emu::world.meter.loaded;
  meter[1] = emu::world.meter.stored;
  meter[2] = emu::world.meter.launches;
  meter[3] = emu::world.meter.cooperative_launches;
  emu::world.meter = {};
}

// The shared memory of a multiprocessor that launch plans count on.
extern "C" __attribute__((visibility("default"))) void emu_shared_per_sm(int64_t bytes) {
  emu::world.shared_per_sm = bytes;
}
