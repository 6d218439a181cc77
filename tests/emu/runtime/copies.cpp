// Copies that go on beside the threads: cp.async, and the bulk copies of Hopper with and without a tensor map (TMA). When data arrives,
// between issue and the wait for it, is a matter of the seed; until the wait the bytes may be neither read nor written.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

constexpr u32 kOffset = (1u << kRankShift) - 1;

u8* global_bytes(u64 address) { return reinterpret_cast<u8*>(address); }

// Checks an access to global memory of any length. Other than at(), no alignment.
bool touch_global(Lane& lane, u64 address, u64 bytes, const Access& access) {
  Memory& memory = global_memory();
  const u64 offset = address - reinterpret_cast<u64>(memory.data);
  if (offset >= memory.size || offset + bytes > memory.size) {
    report(&lane, "out-of-bounds", access.site, "%s at 0x%llx, which is not global memory", access.what,
           static_cast<unsigned long long>(address));
    return false;
  }
  bool mine = true;
  for (u64 done = 0; done < bytes;) {  // by line: that is what touch() locks
    const u32 step = u32(std::min<u64>(bytes - done, 64 - ((offset + done) & 63)));
    mine &= touch(memory, offset + done, step, lane, access);
    done += step;
  }
  return mine;
}

// The bytes of a shared array that a copy goes to or comes from.
bool touch_shared(Lane& lane, Block& block, u32 offset, u32 bytes, const Access& access) {
  if (offset + bytes > kWindow) {
    report(&lane, "out-of-bounds", access.site, "%s at offset %u of shared memory", access.what, offset);
    return false;
  }
  if (access.write) check_async_readers(lane, block, offset, bytes, access.site, access.what);
  return touch(block.shared, offset, bytes, lane, access);
}

void mark_busy(Block& block, u32 offset, u32 bytes, int change) {
  for (u32 o = offset / 16; o < (offset + bytes + 15) / 16; ++o) block.busy[o] = u16(block.busy[o] + change);
}

}  // namespace

void check_async_readers(Lane& lane, Block& block, u64 offset, u32 bytes, u32 site, const char* what) {
  for (u64 o = offset / 16; o < (offset + bytes + 15) / 16; ++o) {
    if (!block.busy[o]) continue;
    report(&lane, "async", site, "%s writes %s while a wgmma or a bulk store may still read it", what,
           describe(block.shared, std::max(offset, o * 16)).c_str());
    return;
  }
}

// ---- cp.async --------------------------------------------------------------------------------------------------------------------

void cp_async(Lane& lane, u32 dst, u64 src, u32 bytes, u32 src_bytes, u32 site) {
  const u32 offset = dst & kOffset;
  if ((dst | src) & (bytes - 1)) {
    report(&lane, "misaligned", site, "cp.async of %u bytes from or to an address that is no multiple of them", bytes);
    return;
  }
  if (src_bytes > bytes) report(&lane, "async", site, "cp.async copies %u of %u bytes", src_bytes, bytes);
  if (src_bytes && !touch_global(lane, src, src_bytes, {site, "cp.async"})) src_bytes = 0;
  if (!touch_shared(lane, *lane.block, offset, bytes, {site, "cp.async", true, false, true})) return;
  lane.copies.open.push_back({offset, global_bytes(src), bytes, src_bytes, site, false});
  if (random(lane) & 1) {
    Copy& c = lane.copies.open.back();
    memcpy(lane.block->shared.data + offset, c.src, src_bytes);
    memset(lane.block->shared.data + offset + src_bytes, 0, bytes - src_bytes);
    c.landed = true;
  }
}

void land_copies(Lane& lane, std::vector<Copy>& copies, u16 index, u32 clock) {
  for (Copy& c : copies) {
    u8* to = lane.block->shared.data + c.dst;
    if (!c.landed) memcpy(to, c.src, c.src_bytes), memset(to + c.src_bytes, 0, c.bytes - c.src_bytes);
    land(lane.block->shared, c.dst, c.bytes, lane.team->serial, index, clock, c.site);
    // cp.async writes through the generic proxy: TMA and wgmma see it only past a fence.
    for (u32 i = 0; i < c.bytes; ++i) lane.block->shared.flags[c.dst + i] |= kGeneric;
  }
  copies.clear();
}

void cp_async_commit(Lane& lane) { lane.copies.commit(); }

void cp_async_wait(Lane& lane, u32 allowed) {
  for (; lane.copies.closed.size() > allowed; lane.copies.retire())
    land_copies(lane, lane.copies.closed.front(), u16(lane.index), lane.clocks[lane.index]);
}

// ---- bulk copies -------------------------------------------------------------------------------------------------------------------

