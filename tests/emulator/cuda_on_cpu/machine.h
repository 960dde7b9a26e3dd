// The machine: blocks of fibers, barriers, shared memory, launches, the traffic meter.
//
// A plain launch runs one block at a time; a cooperative launch keeps all its blocks alive and has a grid barrier. The
// schedule is greedy on purpose: one warp runs as far as it can before the next starts, so that a missing barrier lets
// it run ahead by whole iterations. One OS thread.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

enum class Order { ascending, descending, random };
enum class Landing {
  late,
  early
};  // when cp.async data arrives: at the wait, or at once; Order::random draws per copy
struct Options {
  Order order = Order::ascending;
  unsigned seed = 1;
  bool poison = true;  // shared memory starts as NaN; false: as zeros (poison can mask a fault whose right value is it)
  Landing landing = Landing::late;
};
// What the kernels moved through the helpers of csrc/cuda/intrinsics.cuh. first_loaded: of the 32-byte sectors that the
// launch had not touched since its start or its last grid barrier, which a cache that keeps everything in between would
// load from DRAM. blocks: of all launches.
// wavefronts: what the accesses to shared memory take; least: what they would take without bank conflicts.
struct Meter {
  int64_t loaded = 0, stored = 0, launches = 0, cooperative_launches = 0, first_loaded = 0, blocks = 0, wavefronts = 0,
          least_wavefronts = 0;
};
// One thread's part in an access of its warp: threads of a warp that have met as often (`meetings`), and made as many
// accesses since, make it together.
struct SharedAccess {
  int warp, lane;
  unsigned meetings, index;
  uintptr_t address;
  int bytes;
  auto key() const { return std::tuple(warp, meetings, index, lane); }
};
struct Sectors {
  uint64_t touched[2] = {};  // a bit for each 32 bytes of 4096
};

enum class State : uint8_t { ready, barrier, grid_barrier, warp_op, done };
struct Block;
struct PendingCopy {
  void* to;
  unsigned char bytes[16];
};
struct Fiber : Context {
  Block* block = nullptr;
  uint3 tid{};
  int lane = 0, warp = 0;
  State state = State::done;
  const char* file = "";  // where it waits
  int line = 0;
  int op = 0;  // the warp operation it waits in
  unsigned mask = 0;
  void* arg = nullptr;
  std::vector<std::vector<PendingCopy>> copies;  // cp.async groups; the last one is open
  unsigned meetings = 0, accesses = 0;           // barriers and warp operations; accesses to shared memory since
};
struct WarpSync {
  unsigned generation = 0;
  char order[2] = {0, 0};
};
struct SharedArray {
  const void* site;
  void* data;
};
constexpr int kMaxSharedArrays = 16, kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
struct Block {
  uint3 id{};
  std::vector<Fiber*> fibers;
  int waiting = 0, at_grid = 0, done = 0;
  unsigned phase = 0;
  char order[2] = {0, 0};
  int votes[2] = {0, 0};
  WarpSync warps[32][32];  // by warp and lowest lane of the mask
  SharedArray shared[kMaxSharedArrays];
  int shared_count = 0;
  std::vector<SharedAccess> accesses;
};
// Takes launches in place of running them, and says how many blocks of a kernel a multiprocessor holds.
struct Launch {
  const void* kernel;
  dim3 grid;
  int threads;
  size_t dynamic_bytes;
  bool cooperative;
};
struct Recorder {
  std::function<int(const void* kernel, int threads, size_t dynamic_bytes)> resident;
  std::vector<Launch> launches = {};
};
struct World {
  Options options;
  Recorder* recorder = nullptr;
  Meter meter;
  bool count_conflicts = false;
  std::unordered_map<uintptr_t, Sectors> touched;  // by the launch, by page
  uintptr_t last_page = 0;
  Sectors* last_sectors = nullptr;
  int64_t shared_per_sm = 228 * 1024;  // what launch plans see
  bool refuse_cooperative = false;     // as a card does of which another process has a part
  uint32_t random = 1;
  dim3 grid, block;
  size_t dynamic_bytes = 0;
  bool cooperative = false;
  std::vector<Block*> blocks;
  Fiber* current = nullptr;
  Context scheduler;
  void (*call)(void*) = nullptr;
  void* body = nullptr;
  char start = 0, end = 0, grid_order[2] = {0, 0};
  unsigned grid_phase = 0;
  std::string error;
  bool failed = false;
};
inline World& world = *new World;  // never destroyed: reachable to LeakSanitizer

