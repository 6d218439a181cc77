// Addresses of a CUDA program: the windows of shared memory of the blocks of a cluster, and generic addresses, which here are pointers
// of the host.
#include "machine.h"

namespace emu {
namespace {

constexpr u32 kOffset = (1u << kRankShift) - 1;

// The block of the own team whose shared memory holds a generic address.
Block* owner(Lane& lane, u64 address, u32* offset) {
  for (Block& block : lane.team->blocks) {
    const u64 o = address - reinterpret_cast<u64>(block.shared.data);
    if (o < kWindow) {
      *offset = u32(o);
      return &block;
    }
  }
  return nullptr;
}

}  // namespace

Block& shared_block(Lane& lane, u32 address) {
  const u32 rank = address >> kRankShift;
  if (rank == lane.block->rank) return *lane.block;
  if (rank >= lane.team->blocks.size()) {
    report(&lane, "cluster", lane.site, "shared address 0x%x is in block %u of a cluster of %zu", address, rank, lane.team->blocks.size());
    stop(lane);
  }
  Block& block = lane.team->blocks[rank];
  if (block.exited == lane.team->launch->block.count())
    report(&lane, "cluster", lane.site, "the shared memory of block %u of the cluster is accessed after that block has ended", rank);
  return block;
}

Memory& shared_memory(Lane& lane, u32 address, u64* offset) {
  *offset = address & kOffset;
  return shared_block(lane, address).shared;
}

u64 to_generic(Lane& lane, u32 address) { return reinterpret_cast<u64>(shared_block(lane, address).shared.data) + (address & kOffset); }

u32 to_shared(Lane& lane, u64 address, u32 site) {
  u32 offset;
  if (const Block* block = owner(lane, address, &offset)) return block->rank << kRankShift | offset;
  report(&lane, "out-of-bounds", site, "a generic address that is not of shared memory is taken for one");
  stop(lane);
}

u32 space_of(Lane& lane, u64 address) {
  u32 offset;
  if (address - reinterpret_cast<u64>(global_memory().data) < global_memory().size) return 'g';
  if (owner(lane, address, &offset)) return 's';
  if (address >= reinterpret_cast<u64>(lane.stack_low) && address < reinterpret_cast<u64>(lane.stack_high)) return 'l';
  const auto& params = lane.team->launch->params;
  return address - reinterpret_cast<u64>(params.data()) < params.size() ? 'p' : 0;
}

u32 map_rank(Lane& lane, u32 address, u32 rank, u32 site) {
  if (rank >= lane.team->blocks.size()) {
    report(&lane, "cluster", site, "mapa to block %u of a cluster of %zu", rank, lane.team->blocks.size());
    stop(lane);
  }
  return rank << kRankShift | (address & kOffset);
}

}  // namespace emu
