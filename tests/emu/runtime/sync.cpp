// Barriers of a block, of a cluster and in shared memory (mbarrier), and the instructions that a warp executes together. Each of them
// joins the clocks of those that it orders; shuffles, votes and matrix instructions order nothing, as in PTX.
#include <algorithm>
#include <bit>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

void raise(std::vector<u32>& to, const u32* from, u32 width) {
  to.resize(width);
  for (u32 i = 0; i < width; ++i) to[i] = std::max(to[i], from[i]);
}
void raise(u32* to, const std::vector<u32>& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// All of `lanes` now know what any of them, or `more`, knew.
void join(const std::vector<Lane*>& lanes, std::vector<u32> more = {}) {
  const u32 width = lanes[0]->team->width;
  for (const Lane* l : lanes) raise(more, l->clocks, width);
  for (Lane* l : lanes) {
    memcpy(l->clocks, more.data(), width * sizeof(u32));
    ++l->clocks[l->index];
  }
  join_knowledge(lanes);
}

// ---- bar -------------------------------------------------------------------------------------------------------------------------

bool complete_if_all_came(Lane& lane, Barrier& b) {
  const u32 threads = u32(lane.team->launch->block.count());
  if (!b.arrived || b.arrived < (b.need ? b.need : threads - lane.block->exited)) return false;
  Barrier done = std::move(b);
  b = {};
  if (done.waiting.empty()) return true;
  join(done.waiting, std::move(done.clocks));
  for (Lane* l : done.waiting) {
    l->barrier_result = done.trues | (done.trues == done.arrived ? 1u << 31 : 0);
    wake(*l);
  }
  return true;
}

Barrier& enter(Lane& lane, u32 id, u32 threads, u32 site) {
  if (id > 15) {
    report(&lane, "barrier", site, "barrier %u: there are 16", id);
    stop(lane);
  }
  if (threads % 32) report(&lane, "barrier", site, "barrier %u for %u threads, which is no multiple of 32", id, threads);
  Barrier& b = lane.block->barriers[id];
  if (b.arrived && b.need != threads)
    report(&lane, "barrier", site, "barrier %u is used for %u and for %u threads at a time", id, b.need, threads);
  b.need = threads;
  ++b.arrived;
  return b;
}

void wait_at(Lane& lane, Barrier& b, u32 site) {
  u32& together = b.sites[lane.warp];
  if (together && together != site)
    report(&lane, "divergence", site, "lanes of one warp wait at different barriers, the others at %s", where(together).c_str());
  together = site;
  b.waiting.push_back(&lane);
  if (complete_if_all_came(lane, b)) {
    take_turns(lane);
  } else {
    block_on(lane, "a barrier", site);
  }
}

}  // namespace

void bar_sync(Lane& lane, u32 id, u32 threads, u32 site) { wait_at(lane, enter(lane, id, threads, site), site); }

void bar_arrive(Lane& lane, u32 id, u32 threads, u32 site) {
  Barrier& b = enter(lane, id, threads, site);
  raise(b.clocks, lane.clocks, lane.team->width);
  ++lane.clocks[lane.index];
  complete_if_all_came(lane, b);
}

u32 bar_reduce(Lane& lane, u32 id, bool value, int op, u32 site) {
  Barrier& b = enter(lane, id, 0, site);
  b.trues += value;
  wait_at(lane, b, site);
  const u32 count = lane.barrier_result & ~(1u << 31);
  return op == 0 ? count : op == 1 ? lane.barrier_result >> 31 : count != 0;
}

// ---- a warp ----------------------------------------------------------------------------------------------------------------------

namespace {

bool execute_if_all_came(Lane& lane, size_t which) {
  auto& pending = lane.block->warps[lane.warp];
  Collective& c = pending[which];
  if ((c.mask & lane.block->alive[lane.warp]) & ~c.arrived) return false;
  Collective done = c;
  pending.erase(pending.begin() + std::ptrdiff_t(which));
  reinterpret_cast<Execute>(const_cast<void*>(done.op))(done, *lane.block, lane.warp);
  const u32 first = lane.index - lane.id + lane.warp * 32;
  for (u32 left = done.arrived; left; left &= left - 1) wake(lane.team->lanes[first + u32(std::countr_zero(left))]);
  return true;
}

std::vector<Lane*> lanes_of(const Collective& c) {
  std::vector<Lane*> lanes;
  for (u32 left = c.arrived; left; left &= left - 1) lanes.push_back(*static_cast<Lane**>(c.arg[u32(std::countr_zero(left))]));
  return lanes;
}

template <class F>
void for_lanes(const Collective& c, F f) {
  for (u32 left = c.arrived; left; left &= left - 1) f(u32(std::countr_zero(left)));
}

}  // namespace