// How many bytes of [p, p + bytes) lie in sectors that the launch had not touched since its last grid barrier.
EMU_UNSEEN inline int64_t touch(const void* p, size_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(p);
  int64_t fresh = 0;
  for (uintptr_t sector = from / 32; sector <= (from + bytes - 1) / 32; ++sector) {
    const uintptr_t page = sector / 128;
    if (page != world.last_page || !world.last_sectors) {
      world.last_page = page;
      world.last_sectors = &world.touched[page];
    }
    uint64_t& bits = world.last_sectors->touched[sector / 64 % 2];
    const uint64_t bit = uint64_t{1} << sector % 64;
    if (!(bits & bit)) fresh += 32;
    bits |= bit;
  }
  return fresh;
}
EMU_UNSEEN inline void count_load(const void* p, size_t bytes) {
  EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__);)
  world.meter.loaded += int64_t(bytes);
  world.meter.first_loaded += touch(p, bytes);
  EMU_TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__);)
}
EMU_UNSEEN inline void count_store(const void* p, size_t bytes) {
  EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__);)
  world.meter.stored += int64_t(bytes);
  touch(p, bytes);
  EMU_TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__);)
}
EMU_UNSEEN inline void count_shared(const void* p, size_t bytes) {
  if (!world.count_conflicts) return;
  Fiber& f = *world.current;
  f.block->accesses.push_back({f.warp, f.lane, f.meetings, f.accesses++, reinterpret_cast<uintptr_t>(p), int(bytes)});
}
EMU_UNSEEN inline void meet(Fiber& f) {
  ++f.meetings;
  f.accesses = 0;
}
// One access of a warp, of `n` of its lanes: 128 bytes at a time, of neighbouring lanes, in as many wavefronts as the
// most loaded of the 32 banks has different words.
EMU_UNSEEN inline void count_wavefronts(const SharedAccess* access, int n) {
  const int together = 128 / std::max(4, access->bytes);  // lanes
  for (int from = 0; from < n;) {
    int until = from;
    std::vector<uintptr_t> words;
    for (; until < n && access[until].lane / together == access[from].lane / together; ++until)
      for (int k = 0; k < std::max(1, access[until].bytes / 4); ++k) words.push_back(access[until].address / 4 + k);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int banks[32] = {}, most = 0;
    for (uintptr_t word : words) most = std::max(most, ++banks[word % 32]);
    world.meter.wavefronts += most;
    ++world.meter.least_wavefronts;
    from = until;
  }
}
EMU_UNSEEN inline void count_wavefronts(Block& b) {
  auto& all = b.accesses;
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.key() < b.key(); });
  for (size_t from = 0; from < all.size();) {
    size_t until = from;
    while (until < all.size() && all[until].warp == all[from].warp && all[until].meetings == all[from].meetings &&
           all[until].index == all[from].index && all[until].bytes == all[from].bytes)
      ++until;
    count_wavefronts(&all[from], int(until - from));
    from = until;
  }
  all.clear();
}

EMU_UNSEEN inline uint32_t draw() {
  world.random ^= world.random << 13;
  world.random ^= world.random >> 17;
  world.random ^= world.random << 5;
  return world.random;
}
EMU_UNSEEN inline void shuffle(int* a, int n) {
  for (int i = n - 1; i > 0; --i) std::swap(a[i], a[draw() % uint32_t(i + 1)]);
}
EMU_UNSEEN inline void order_indices(int* a, int n) {
  const Order o = world.options.order;
  for (int i = 0; i < n; ++i) a[i] = o == Order::descending ? n - 1 - i : i;
  if (o == Order::random) shuffle(a, n);
}

EMU_UNSEEN inline void suspend() { switch_context(*world.current, world.scheduler); }

// Ends the launch with an error that names the threads that wait. Thrown by the scheduler: no unwinding across stacks.
// The fibers of the launch are in the middle of a kernel and never used again.
[[noreturn]] EMU_UNSEEN inline void fail(const std::string& why) {
  EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__);)
  std::string text = "cuda_on_cpu: " + why;
  int shown = 0;
  for (Block* b : world.blocks)
    for (size_t i = 0; i < b->fibers.size() && shown < 8; ++i) {
      const Fiber& f = *b->fibers[i];
      if (f.state == State::ready || f.state == State::done) continue;
      ++shown;
      text += "\n  block " + std::to_string(b->id.x) + "," + std::to_string(b->id.y) + " thread " + std::to_string(i) +
              " waits at " + f.file + ":" + std::to_string(f.line);
    }
  world.blocks.clear();
  if (!world.current) throw std::runtime_error(text);
  world.error = text;
  world.failed = true;
  for (;;) suspend();
}

