// The race check of the emulation. The compiler instruments the kernels (-fsanitize=thread) with calls of the functions
// below, which replace ThreadSanitizer's library: every access to shared and global memory is seen, also those without
// a function of ptx.cuh. An error is
// - two warps of a block that touch a word between two barriers of the block, at least one of them writing;
// - two blocks of a launch that touch a word of global memory, at least one of them writing.
// Accesses of single bytes, the flags of tokens, are left out.
// Words are found in a table by their address; a word that takes another one's place makes the check forget that one.

#include <dlfcn.h>

#include <string>
#include <utility>

#include "emulated.h"

namespace minilm::cuda::emulation {
namespace {

constexpr int kSeveral = -1;

struct Access {
  int64_t launch = 0, block = 0;
  int interval = 0, warp = 0;
};
struct Word {
  uintptr_t address = 0;
  Access write, read;
};

std::vector<Word> table(1 << 20);
std::string first;
int64_t count = 0;

bool inside(uintptr_t address, const void* begin, size_t size) {
  return address - reinterpret_cast<uintptr_t>(begin) < size;
}

void report(uintptr_t address, const Access& before, const Access& now, const void* caller) {
  if (count++) return;
  Dl_info info{};
  dladdr(caller, &info);
  const bool shared = inside(address, machine.shared, machine.shared_bytes);
  char text[400];
  std::snprintf(
      text, sizeof text, "%s: warp %d of block %lld and warp %d of block %lld touch %s byte %zu; code at offset 0x%zx",
      machine.kernel, before.warp, static_cast<long long>(before.block), now.warp, static_cast<long long>(now.block),
      shared ? "shared" : "global", address - (shared ? reinterpret_cast<uintptr_t>(machine.shared) : 0),
      reinterpret_cast<uintptr_t>(caller) - reinterpret_cast<uintptr_t>(info.dli_fbase));
  first = text;
}

void touch(const void* at, size_t size, bool write, const void* caller) {
  if (size == 1) return;  // flags of tokens: neighbours share a word, but not a byte
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  if (!machine.in_fiber || inside(address, machine.stacks, kMostThreads * kStack) ||
      inside(address, &machine, sizeof machine) ||
      inside(address, machine.fibers.data(), machine.fibers.size() * sizeof(Fiber)) ||
      inside(address, machine.warps.data(), machine.warps.size() * sizeof(Warp)))
    return;
  const bool shared = inside(address, machine.shared, machine.shared_bytes);
  const Access now{machine.launch, machine.block, machine.interval, machine.current / 32};
  auto is_ordered = [&](const Access& before) {
    if (before.launch != now.launch) return true;
    if (before.block != now.block) return shared;
    return before.interval != now.interval || before.warp == now.warp;
  };
  for (uintptr_t word = address / 4; word <= (address + size - 1) / 4; ++word) {
    Word& known = table[word * 2654435761u % table.size()];
    if (known.address != word) known = {word, {}, {}};
    if (!is_ordered(known.write)) report(address, known.write, now, caller);
    if (write) {
      if (!is_ordered(known.read)) report(address, known.read, now, caller);
      known.write = now;
    } else {
      Access& read = known.read;
      const bool same_launch = read.launch == now.launch && !(shared && read.block != now.block);
      const bool several_blocks = same_launch && read.block != now.block;
      const bool several_warps = same_launch && !several_blocks && !is_ordered(read);
      read = now;
      if (several_blocks) read.block = kSeveral;
      if (several_warps) read.warp = kSeveral;
    }
  }
}

}  // namespace
}  // namespace minilm::cuda::emulation

#define EXPORT extern "C" __attribute__((visibility("default")))

// The number of races since the last call. `text`: the first one.
EXPORT int64_t emulated_take_races(char* text, int64_t size) {
  using namespace minilm::cuda::emulation;
  std::snprintf(text, static_cast<size_t>(size), "%s", first.c_str());
  first.clear();
  return std::exchange(count, 0);
}

#define SEEN(name, size, write)                                                   \
  extern "C" void __tsan_##name(void* at) {                                       \
    minilm::cuda::emulation::touch(at, size, write, __builtin_return_address(0)); \
  }
#define SEEN_OF_SIZE(size)                \
  SEEN(read##size, size, false)           \
  SEEN(write##size, size, true)           \
  SEEN(unaligned_read##size, size, false) \
  SEEN(unaligned_write##size, size, true)
SEEN_OF_SIZE(1)
SEEN_OF_SIZE(2)
SEEN_OF_SIZE(4)
SEEN_OF_SIZE(8)
SEEN_OF_SIZE(16)
extern "C" void __tsan_read_range(void* at, size_t size) {
  minilm::cuda::emulation::touch(at, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t size) {
  minilm::cuda::emulation::touch(at, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