void collective(Lane& lane, u32 mask, void* arg, Execute execute, long variant, const char* name, u32 site, bool any_site) {
  const u32 alive = lane.block->alive[lane.warp];
  if (!(mask >> lane.lane & 1)) {
    report(&lane, "mask", site, "%s: the mask %08x lacks the lane that executes it", name, mask);
    mask |= 1u << lane.lane;
  }
  auto& pending = lane.block->warps[lane.warp];
  const void* op = reinterpret_cast<const void*>(execute);
  size_t at = 0;
  for (; at < pending.size(); ++at) {
    const Collective& c = pending[at];
    if (c.mask == mask && c.op == op && c.variant == variant && (any_site || c.site == site) && !(c.arrived >> lane.lane & 1)) break;
    if (c.mask & mask & alive)
      report(&lane, "divergence", site, "%s, while lanes %08x of the warp wait at %s", name, c.arrived, where(c.site).c_str());
  }
  if (at == pending.size()) pending.push_back({mask, 0, site, op, variant, {}});
  pending[at].arrived |= 1u << lane.lane;
  pending[at].arg[lane.lane] = arg;
  if (execute_if_all_came(lane, at)) {
    take_turns(lane);
  } else {
    block_on(lane, name, site);
  }
}

void warp_sync(Lane& lane, u32 mask, u32 site) {
  Lane* me = &lane;
  collective(lane, mask, &me, [](Collective& c, Block&, u32) { join(lanes_of(c)); }, 0, "bar.warp.sync", site, true);
}

u32 shuffle(Lane& lane, u32 value, int mode, u32 b, u32 c, u32 mask, u32 site, bool* valid) {
  struct Arg {
    Lane* lane;
    u32 value, b, clamp, segment, out;
    bool valid;
  } arg{&lane, value, b & 31, c & 31, c >> 8 & 31, 0, false};
  auto execute = [](Collective& c, Block&, u32) {
    for_lanes(c, [&](u32 l) {
      Arg& a = *static_cast<Arg*>(c.arg[l]);
      const u32 high = (l & a.segment) | (a.clamp & ~a.segment), low = l & a.segment;
      u32 from = 0;
      switch (c.variant) {
        case 0:
          from = low | (a.b & ~a.segment), a.valid = from <= high;
          break;
        case 1:
          from = l - a.b, a.valid = s32(from) >= s32(high);
          break;
        case 2:
          from = l + a.b, a.valid = from <= high;
          break;
        default:
          from = l ^ a.b, a.valid = from <= high;
      }
      if (!a.valid) from = l;
      if (c.arrived >> from & 1) {
        a.out = static_cast<Arg*>(c.arg[from])->value;
      } else {
        report(a.lane, "shuffle", c.site, "reads the value of lane %u, which does not take part", from);
      }
    });
  };
  collective(lane, mask, &arg, execute, mode, "shfl", site);
  if (valid) *valid = arg.valid;
  return arg.out;
}

u32 ballot(Lane& lane, bool value, u32 mask, u32 site) {
  u32 word = value;
  auto execute = [](Collective& c, Block&, u32) {
    u32 all = 0;
    for_lanes(c, [&](u32 l) { all |= *static_cast<u32*>(c.arg[l]) << l; });
    for_lanes(c, [&](u32 l) { *static_cast<u32*>(c.arg[l]) = all; });
  };
  collective(lane, mask, &word, execute, 0, "vote", site);
  return word;
}

u32 match_any(Lane& lane, u32 value, u32 mask, u32 site) {
  u32 word[2] = {value, 0};
  auto execute = [](Collective& c, Block&, u32) {
    for_lanes(c, [&](u32 l) {
      u32* mine = static_cast<u32*>(c.arg[l]);
      for_lanes(c, [&](u32 m) { mine[1] |= u32(static_cast<u32*>(c.arg[m])[0] == mine[0]) << m; });
    });
  };
  collective(lane, mask, word, execute, 0, "match", site);
  return word[1];
}