EMU_UNSEEN inline void fiber_main() {
  arrived(world.scheduler);
  for (;;) {
    EMU_TSAN(__tsan_acquire(&world.start);)
    world.call(world.body);
    EMU_TSAN(__tsan_release(&world.end);)
    world.current->state = State::done;
    ++world.current->block->done;
    suspend();
  }
}
EMU_UNSEEN inline void resume(Fiber* f) {
  world.current = f;
  switch_context(world.scheduler, *f);
  world.current = nullptr;
  if (world.failed) {
    world.failed = false;
    throw std::runtime_error(world.error);
  }
}

EMU_UNSEEN inline void* new_shared(size_t bytes) {
  EMU_TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__);)
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) std::abort();
  std::memset(p, world.options.poison ? 0xFF : 0, bytes);
  EMU_TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__);)
  return p;
}
// The block's array of one declaration (`site`), made by the first thread that passes it. A heap block of its own:
// AddressSanitizer sees its ends, and nothing survives from the block before.
EMU_UNSEEN inline void* shared_array(const void* site, size_t bytes) {
  Block& b = *world.current->block;
  for (int i = 0; i < b.shared_count; ++i)
    if (b.shared[i].site == site) return b.shared[i].data;
  if (b.shared_count == kMaxSharedArrays) fail("too many shared arrays");
  b.shared[b.shared_count] = {site, new_shared(bytes)};
  return b.shared[b.shared_count++].data;
}
template <class T, int N>
auto shared(const void* site) -> T (&)[N] {
  return *static_cast<T(*)[N]>(shared_array(site, sizeof(T) * N));
}
EMU_UNSEEN inline void* dynamic_shared() {
  static const char site = 0;
  return shared_array(&site, world.dynamic_bytes);
}

EMU_UNSEEN inline void start_block(Block& b, uint3 id) {
  b.id = id;
  b.waiting = b.at_grid = b.done = 0;
  const unsigned n = world.block.x * world.block.y * world.block.z;
  while (b.fibers.size() < n) {
    Fiber* f = new Fiber;
    prepare(*f, &fiber_main);
    f->block = &b;
    f->lane = int(b.fibers.size()) & 31;
    f->warp = int(b.fibers.size()) >> 5;
    b.fibers.push_back(f);
  }
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = *b.fibers[i];
    f.state = State::ready;
    f.copies.assign(1, {});
    f.meetings = f.accesses = 0;
    f.tid = {i % world.block.x, i / world.block.x % world.block.y, i / (world.block.x * world.block.y)};
  }
}
EMU_UNSEEN inline void end_block(Block& b) {
  count_wavefronts(b);
  for (int i = 0; i < b.shared_count; ++i) std::free(b.shared[i].data);
  b.shared_count = 0;
}
// The threads of `b` that wait in `state` may go on; they must all wait at one place.
EMU_UNSEEN inline void release(Block& b, int n, State state, const char* what) {
  const Fiber* first = nullptr;
  for (int i = 0; i < n; ++i) {
    Fiber& f = *b.fibers[i];
    if (f.state != state) continue;
    if (!first) first = &f;
    if (f.line != first->line) fail(std::string("threads of one block wait at different calls of ") + what);
  }
  for (int i = 0; i < n; ++i)
    if (b.fibers[i]->state == state) b.fibers[i]->state = State::ready;
}
// Runs a block until every thread has returned or waits at the grid barrier.
EMU_UNSEEN inline void run_block(Block& b) {
  const int n = int(world.block.x * world.block.y * world.block.z), warps = (n + 31) / 32;
  while (b.done + b.at_grid < n) {
    bool progress = false;
    int warp_order[32], lane_order[32];
    order_indices(warp_order, warps);
    for (int k = 0; k < warps; ++k)
      for (bool any = true; any;) {
        any = false;
        order_indices(lane_order, 32);
        for (int lane : lane_order) {
          const int i = warp_order[k] * 32 + lane;
          if (i < n && b.fibers[i]->state == State::ready) {
            resume(b.fibers[i]);
            any = progress = true;
          }
        }
      }
    if (b.waiting && b.waiting + b.done + b.at_grid == n) {
      if (b.done || b.at_grid) fail("__syncthreads that some threads of the block never reach");
      release(b, n, State::barrier, "__syncthreads");
      b.waiting = 0;
      b.votes[~b.phase & 1] = 0;
      ++b.phase;
      progress = true;
    }
    if (!progress) fail("deadlock");
  }
}

