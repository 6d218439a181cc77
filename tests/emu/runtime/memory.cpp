// Global and shared memory with their shadow: which bytes exist, which have been written, by whom and who has read them since. Races are
// found by happens-before (vector clocks, as in FastTrack), so a missing barrier is seen in whatever order the threads happen to run.
// Cells are kept per word and split into bytes only where a kernel accesses less than a word.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"
#include "order.h"

namespace emu {
namespace {

constexpr u64 kArena = u64(1) << 29, kRedZone = 4096;

struct Buffer {
  u64 offset, bytes;
  std::string name;
  bool permanent;
};
std::vector<Buffer> buffers;  // by offset
u64 top = kRedZone;
// Of global memory, by 64-byte line: the blocks of a grid may run on several workers. Apart, or the workers would fight over their lines.
struct alignas(64) Lock {
  std::atomic_flag flag;
};
Lock locks[256];
std::mutex readers_mutex;

struct Locked {
  std::atomic_flag* flag = nullptr;
  Locked(const Memory& memory, u64 offset, const Lane& lane) {
    if (!memory.global || !lane.team->launch->parallel || memory.flags[offset] & kReadOnly) return;  // inputs have no cells that change
    flag = &locks[offset >> 6 & 255].flag;
    while (flag->test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Locked() {
    if (flag) flag->clear(std::memory_order_release);
  }
};

bool empty(const Memory& memory, const Stamp& s, const Lane& lane) { return memory.global ? !s.team : s.team != lane.team->serial; }

std::string who(const Stamp& s, const Lane& lane) {
  char text[160];
  const Team& team = *lane.team;
  if (s.team != team.serial) {
    const Launch* other = launch_of(s.team);
    snprintf(text, sizeof text, "%s", other == team.launch ? "another block" : "an earlier launch");
  } else if (s.index >= team.lane_count) {
    snprintf(text, sizeof text, "an asynchronous copy");
  } else {
    const Lane& l = team.lanes[s.index];
    snprintf(text, sizeof text, "thread (%u,%u,%u)%s", l.thread.x, l.thread.y, l.thread.z,
             l.block == lane.block ? "" : " of another block of the cluster");
  }
  return text + std::string(" at ") + where(s.site);
}

void race(const Memory& memory, u64 offset, Lane& lane, const Access& access, const Stamp& other, bool other_wrote) {
  const Launch* launch = other.team == lane.team->serial ? lane.team->launch : launch_of(other.team);
  const bool earlier = launch != lane.team->launch;
  const char* kind = !earlier ? "race" : launch && launch->stream == lane.team->launch->stream ? "grid-dependency" : "stream-order";
  report(&lane, kind, access.site, "%s %s %s that %s %s, with nothing that orders them", access.what, access.write ? "writes" : "reads",
         describe(memory, offset).c_str(), who(other, lane).c_str(), other_wrote ? "wrote" : "read");
}

bool race_of_read(Memory& memory, u64 key, Lane& lane, const Access& access) {
  Cell& cell = memory.cells[key];
  const Stamp& w = cell.write;
  if (!empty(memory, w, lane) && !(w.strong && access.strong) && !ordered(w, lane)) {
    race(memory, key, lane, access, w, true);
    return true;
  }
  const Stamp now{lane.team->serial, lane.clocks[lane.index], access.site, u16(lane.index), access.strong, false};
  for (Stamp& r : cell.reads) {
    const bool own = r.team == now.team && r.index == now.index;
    if (!empty(memory, r, lane) && (own ? !r.strong && now.strong : !ordered(r, lane))) continue;
    const bool many = r.many && !empty(memory, r, lane);
    r = now;
    r.many = many;
    return false;
  }
  std::unique_lock<std::mutex> turn(readers_mutex, std::defer_lock);
  if (memory.global) turn.lock();
  auto& others = memory.readers[key];
  Stamp& last = *std::prev(std::end(cell.reads));
  if (!std::exchange(last.many, true)) others.clear();
  auto same = std::find_if(others.begin(), others.end(),
                           [&](const Stamp& s) { return s.team == now.team && s.index == now.index && s.strong == now.strong; });
  if (same != others.end()) {
    *same = now;
  } else {
    others.push_back(now);
  }
  return false;
}

bool race_of_write(Memory& memory, u64 key, Lane& lane, const Access& access) {
  Cell& cell = memory.cells[key];
  auto conflicts = [&](const Stamp& s, bool wrote) {
    if (empty(memory, s, lane) || (s.strong && access.strong) || ordered(s, lane)) return false;
    race(memory, key, lane, access, s, wrote);
    return true;
  };
  if (conflicts(cell.write, true)) return true;
  for (const Stamp& r : cell.reads)
    if (conflicts(r, false)) return true;
  const Stamp& last = *std::prev(std::end(cell.reads));
  if (last.many && !empty(memory, last, lane)) {
    std::unique_lock<std::mutex> turn(readers_mutex, std::defer_lock);
    if (memory.global) turn.lock();
    const std::vector<Stamp> others = memory.readers[key];
    memory.readers.erase(key);
    if (memory.global) turn.unlock();
    for (const Stamp& s : others)
      if (conflicts(s, false)) return true;
  }
  for (Stamp& r : cell.reads) r = {};
  cell.write = {lane.team->serial, lane.clocks[lane.index], access.site, u16(lane.index), access.strong, false};
  return false;
}

void split(Memory& memory, u64 word) {
  memory.flags[word] |= kSplit;
  for (int i = 1; i < 4; ++i) memory.cells[word + i] = memory.cells[word];
  if (!std::prev(std::end(memory.cells[word].reads))->many) return;
  std::unique_lock<std::mutex> turn(readers_mutex, std::defer_lock);
  if (memory.global) turn.lock();
  const std::vector<Stamp> others = memory.readers[word];
  for (int i = 1; i < 4; ++i) memory.readers[word + i] = others;
}

// One word or a part of it. False: the bytes must not be accessed, or a mistake has been reported and the rest of the access is not looked
// at.
bool check_flags(Memory& memory, u64 offset, u32 bytes, Lane& lane, const Access& access) {
  u8 all = 0xff, any = 0;
  for (u32 i = 0; i < bytes; ++i) all &= memory.flags[offset + i], any |= memory.flags[offset + i];
  if ((all & kAllocated) && !(any & (kInFlight | kBarrier)) && (access.write ? !(any & kReadOnly) : (all & kWritten) != 0)) return true;
  const auto which = [&](u8 flag, bool set) {
    for (u32 i = 0; i < bytes; ++i)
      if (((memory.flags[offset + i] & flag) != 0) == set) return describe(memory, offset + i);
    return std::string();
  };
  const char* verb = access.write ? "writes" : "reads";
  if (!(all & kAllocated)) {
    report(&lane, "out-of-bounds", access.site, "%s %s %s", access.what, verb, which(kAllocated, false).c_str());
  } else if (any & kInFlight) {
    report(&lane, "async", access.site, "%s %s %s while an asynchronous copy into it is on its way", access.what, verb,
           which(kInFlight, true).c_str());
  } else if (any & kBarrier) {
    report(&lane, "mbarrier", access.site, "%s %s %s, which belongs to a live mbarrier", access.what, verb, which(kBarrier, true).c_str());
  } else if (access.write) {
    report(&lane, "read-only", access.site, "%s writes %s, an input", access.what, which(kReadOnly, true).c_str());
  } else {
    report(&lane, "uninitialised", access.site, "%s reads %s, which nobody has written", access.what, which(kWritten, false).c_str());
  }
  return (all & kAllocated) && !access.write && !(any & (kInFlight | kBarrier));
}

bool touch_word(Memory& memory, u64 offset, u32 bytes, Lane& lane, const Access& access) {
  if (!check_flags(memory, offset, bytes, lane, access)) return false;
  const u64 word = offset & ~u64(3);
  if (memory.global && (memory.flags[offset] & kReadOnly)) return true;  // nobody may write it, so nobody can race
  if (bytes != 4 && !(memory.flags[word] & kSplit)) split(memory, word);
  const u32 cells = memory.flags[word] & kSplit ? bytes : 1;
  const u64 first = memory.flags[word] & kSplit ? offset : word;
  for (u32 i = 0; i < cells; ++i)
    if (access.write ? race_of_write(memory, first + i, lane, access) : race_of_read(memory, first + i, lane, access)) break;
  if (access.write)
    for (u32 i = 0; i < bytes; ++i) {
      u8& f = memory.flags[offset + i];
      f = (f & (kAllocated | kSplit)) | (access.async ? kInFlight | (f & kWritten) : kWritten | kGeneric);
    }
  return true;
}

}  // namespace

u8* map_pages(u64 bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("emulator: mmap");
    abort();
  }
  return static_cast<u8*>(p);
}

Memory& global_memory() {
  static Memory memory{map_pages(kArena), map_pages(kArena), reinterpret_cast<Cell*>(map_pages(kArena * sizeof(Cell))), kArena, true, {}};
  return memory;
}

namespace {

// Reads of whole words that have been written and are not split: nearly all that kernels do. False: look closer, from `offset` on.
bool read_words(Memory& memory, u64& offset, u64 end, Lane& lane, const Access& access) {
  constexpr u32 kEach = 0x01010101, kGood = (kAllocated | kWritten) * kEach, kBad = (kInFlight | kBarrier | kSplit) * kEach;
  for (; offset < end; offset += 4) {
    u32 flags;
    memcpy(&flags, memory.flags + offset, 4);
    if ((flags & (kGood | kBad)) != kGood) return false;
    if (memory.global && flags & kReadOnly) continue;
    if (race_of_read(memory, offset, lane, access)) return false;
  }
  return true;
}

}  // namespace

bool touch(Memory& memory, u64 offset, u32 bytes, Lane& lane, const Access& access) {
  const u64 end = offset + bytes;
  Locked turn(memory, offset, lane);
  if (!access.write && !((offset | bytes) & 3) && read_words(memory, offset, end, lane, access)) return true;
  bool mine = true;
  for (u64 o = offset; o < end;) {
    const u32 step = u32(std::min<u64>(end - o, 4 - (o & 3)));
    mine &= touch_word(memory, o, step, lane, access);
    o += step;
  }
  return mine;
}

void land(Memory& memory, u64 offset, u32 bytes, u32 team, u16 index, u32 clock, u32 site) {
  for (u64 o = offset; o < offset + bytes; ++o) {
    memory.flags[o] = (memory.flags[o] & (kAllocated | kSplit)) | kWritten;
    if (o % 4 == 0 || memory.flags[o & ~u64(3)] & kSplit) memory.cells[o] = {{team, clock, site, index, false, false}, {}};
  }
}

// What is read where nothing may be read; writes to it are lost.
static u8* nowhere() {
  alignas(16) thread_local static u8 bytes[64];
  memset(bytes, 0, sizeof bytes);
  return bytes;
}

u8* at(Lane& lane, char space, u64 address, u32 bytes, const Access& access) {
  if (space == 'a') {
    space = char(space_of(lane, address));
    if (space == 's') address = to_shared(lane, address, access.site);
  }
  if (address & ((bytes & -bytes) - 1)) {
    report(&lane, "misaligned", access.site, "%s of %u bytes at an address that is no multiple of them: ...%04llx", access.what, bytes,
           static_cast<unsigned long long>(address & 0xffff));
    return nowhere();
  }
  if (space == 'l') {
    const u8* p = reinterpret_cast<const u8*>(address);
    if (p >= lane.stack_low && p + bytes <= lane.stack_high) return reinterpret_cast<u8*>(address);
  } else if (space == 'p') {
    return reinterpret_cast<u8*>(address);
  } else if (space == 's') {
    u64 offset;
    Memory& memory = shared_memory(lane, u32(address), &offset);
    if (offset + bytes > kWindow) {
      report(&lane, "out-of-bounds", access.site, "%s at shared address 0x%x", access.what, u32(address));
      return nowhere();
    }
    if (access.write) check_async_readers(lane, shared_block(lane, u32(address)), offset, bytes, access.site, access.what);
    return touch(memory, offset, bytes, lane, access) ? memory.data + offset : nowhere();
  } else if (space == 'g') {
    Memory& memory = global_memory();
    const u64 offset = address - reinterpret_cast<u64>(memory.data);
    if (offset < memory.size - bytes) return touch(memory, offset, bytes, lane, access) ? memory.data + offset : nowhere();
  }
  report(&lane, "out-of-bounds", access.site, "%s at 0x%llx, which is in no memory of the device", access.what,
         static_cast<unsigned long long>(address));
  return nowhere();
}

std::string describe(const Memory& memory, u64 offset) {
  char text[200];
  if (!memory.global) {
    snprintf(text, sizeof text, "byte %llu of shared memory%s", static_cast<unsigned long long>(offset),
             memory.flags[offset] & kAllocated ? "" : ", outside of every array");
    return text;
  }
  const Buffer* nearest = nullptr;
  u64 distance = ~u64(0);
  for (const Buffer& b : buffers) {
    const u64 d = offset < b.offset ? b.offset - offset : offset < b.offset + b.bytes ? 0 : offset - b.offset - b.bytes + 1;
    if (d < distance) distance = d, nearest = &b;
  }
  if (!nearest) return "global memory where nothing is allocated";
  if (!distance) {
    snprintf(text, sizeof text, "byte %llu of '%s'", static_cast<unsigned long long>(offset - nearest->offset), nearest->name.c_str());
  } else {
    const bool before = offset < nearest->offset;
    snprintf(text, sizeof text, "%llu bytes %s '%s' (%llu bytes)", static_cast<unsigned long long>(distance),
             before ? "before" : "past the end of", nearest->name.c_str(), static_cast<unsigned long long>(nearest->bytes));
  }
  return text;
}

// ---- what the host does with global memory -----------------------------------------------------------------------------------------

namespace {

Buffer* find(u64 address) {
  const u64 offset = address - reinterpret_cast<u64>(global_memory().data);
  auto b = std::find_if(buffers.begin(), buffers.end(),
                        [&](const Buffer& b) { return b.offset <= offset && offset < b.offset + std::max<u64>(b.bytes, 1); });
  return b == buffers.end() ? nullptr : &*b;
}

u64 place(u64 bytes, const char* name, u64 align, bool permanent) {
  const u64 offset = (top + align - 1) / align * align;
  if (offset + bytes + kRedZone > kArena) return 0;
  top = offset + bytes + kRedZone;
  Memory& memory = global_memory();
  memset(memory.flags + offset, kAllocated, bytes);
  memset(memory.data + offset, 0xcd, bytes);
  buffers.push_back({offset, bytes, name, permanent});
  return reinterpret_cast<u64>(memory.data) + offset;
}

}  // namespace

u64 allocate(u64 bytes, const char* name, u64 align, bool permanent) { return place(bytes, name, align, permanent); }

u64 add_global(const char* name, u64 bytes, u64 align, const u8* init, u64 init_bytes) {
  const u64 address = place(bytes, name, std::max<u64>(align, 16), true);
  memset(reinterpret_cast<u8*>(address), 0, bytes);
  memcpy(reinterpret_cast<u8*>(address), init, init_bytes);
  Memory& memory = global_memory();
  for (u64 o = address - reinterpret_cast<u64>(memory.data), end = o + bytes; o < end; ++o) memory.flags[o] |= kWritten;
  return address;
}

void protect(u64 address, u64 bytes, bool read_only) {
  Memory& memory = global_memory();
  const u64 offset = address - reinterpret_cast<u64>(memory.data);
  for (u64 o = offset; o < offset + bytes; ++o) memory.flags[o] = read_only ? memory.flags[o] | kReadOnly : memory.flags[o] & ~kReadOnly;
}

bool host_access(u64 address, u64 bytes, bool write, const std::vector<u32>& known) {
  Memory& memory = global_memory();
  const u64 offset = address - reinterpret_cast<u64>(memory.data);
  const Buffer* b = find(address);
  if (bytes && (!b || offset + bytes > b->offset + b->bytes)) {
    report(nullptr, "out-of-bounds", 0, "the host %s %llu bytes at %s", write ? "writes" : "reads", static_cast<unsigned long long>(bytes),
           describe(memory, offset).c_str());
    return false;
  }
  for (u64 o = offset; o < offset + bytes; ++o) {
    const Stamp& s = memory.cells[memory.flags[o & ~u64(3)] & kSplit ? o : o & ~u64(3)].write;
    const Launch* launch = s.team ? launch_of(s.team) : nullptr;
    if (launch && (launch->stream >= known.size() || known[launch->stream] < launch->number)) {
      report(nullptr, "stream-order", s.site, "the host %s %s without waiting for the kernel that writes it",
             write ? "overwrites" : "reads", describe(memory, o).c_str());
      break;
    }
  }
  if (!write) return true;
  for (u64 o = offset; o < offset + bytes; ++o) memory.flags[o] |= kWritten, memory.cells[o] = {};
  return true;
}

void reset_memory() {
  Memory& memory = global_memory();
  std::erase_if(buffers, [](const Buffer& b) { return !b.permanent; });
  const u64 keep = (buffers.empty() ? kRedZone : buffers.back().offset + buffers.back().bytes + kRedZone + 4095) & ~u64(4095);
  if (top > keep) {
    madvise(memory.data + keep, kArena - keep, MADV_DONTNEED);
    madvise(memory.flags + keep, kArena - keep, MADV_DONTNEED);
  }
  madvise(memory.cells, kArena * sizeof(Cell), MADV_DONTNEED);
  memory.readers.clear();
  top = keep;
}

}  // namespace emu