u32 redux(Lane& lane, u32 value, int op, u32 mask, u32 site) {
  auto execute = [](Collective& c, Block&, u32) {
    u32 sum = *static_cast<u32*>(c.arg[std::countr_zero(c.arrived)]);
    bool first = true;
    for_lanes(c, [&](u32 l) {
      const u32 v = *static_cast<u32*>(c.arg[l]);
      if (std::exchange(first, false)) return;
      switch (c.variant) {
        case 0:
          sum += v;
          break;
        case 1:
          sum &= v;
          break;
        case 2:
          sum |= v;
          break;
        case 3:
          sum ^= v;
          break;
        case 4:
          sum = u32(std::min(s32(sum), s32(v)));
          break;
        case 5:
          sum = u32(std::max(s32(sum), s32(v)));
          break;
        case 6:
          sum = std::min(sum, v);
          break;
        default:
          sum = std::max(sum, v);
      }
    });
    for_lanes(c, [&](u32 l) { *static_cast<u32*>(c.arg[l]) = sum; });
  };
  collective(lane, mask, &value, execute, op, "redux", site);
  return value;
}

bool elect(Lane& lane, u32 mask, u32 site) {
  if (!(mask >> lane.lane & 1)) report(&lane, "mask", site, "elect: the mask %08x lacks the lane that executes it", mask);
  return u32(std::countr_zero(mask & lane.block->alive[lane.warp])) == lane.lane;
}

// ---- cluster ---------------------------------------------------------------------------------------------------------------------

namespace {

void complete_cluster(Team& team) {
  ClusterBarrier& b = team.cluster;
  if (!b.arrived || b.arrived + team.done < team.lane_count) return;
  ++b.generation;
  b.arrived = 0;
  b.done = b.clocks;
  for (Lane* l : std::exchange(b.waiting, {})) wake(*l);
}

}  // namespace

void cluster_arrive(Lane& lane, bool release, u32 site) {
  if (std::exchange(lane.in_cluster_barrier, true))
    report(&lane, "barrier", site, "barrier.cluster.arrive a second time with no wait between");
  ClusterBarrier& b = lane.team->cluster;
  lane.cluster_phase = b.generation;
  if (release) {
    raise(b.clocks, lane.clocks, lane.team->width);
    ++lane.clocks[lane.index];
  }
  ++b.arrived;
  complete_cluster(*lane.team);
}

void cluster_wait(Lane& lane, u32 site) {
  if (!std::exchange(lane.in_cluster_barrier, false)) {
    report(&lane, "barrier", site, "barrier.cluster.wait with no arrive before it");
    return;
  }
  ClusterBarrier& b = lane.team->cluster;
  while (b.generation == lane.cluster_phase) {
    b.waiting.push_back(&lane);
    block_on(lane, "barrier.cluster", site);
  }
  raise(lane.clocks, b.done);
}

// ---- mbarrier --------------------------------------------------------------------------------------------------------------------

u16 slot_index(const Team& team, const Block& block, const MBarrier& b) {
  return u16(team.lane_count + block.rank * kBarrierSlots + b.slot);
}

namespace {

void complete_phase(const Team& team, const Block& block, MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.clocks.resize(team.width);
  b.clocks[slot_index(team, block, b)] = ++b.generation;
  b.pending = b.count;
  b.done = b.clocks;
  for (Lane* l : std::exchange(b.waiting, {})) wake(*l);
}

}  // namespace

MBarrier* find_mbarrier(Lane& lane, u32 address, u32 site, bool by_async_proxy) {
  Block& block = shared_block(lane, address);
  auto found = block.mbarriers.find(address & ((1u << kRankShift) - 1));
  if (found == block.mbarriers.end()) {
    report(&lane, "mbarrier", site, "there is no mbarrier at shared address 0x%x", address);
    stop(lane);
  }
  MBarrier& b = found->second;
  const Lane& by = *b.init_lane;
  if (lane.clocks[by.index] < b.init_clock)
    report(&lane, "race", site, "the mbarrier is used with nothing that orders this after its initialisation at %s",
           where(b.init_site).c_str());
  if (by_async_proxy && by.init_fence < b.init_clock &&
      std::none_of(by.proxy_fences.begin(), by.proxy_fences.end(), [&](u32 c) { return c >= b.init_clock; }))
    report(&lane, "proxy", site,
           "a copy completes on the mbarrier initialised at %s, with no fence.mbarrier_init or fence.proxy.async after that",
           where(b.init_site).c_str());
  return &b;
}