namespace {

// Calls row(offset in the box, global address, bytes before the first one inside, bytes inside) for each innermost row of the box.
template <class F>
void for_rows(const TensorMap& map, const int* at, F row) {
  const u32 row_bytes = map.box[0] * map.element;
  u64 rows = 1;
  for (u32 d = 1; d < map.rank; ++d) rows *= map.box[d];
  const s64 low = std::clamp<s64>(-s64(at[0]), 0, map.box[0]), high = std::clamp<s64>(s64(map.dims[0]) - at[0], low, map.box[0]);
  for (u64 r = 0; r < rows; ++r) {
    u64 address = map.base + u64(s64(at[0]) + low) * map.element, rest = r;
    bool inside = high > low;
    for (u32 d = 1; d < map.rank; ++d) {
      const s64 x = at[d] + s64(rest % map.box[d]);
      rest /= map.box[d];
      inside &= x >= 0 && x < s64(map.dims[d]);
      address += u64(x) * map.strides[d];
    }
    row(u32(r) * row_bytes, address, u32(low) * map.element, inside ? u32(high - low) * map.element : 0);
  }
}

u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.element;
  for (u32 d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// Where the byte at `offset` of shared memory lies: 16-byte pieces change places within groups of 128 bytes · swizzle / 16.
u32 swizzled(const TensorMap& map, u32 offset) {
  const u32 bits = map.swizzle == 128 ? 7 : map.swizzle == 64 ? 3 : map.swizzle == 32 ? 1 : 0;
  return offset ^ (offset >> 7 & bits) << 4;
}

void copy_swizzled(const TensorMap& map, u8* shared, u32 offset, u8* linear, u32 bytes, bool to_shared) {
  for (u32 i = 0; i < bytes;) {
    const u32 step = std::min(bytes - i, 16 - ((offset + i) & 15));
    u8* s = shared + swizzled(map, offset + i);
    memcpy(to_shared ? s : linear + i, to_shared ? linear + i : s, step);
    i += step;
  }
}

void place(const BulkLoad& load, u8* shared) {
  if (!load.map.rank) {
    memcpy(shared + load.dst, global_bytes(load.src), load.bytes);
    return;
  }
  std::vector<u8> line(load.map.box[0] * load.map.element);
  for_rows(load.map, load.at, [&](u32 offset, u64 address, u32 skip, u32 bytes) {
    std::fill(line.begin(), line.end(), u8(0));
    memcpy(line.data() + skip, global_bytes(address), bytes);
    copy_swizzled(load.map, shared, load.dst + offset, line.data(), u32(line.size()), true);
  });
}

// The map at a generic address: a parameter of the kernel or global memory.
const TensorMap* tensor_map(Lane& lane, u64 address, int rank, u32 site) {
  const Launch& launch = *lane.team->launch;
  const u64 params = reinterpret_cast<u64>(launch.params.data()), global = reinterpret_cast<u64>(global_memory().data);
  const bool readable = address - params + 128 <= launch.params.size() || address - global + 128 <= global_memory().size;
  const auto* map = reinterpret_cast<const TensorMap*>(address);
  if (address % 64 || !readable || map->magic != kTensorMapMagic || (rank && int(map->rank) != rank)) {
    report(&lane, "tensor-map", site, "no tensor map of rank %d lies at this address", rank);
    stop(lane);
  }
  return map;
}

void start_load(Lane& lane, BulkLoad load, u32 dst, u32 barrier, u32 ranks, const char* what) {
  if (!ranks) ranks = 1u << (dst >> kRankShift);
  load.dst = dst & kOffset, load.barrier = barrier & kOffset, load.ranks = u16(ranks), load.lane = &lane, load.team = lane.team;
  if (ranks >> lane.team->blocks.size()) {
    report(&lane, "cluster", load.site, "%s to blocks %x of a cluster of %zu", what, ranks, lane.team->blocks.size());
    return;
  }
  const u32 align = load.map.rank ? 128 : 16;
  if (load.dst % align || load.bytes % 16)
    report(&lane, "misaligned", load.site, "%s of %u bytes to offset %u, which must be a multiple of %u", what, load.bytes, load.dst,
           align);
  for (Block& block : lane.team->blocks) {
    if (!(ranks >> block.rank & 1)) continue;
    find_mbarrier(lane, block.rank << kRankShift | load.barrier, load.site, true);
    check_proxy(block.shared, load.dst, load.bytes, lane, load.site, what);
    if (!touch_shared(lane, block, load.dst, load.bytes, {load.site, what, true, false, true})) return;
  }
  loads_in_flight(lane).push_back(load);
}

}  // namespace

void land_bulk_load(std::vector<BulkLoad>& loads, u64 choice) {
  const size_t which = choice % loads.size();
  const BulkLoad load = loads[which];
  loads.erase(loads.begin() + std::ptrdiff_t(which));
  for (Block& block : load.team->blocks) {
    if (!(load.ranks >> block.rank & 1)) continue;
    auto barrier = block.mbarriers.find(load.barrier);
    if (barrier == block.mbarriers.end()) continue;
    place(load, block.shared.data);
    land(block.shared, load.dst, load.bytes, load.team->serial, slot_index(*load.team, block, barrier->second),
         barrier->second.generation + 1, load.site);
    complete_bytes(*load.team, block, barrier->second, load.bytes);
  }
}

void bulk_load(Lane& lane, u32 dst, u64 src, u32 bytes, u32 barrier, u32 ranks, u32 site) {
  if (src % 16 || !bytes) report(&lane, "misaligned", site, "cp.async.bulk of %u bytes from an address that is no multiple of 16", bytes);
  if (!touch_global(lane, src, bytes, {site, "cp.async.bulk"})) return;
  BulkLoad load{};
  load.src = src, load.bytes = bytes, load.site = site;
  start_load(lane, load, dst, barrier, ranks, "cp.async.bulk");
}

void tensor_load(Lane& lane, u32 dst, u64 map, const int* at, int rank, u32 barrier, u32 ranks, u32 site) {
  BulkLoad load{};
  load.map = *tensor_map(lane, map, rank, site), load.site = site, load.bytes = box_bytes(load.map);
  std::copy(at, at + rank, load.at);
  bool readable = true;
  for_rows(load.map, at,
           [&](u32, u64 address, u32, u32 bytes) { readable &= !bytes || touch_global(lane, address, bytes, {site, "the TMA load"}); });
  if (readable) start_load(lane, load, dst, barrier, ranks, "the TMA load");
}

// ---- bulk stores -------------------------------------------------------------------------------------------------------------------

namespace {

void write_out(Block& block, BulkStore& s) {
  if (std::exchange(s.landed, true)) return;
  if (!s.map.rank) {
    memcpy(global_bytes(s.dst), block.shared.data + s.src, s.bytes);
    return;
  }
  std::vector<u8> line(s.map.box[0] * s.map.element);
  for_rows(s.map, s.at, [&](u32 offset, u64 address, u32 skip, u32 bytes) {
    copy_swizzled(s.map, block.shared.data, s.src + offset, line.data(), u32(line.size()), false);
    memcpy(global_bytes(address), line.data() + skip, bytes);
  });
}

void start_store(Lane& lane, BulkStore s, const char* what) {
  Block& block = *lane.block;
  s.src &= kOffset;
  const u32 align = s.map.rank ? 128 : 16;
  if (s.src % align || s.bytes % 16)
    report(&lane, "misaligned", s.site, "%s of %u bytes from offset %u, which must be a multiple of %u", what, s.bytes, s.src, align);
  if (!touch_shared(lane, block, s.src, s.bytes, {s.site, what})) return;
  check_proxy(block.shared, s.src, s.bytes, lane, s.site, what);
  mark_busy(block, s.src, s.bytes, 1);
  if (random(lane) & 1) write_out(block, s);
  lane.stores.open.push_back(s);
}

}  // namespace

void bulk_store(Lane& lane, u64 dst, u32 src, u32 bytes, u32 site) {
  if (dst % 16 || !bytes) report(&lane, "misaligned", site, "cp.async.bulk of %u bytes to an address that is no multiple of 16", bytes);
  if (!touch_global(lane, dst, bytes, {site, "cp.async.bulk", true})) return;
  BulkStore s{};
  s.dst = dst, s.src = src, s.bytes = bytes, s.site = site;
  start_store(lane, s, "cp.async.bulk");
}

void tensor_store(Lane& lane, u64 map, const int* at, int rank, u32 src, u32 site) {
  BulkStore s{};
  s.map = *tensor_map(lane, map, rank, site), s.src = src, s.site = site, s.bytes = box_bytes(s.map);
  std::copy(at, at + rank, s.at);
  bool writable = true;
  for_rows(s.map, at, [&](u32, u64 address, u32, u32 bytes) {
    writable &= !bytes || touch_global(lane, address, bytes, {site, "the TMA store", true});
  });
  if (writable) start_store(lane, s, "the TMA store");
}

void bulk_commit(Lane& lane) { lane.stores.commit(); }

void bulk_wait(Lane& lane, u32 allowed) {
  for (; lane.stores.closed.size() > allowed; lane.stores.retire())
    for (BulkStore& s : lane.stores.closed.front()) {
      write_out(*lane.block, s);
      mark_busy(*lane.block, s.src, s.bytes, -1);
      touch(lane.block->shared, s.src, s.bytes, lane, {s.site, "the bulk store"});  // its read lasts until here
    }
}

void check_tensor_map(Lane& lane, u64 map, u32 site) { tensor_map(lane, map, 0, site); }

}  // namespace emu
