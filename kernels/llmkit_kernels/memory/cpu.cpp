// A caching allocator for torch's CPU tensors: what is freed is kept and merged with its free neighbours, and a request
// takes the smallest piece that it fits in. glibc's allocator cannot put an aligned request where one of the same size
// was freed, so a training step, which frees and takes the same sizes over and over, strews its heap with holes.
#include <sys/mman.h>
#include <pthread.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t GRAIN = 256, SMALL = size_t(32) << 10, PAGE = size_t(2) << 20, SEGMENT = size_t(64) << 20;
constexpr int POPULATE = 23;  // MADV_POPULATE_WRITE, of Linux 5.14: an older one refuses it, and pages come when touched

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Pool {
  std::mutex lock;
  std::unordered_map<char*, size_t> used;
  std::map<char*, size_t> free;
  std::set<std::pair<size_t, char*>> by_size;
  char* end = nullptr;  // of the newest segment: the next one goes there if it can, and becomes one with it

  void put(char* at, size_t size) {
    auto after = free.lower_bound(at);
    if (after != free.end() && at + size == after->first) {
      size += after->second;
      by_size.erase({after->second, after->first});
      after = free.erase(after);
    }
    if (after != free.begin()) {
      auto before = std::prev(after);
      if (before->first + before->second == at) {
        at = before->first;
        size += before->second;
        by_size.erase({before->second, before->first});
        free.erase(before);
      }
    }
    free.emplace(at, size);
    by_size.emplace(size, at);
  }

  bool grow(size_t size) {
    for (size_t length : {up(size, SEGMENT), up(size, PAGE)}) {
      void* got = mmap(end, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (got == MAP_FAILED) continue;
      madvise(got, length, MADV_HUGEPAGE);
      end = static_cast<char*>(got) + length;
      put(static_cast<char*>(got), length);
      return true;
    }
    return false;
  }

  char* take(size_t size) {
    std::lock_guard<std::mutex> held(lock);
    auto found = by_size.lower_bound({size, nullptr});
    if (found == by_size.end()) {
      if (!grow(size)) return nullptr;
      found = by_size.lower_bound({size, nullptr});
    }
    auto [whole, at] = *found;
    by_size.erase(found);
    free.erase(at);
    if (whole > size) {
      free.emplace(at + size, whole - size);
      by_size.emplace(whole - size, at + size);
    }
    used.emplace(at, size);
    return at;
  }

  bool give(char* at) {
    std::lock_guard<std::mutex> held(lock);
    auto found = used.find(at);
    if (found == used.end()) return false;
    put(at, found->second);
    used.erase(found);
    return true;
  }

  // Has `size` bytes at hand in one piece, their pages touched; what the system refuses comes later, or fails then.
  void reserve(size_t size) {
    std::lock_guard<std::mutex> held(lock);
    if (by_size.lower_bound({size, nullptr}) == by_size.end() && !grow(size)) return;
    auto [whole, at] = *by_size.lower_bound({size, nullptr});
    const size_t from = reinterpret_cast<size_t>(at) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(from), up(reinterpret_cast<size_t>(at) + size - from, 4096), POPULATE);
  }

  // Gives what is free back to the system, addresses too: whole pages of it.
  void trim() {
    std::lock_guard<std::mutex> held(lock);
    const std::map<char*, size_t> all(std::move(free));
    free.clear();
    by_size.clear();
    for (auto& [at, size] : all) {
      char* const to = reinterpret_cast<char*>((reinterpret_cast<size_t>(at) + size) / PAGE * PAGE);
      char* const from = reinterpret_cast<char*>(up(reinterpret_cast<size_t>(at), PAGE));
      if (from >= to || munmap(from, to - from) != 0) {
        put(at, size);
        continue;
      }
      if (from > at) put(at, from - at);
      if (at + size > to) put(to, at + size - to);
    }
  }
};

Pool& pool() {
  static Pool* made = new Pool;  // never destroyed: tensors may be freed after everything else
  return *made;
}

void give(void* at) {
  if (at != nullptr && !pool().give(static_cast<char*>(at))) free(at);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* at = nullptr;
    if (n >= SMALL)
      at = pool().take(up(n, GRAIN));
    else if (n > 0 && posix_memalign(&at, 64, n) != 0)
      at = nullptr;
    TORCH_CHECK(at != nullptr || n == 0, "can't allocate memory: you tried to allocate ", n, " bytes");
    return {at, at, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

}  // namespace

extern "C" {

void memory_install() {
  static Allocator made;
  pthread_atfork([] { pool().lock.lock(); }, [] { pool().lock.unlock(); }, [] { pool().lock.unlock(); });
  c10::SetCPUAllocator(&made);
}

void memory_reserve(int64_t size) { pool().reserve(up(size, GRAIN)); }

void memory_trim() { pool().trim(); }
}