void mbarrier_init(Lane& lane, u32 address, u32 count, u32 site) {
  Block& block = *lane.block;
  const u32 offset = address & ((1u << kRankShift) - 1);
  if (block.mbarriers.count(offset)) {
    report(&lane, "mbarrier", site, "the mbarrier is initialised again with no inval between");
    return;
  }
  at(lane, 's', address, 8, {site, "mbarrier.init", true});
  for (u32 i = 0; i < 8; ++i) block.shared.flags[offset + i] |= kBarrier;
  if (block.slots_used == kBarrierSlots) {
    report(&lane, "mbarrier", site, "more than %u mbarriers in a block", kBarrierSlots);
    stop(lane);
  }
  MBarrier& b = block.mbarriers[offset];
  b.count = b.pending = count;
  b.slot = block.slots_used++;
  b.init_lane = &lane, b.init_clock = lane.clocks[lane.index], b.init_site = site;
}

void mbarrier_init_fence(Lane& lane) { lane.init_fence = lane.clocks[lane.index]++; }

void mbarrier_inval(Lane& lane, u32 address, u32 site) {
  find_mbarrier(lane, address, site);
  const u32 offset = address & ((1u << kRankShift) - 1);
  lane.block->mbarriers.erase(offset);
  for (u32 i = 0; i < 8; ++i) lane.block->shared.flags[offset + i] &= u8(~(kBarrier | kWritten));
}

u64 mbarrier_arrive(Lane& lane, u32 address, u32 count, s64 expect, u32 site) {
  MBarrier& b = *find_mbarrier(lane, address, site);
  b.bytes += expect;
  if (b.bytes >= 1 << 20)
    report(&lane, "mbarrier", site, "the phase expects %lld bytes, more than 2^20 - 1", static_cast<long long>(b.bytes));
  raise(b.clocks, lane.clocks, lane.team->width);
  ++lane.clocks[lane.index];
  const u64 state = b.generation;
  if (b.pending < count) {
    report(&lane, "mbarrier", site, "more arrivals than the %u of the phase", b.count);
    stop(lane);
  }
  b.pending -= count;
  complete_phase(*lane.team, shared_block(lane, address), b);
  return state;
}

void mbarrier_expect(Lane& lane, u32 address, u32 bytes, u32 site) { find_mbarrier(lane, address, site)->bytes += bytes; }

bool mbarrier_test(Lane& lane, u32 address, u64 state, bool parity, bool wait, u32 site) {
  MBarrier* b = find_mbarrier(lane, address, site);
  const auto done = [&] { return parity ? (b->generation & 1) != (state & 1) : b->generation > state; };
  if (!wait && !done()) pause(lane, site);
  while (wait && !done()) {
    b->waiting.push_back(&lane);
    block_on(lane, "an mbarrier", site);
    b = find_mbarrier(lane, address, site);
  }
  if (!done()) return false;
  raise(lane.clocks, b->done);
  return true;
}

void complete_bytes(Team& team, Block& block, MBarrier& b, u32 bytes) {
  b.bytes -= bytes;
  complete_phase(team, block, b);
}

void mbarrier_copies_arrive(Lane& lane, u32 address, bool no_increment, u32 site) {
  MBarrier& b = *find_mbarrier(lane, address, site);
  const u16 index = slot_index(*lane.team, shared_block(lane, address), b);
  land_copies(lane, lane.copies.open, index, b.generation + 1);
  for (auto& group : lane.copies.closed) land_copies(lane, group, index, b.generation + 1);
  if (!no_increment) ++b.pending;
  mbarrier_arrive(lane, address, 1, 0, site);
}

// ---- the end of a lane -------------------------------------------------------------------------------------------------------------

void lane_exit(Lane& lane) {
  if (!lane.copies.empty())
    report(&lane, "exit", (lane.copies.open.empty() ? lane.copies.closed.front() : lane.copies.open).front().site,
           "the thread ends with a cp.async that it has not waited for");
  if (!lane.stores.empty()) report(&lane, "exit", 0, "the thread ends while a bulk store may still read shared memory");
  if (!lane.wgmmas.empty()) report(&lane, "exit", 0, "the thread ends with a wgmma that it has not waited for");
  Block& block = *lane.block;
  ++block.exited;
  block.alive[lane.warp] &= ~(1u << lane.lane);
  for (Barrier& b : block.barriers)
    if (!b.need) complete_if_all_came(lane, b);
  for (size_t i = block.warps[lane.warp].size(); i-- > 0;)
    if (block.warps[lane.warp][i].arrived) execute_if_all_came(lane, i);
  ClusterBarrier& cluster = lane.team->cluster;
  if (cluster.arrived && cluster.arrived + lane.team->done + 1 >= lane.team->lane_count) {
    cluster.arrived += 1;
    complete_cluster(*lane.team);
  }
}

}  // namespace emu
