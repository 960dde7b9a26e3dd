// One CUDA thread = one fiber: a stack and a context switch, both announced to the sanitizers.
#pragma once
#if defined(__CUDACC__)
#error "cuda_on_cpu is for the host compiler only"
#endif
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstring>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, size_t);
void __tsan_write_range(void*, size_t);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_TSAN(...)
#endif
// The emulator's own bookkeeping is no part of the program that ThreadSanitizer judges.
#define EMU_UNSEEN __attribute__((no_sanitize_thread))

namespace emu {

constexpr size_t kStackBytes = 256 * 1024;

// Everything a context needs to be left and entered again; the scheduler has one too.
struct Context {
  void* sp = nullptr;
  ucontext_t uc;
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* tsan = nullptr;
};

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_OWN_SWITCH 1
extern "C" void emu_switch(void** from, void* to);
asm(".text\n.weak emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size emu_switch,.-emu_switch\n");
#endif

// For ThreadSanitizer a switch orders no memory: only barriers do.
EMU_UNSEEN inline void switch_context(Context& from, Context& to) {
  EMU_ASAN(__sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);)
  EMU_TSAN(__tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);)
#if defined(EMU_OWN_SWITCH)
  emu_switch(&from.sp, to.sp);
#else
  swapcontext(&from.uc, &to.uc);
#endif
  EMU_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// A fresh stack on which `entry` (which never returns) runs at the first switch.
EMU_UNSEEN inline void prepare(Context& c, void (*entry)()) {
  char* stack = static_cast<char*>(
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(stack, 4096, PROT_NONE);  // a guard page: running over the stack is a crash, not a silent overwrite
  c.stack_bottom = stack;
  c.stack_size = kStackBytes;
#if defined(EMU_OWN_SWITCH)
  void** s = reinterpret_cast<void**>(stack + kStackBytes);
  *--s = nullptr;
  *--s = reinterpret_cast<void*>(entry);
  s -= 6;
  std::memset(s, 0, 48);
  c.sp = s;
#else
  getcontext(&c.uc);
  c.uc.uc_stack.ss_sp = stack;
  c.uc.uc_stack.ss_size = kStackBytes;
  c.uc.uc_link = nullptr;
  makecontext(&c.uc, entry, 0);
#endif
  EMU_TSAN(c.tsan = __tsan_create_fiber(0);)
}

// On the first run of a fiber AddressSanitizer must hear that the switch has ended, and where the scheduler's stack
// lies.
EMU_UNSEEN inline void arrived([[maybe_unused]] Context& scheduler) {
  EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);)
}

}  // namespace emu
