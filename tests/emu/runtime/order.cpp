// What orders the accesses of threads that share no barrier: fences with atomics between the blocks of a grid, streams, events and
// griddepcontrol between grids; and the fences between ordinary accesses and those of the async proxy.
#include "order.h"

#include <algorithm>
#include <cstring>

#include "control.h"

namespace emu {
namespace {

std::deque<Launch> launches;  // since the last reset; a Launch never moves
u32 serials = 1;
std::mutex published_mutex;
std::unordered_map<u64, Known> published;  // by address of an atomic

Known merge(const Known& a, const Known& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto sum = std::make_shared<Knowledge>(*a);
  for (const auto& [team, entry] : *b) {
    Entry& e = (*sum)[team];
    if (e.clocks.size() < entry.clocks.size()) e.clocks.resize(entry.clocks.size());
    for (size_t i = 0; i < entry.clocks.size(); ++i) e.clocks[i] = std::max(e.clocks[i], entry.clocks[i]);
    e.block_only = e.block_only && entry.block_only;
  }
  return sum;
}

// Takes in what others have published: of the own team as clocks, of others as knowledge.
void acquire(Lane& lane, const Known& known) {
  if (!known) return;
  if (auto own = known->find(lane.team->serial); own != known->end())
    for (size_t i = 0; i < own->second.clocks.size(); ++i) lane.clocks[i] = std::max(lane.clocks[i], own->second.clocks[i]);
  lane.acquired = merge(lane.acquired, known);
}

void publish(Lane& lane, bool block_only) {
  auto now = std::make_shared<Knowledge>();
  (*now)[lane.team->serial] = {{lane.clocks, lane.clocks + lane.team->width}, block_only};
  lane.published = block_only ? merge(lane.published, now) : merge(lane.acquired, now);
  ++lane.clocks[lane.index];
  lane.team->knowledge = true;
}

}  // namespace

Launch& new_launch() { return launches.emplace_back(); }

u32 new_serials(u32 count) {
  const u32 first = serials;
  serials += count;
  return first;
}

void forget_launch() { launches.pop_back(); }

void forget_launches() {
  launches.clear();
  published.clear();  // but serials go on: stamps in shared memory are told from stale ones by them
}

const Launch* launch_of(u32 team) {
  auto after =
      std::upper_bound(launches.begin(), launches.end(), team, [](u32 serial, const Launch& l) { return serial < l.first_serial; });
  return after == launches.begin() ? nullptr : &*std::prev(after);
}

bool ordered_elsewhere(const Stamp& s, const Lane& lane) {
  const Launch& mine = *lane.team->launch;
  const Launch* other = launch_of(s.team);
  if (other == &mine) {
    if (!lane.acquired) return false;
    auto entry = lane.acquired->find(s.team);
    return entry != lane.acquired->end() && !entry->second.block_only && s.index < entry->second.clocks.size() &&
           entry->second.clocks[s.index] >= s.clock;
  }
  const bool waited = lane.clocks[lane.team->width - 1] != 0;
  const auto& ended = waited ? mine.after : mine.before;
  return other->stream < ended.size() && ended[other->stream] >= other->number;
}

void grid_wait(Lane& lane) {
  lane.clocks[lane.team->width - 1] = 1;
  lane.team->launch->waited = true;
}

void fence(Lane& lane, bool block_scope) {
  acquire(lane, lane.seen);
  if (!block_scope) lane.seen = nullptr;
  publish(lane, block_scope);
}

void join_knowledge(const std::vector<Lane*>& lanes) {
  if (lanes.empty() || !lanes[0]->team->knowledge) return;
  Known acquired, seen, published_by;
  for (const Lane* l : lanes) {
    acquired = merge(acquired, l->acquired);
    seen = merge(seen, l->seen);
    published_by = merge(published_by, l->published);
  }
  for (Lane* l : lanes) l->acquired = acquired, l->seen = seen, l->published = published_by;
}

u8* atomic_begin(Lane& lane, char space, u64 address, u32 bytes, u32 site, bool read, bool write, bool acquires, bool releases) {
  pause(lane, site);
  if (space == 's') address = to_generic(lane, u32(address));
  if (read) {
    u8* p = at(lane, 'a', address, bytes, {site, "an atomic", false, true});
    if (!write) {
      std::lock_guard turn(published_mutex);
      auto known = published.find(address);
      if (known != published.end()) {
        lane.team->knowledge = true;
        lane.seen = merge(lane.seen, known->second);
        if (acquires) acquire(lane, known->second);
      }
      return p;
    }
  }
  if (releases) publish(lane, false);
  u8* p = at(lane, 'a', address, bytes, {site, "an atomic", true, true});
  published_mutex.lock();  // until atomic_end: the read, the write and what they make visible are one step
  Known& known = published[address];
  if (read && known) {
    lane.team->knowledge = true;
    lane.seen = merge(lane.seen, known);
    if (acquires) acquire(lane, known);
  }
  known = read ? merge(known, lane.published) : lane.published;
  return p;
}

void atomic_end(Lane&, u64) { published_mutex.unlock(); }

void proxy_fence(Lane& lane) {
  lane.proxy_fences.push_back(lane.clocks[lane.index]++);
  lane.proxy_known.assign(lane.clocks, lane.clocks + lane.team->width);
}

// A read through the async proxy of bytes that an ordinary store wrote: a fence.proxy.async must lie between, the writer's (before the
// synchronisation through which the reader learnt of the write) or the reader's (after it).
void check_proxy(Memory& memory, u64 offset, u32 bytes, Lane& lane, u32 site, const char* what) {
  for (u64 o = offset; o < offset + bytes; o += 4) {
    const bool is_split = memory.flags[o & ~u64(3)] & kSplit;
    for (u64 b = o; b < o + (is_split ? 4 : 1); ++b) {
      const Stamp& w = memory.cells[is_split ? b : b & ~u64(3)].write;
      if (!(memory.flags[b] & kGeneric) || w.team != lane.team->serial || w.index >= lane.team->lane_count) continue;
      const auto& fences = lane.team->lanes[w.index].proxy_fences;
      auto next = std::lower_bound(fences.begin(), fences.end(), w.clock);
      if (next != fences.end() && *next <= lane.clocks[w.index]) continue;
      if (!lane.proxy_known.empty() && lane.proxy_known[w.index] >= w.clock) continue;
      report(&lane, "proxy", site, "%s reads %s, stored at %s, with no fence.proxy.async between", what, describe(memory, b).c_str(),
             where(w.site).c_str());
      return;
    }
  }
}

}  // namespace emu