EMU_UNSEEN inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, bool cooperative, void (*call)(void*),
                                void* body) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, count = uint64_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > kMaxThreads || block.z > 64 || dynamic_bytes > kMaxSharedBytes || !count ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("bad launch configuration: the device would refuse it");
  world.random = world.options.seed * 2654435761u | 1u;
  world.grid = grid;
  world.block = block;
  world.dynamic_bytes = dynamic_bytes;
  world.cooperative = cooperative;
  world.call = call;
  world.body = body;
  ++(cooperative ? world.meter.cooperative_launches : world.meter.launches);
  world.meter.blocks += int64_t(count);
  world.touched.clear();
  world.last_sectors = nullptr;
  EMU_TSAN(world.scheduler.tsan = __tsan_get_current_fiber();)
  const size_t alive = cooperative ? count : 1;
  while (world.blocks.size() < alive) world.blocks.push_back(new Block);
  std::vector<int> order(count);
  order_indices(order.data(), int(count));
  auto id = [&](unsigned i) { return uint3{i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}; };
  if (!cooperative) {
    for (int i : order) {
      Block& b = *world.blocks[0];
      start_block(b, id(unsigned(i)));
      EMU_TSAN(__tsan_release(&world.start);)
      run_block(b);
      EMU_TSAN(__tsan_acquire(&world.end);)
      end_block(b);
    }
    return;
  }
  for (size_t i = 0; i < count; ++i) start_block(*world.blocks[i], id(unsigned(i)));
  EMU_TSAN(__tsan_release(&world.start);)
  for (bool running = true; running;) {
    order_indices(order.data(), int(count));
    for (int i : order) run_block(*world.blocks[i]);
    size_t at_grid = 0;
    for (size_t i = 0; i < count; ++i) at_grid += size_t(world.blocks[i]->at_grid);
    running = at_grid > 0;
    if (running && at_grid != count * threads) fail("grid barrier that some threads never reach");
    for (size_t i = 0; running && i < count; ++i) {
      release(*world.blocks[i], int(threads), State::grid_barrier, "the grid barrier");
      world.blocks[i]->at_grid = 0;
    }
    ++world.grid_phase;
    world.touched.clear();
    world.last_sectors = nullptr;
  }
  EMU_TSAN(__tsan_acquire(&world.end);)
  for (size_t i = 0; i < count; ++i) end_block(*world.blocks[i]);
}
// Runs `body`, which calls the kernel, once for every thread of the grid.
template <class F>
void launch(const void* kernel, dim3 grid, int threads, size_t dynamic_bytes, bool cooperative, F&& body) {
  if (world.recorder) {
    world.recorder->launches.push_back({kernel, grid, threads, dynamic_bytes, cooperative});
    return;
  }
  run_grid(
      grid, dim3(unsigned(threads)), dynamic_bytes, cooperative,
      [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); }, &body);
}

// A barrier of the block; returns the OR of the votes.
EMU_UNSEEN inline int barrier(int vote, const char* file, int line) {
  Fiber& f = *world.current;
  Block& b = *f.block;
  const unsigned side = b.phase & 1;
  meet(f);
  f.state = State::barrier;
  f.file = file;
  f.line = line;
  ++b.waiting;
  b.votes[side] |= vote;
  EMU_TSAN(__tsan_release(&b.order[side]);)
  suspend();
  EMU_TSAN(__tsan_acquire(&b.order[side]);)
  return b.votes[side];
}
EMU_UNSEEN inline void grid_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!world.cooperative) fail("a grid barrier in a launch that is not cooperative");
  Fiber& f = *world.current;
  [[maybe_unused]] const unsigned side = world.grid_phase & 1;
  f.state = State::grid_barrier;
  f.file = file;
  f.line = line;
  ++f.block->at_grid;
  EMU_TSAN(__tsan_release(&world.grid_order[side]);)
  suspend();
  EMU_TSAN(__tsan_acquire(&world.grid_order[side]);)
}

}  // namespace emu
