// Streams and events as vector clocks (how many launches of each stream have ended), and the functions that Python calls.
#include "control.h"

#include <algorithm>
#include <cstring>

namespace emu {
namespace {

using Clock = std::vector<u32>;

struct Stream {
  u32 id;
  bool blocking;  // waits for the legacy default stream and the other way round
  u32 issued = 0;
  Clock known;                   // has ended before the next launch starts, beside the stream's own launches
  const Launch* last = nullptr;  // if nothing has come between it and the next launch
};
std::deque<Stream>& streams() {
  static std::deque<Stream> all{{0, true, 0, {}, nullptr}};
  return all;
}
std::deque<Clock> events;
Clock host;  // what the host has waited for

void raise(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

Stream& stream_of(void* handle) {
  const auto value = reinterpret_cast<uintptr_t>(handle);
  return value <= 2 ? streams()[0] : *static_cast<Stream*>(handle);  // 0, cudaStreamLegacy, cudaStreamPerThread
}

Clock ended(const Stream& s) {
  Clock c = s.known;
  if (c.size() <= s.id) c.resize(s.id + 1);
  c[s.id] = s.issued;
  return c;
}

}  // namespace

Options& options() {
  static Options current;
  return current;
}

void order_launch(Launch& launch, void* handle, bool overlaps) {
  Stream& s = stream_of(handle);
  for (const Stream& other : streams())
    if (&other != &s && s.blocking && other.blocking && (s.id == 0 || other.id == 0)) raise(s.known, ended(other));
  raise(s.known, host);
  launch.after = ended(s);
  // One that may overlap starts when the kernel before it has let it go, which can be before that one's own wait.
  launch.before = overlaps && s.last ? s.last->before : launch.after;
  if (overlaps && s.last) raise(launch.before, host);
  launch.stream = s.id, launch.number = ++s.issued;
  s.last = &launch;
}

void* create_stream(bool blocking) { return &streams().emplace_back(Stream{u32(streams().size()), blocking, 0, {}, nullptr}); }
void* create_event() { return &events.emplace_back(); }
void record_event(void* event, void* stream) { *static_cast<Clock*>(event) = ended(stream_of(stream)); }
void stream_waits(void* stream, void* event) {
  raise(stream_of(stream).known, *static_cast<Clock*>(event));
  stream_of(stream).last = nullptr;
}
void host_waits(void* stream) { raise(host, ended(stream_of(stream))); }
void host_waits_for_all() {
  for (const Stream& s : streams()) raise(host, ended(s));
}

}  // namespace emu

using namespace emu;

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

EMU_EXPORT void emu_configure(u64 seed, int order, int workers, int resident, int arch) {
  options() = {seed, Order(order), workers, resident, arch};
}
EMU_EXPORT u64 emu_allocate(u64 bytes, const char* name) { return allocate(bytes, name); }
EMU_EXPORT int emu_upload(u64 address, const void* from, u64 bytes) {
  if (!host_access(address, bytes, true, host)) return 0;
  memcpy(reinterpret_cast<void*>(address), from, bytes);
  return 1;
}
EMU_EXPORT int emu_download(void* to, u64 address, u64 bytes) {
  if (!host_access(address, bytes, false, host)) return 0;
  memcpy(to, reinterpret_cast<void*>(address), bytes);
  return 1;
}
EMU_EXPORT void emu_protect(u64 address, u64 bytes, int read_only) { protect(address, bytes, read_only); }
EMU_EXPORT u64 emu_stream() { return reinterpret_cast<u64>(create_stream(false)); }
EMU_EXPORT void emu_synchronize(u64 stream) { host_waits(reinterpret_cast<void*>(stream)); }
EMU_EXPORT const char* emu_reports() {
  static std::string text;
  text = reports(true);
  return text.c_str();
}
EMU_EXPORT u64 emu_mma_count() { return mma_count; }
EMU_EXPORT void emu_reset() {
  reset_memory();
  forget_launches();
  host.clear(), events.clear(), streams().clear();
  streams().push_back({0, true, 0, {}, nullptr});
}
