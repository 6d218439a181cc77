// The emulated GPU: a launch is a grid of teams (clusters of blocks), a team is run by one worker, a CUDA thread is a Lane with a stack
// of its own. Lanes of a worker take turns: one runs until it waits for others. Everything that PTX asks for and that is not plain
// arithmetic (ops.h) is declared here; the generated code calls it with the lane it runs for and the site of the instruction.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "types.h"

namespace emu {

struct Dim3 {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64(x) * y * z; }
};

// Where a PTX instruction comes from: a line, and the line that an inlined function was called from.
struct Site {
  const char* file;
  int line;
  const char* caller_file;
  int caller_line;
};
u32 add_sites(const Site* sites, u32 count);  // the number of the first
std::string where(u32 site);

struct Lane;
struct Span {
  u32 offset, bytes;
};
struct Kernel {
  const char* name;
  int arch;  // 80 or 90
  void (*run)(Lane&, const u8* params);
  std::vector<Span> params;
  std::vector<Span> shared;  // its static arrays in the shared window, apart from each other so that overruns are seen
  u32 dynamic_offset;
  u32 max_threads;
  Dim3 cluster;  // required by the kernel; else 1
};
struct RegisterKernel {
  explicit RegisterKernel(Kernel kernel);
};
const Kernel* find_kernel(const std::string& name, int arch);
u64 add_global(const char* name, u64 bytes, u64 align, const u8* init, u64 init_bytes);  // a __device__ or __constant__ variable

enum class Order : int { in_order, reverse, greedy, random };
struct Options {
  u64 seed = 1;
  Order order = Order::random;
  int workers = 2;   // processor threads that share the blocks of a grid; results that depend on the order of blocks need 1
  int resident = 1;  // teams that a worker runs at a time, interleaved
  int arch = 80;
};

// ---- memory and its shadow -------------------------------------------------------------------------------------------------------

// Flags of one byte.
enum : u8 {
  kAllocated = 1,
  kWritten = 2,
  kInFlight = 4,  // an asynchronous copy into it has not been waited for
  kReadOnly = 8,
  kGeneric = 16,  // last written by an ordinary store, which the async proxy (TMA, wgmma) sees only past a fence
  kBarrier = 32,  // part of a live mbarrier
  kSplit = 64,    // on the first byte of a word: its bytes have been accessed apart, so each has its own cell
};

// Who made an access: clock `clock` of lane `index` of a team; the indices beyond the lanes stand for the phases of mbarriers.
struct Stamp {
  u32 team = 0, clock = 0, site = 0;
  u16 index = 0;
  bool strong = false;  // atomic, volatile or with a memory order
  bool many = false;    // of the last read kept in a cell: there are more, in Memory::readers
};
struct Cell {
  Stamp write;
  Stamp reads[4];  // that nothing orders before each other; four warps often read the same tile
};

struct Memory {
  u8* data = nullptr;
  u8* flags = nullptr;
  Cell* cells = nullptr;  // of a word: the first byte's, unless the word is split
  u64 size = 0;
  bool global = false;
  std::unordered_map<u64, std::vector<Stamp>> readers;
};

constexpr u32 kWindow = 1 << 19;  // bytes between the shared memories of a cluster's blocks; the largest block has 227 KiB
constexpr u32 kRankShift = 24;    // a shared address is (rank in cluster) << 24 | offset
constexpr u32 kMaxDynamic = 227 * 1024;
constexpr u32 kBarrierSlots = 64;  // mbarriers of a block

struct Access {
  u32 site;
  const char* what;
  bool write = false, strong = false, async = false;
};

// What other teams' threads have made visible to a lane, or a lane to others: clocks by team. See memory.cpp.
struct Entry {
  std::vector<u32> clocks;
  bool block_only = false;  // published by a fence of block scope
};
using Knowledge = std::map<u32, Entry>;
using Known = std::shared_ptr<const Knowledge>;

// ---- threads ---------------------------------------------------------------------------------------------------------------------

struct Copy {  // cp.async
  u32 dst;
  const u8* src;
  u32 bytes, src_bytes, site;
  bool landed;
};
struct TensorMap {  // what cuTensorMapEncodeTiled of the stand-in writes into the 128 bytes of a CUtensorMap
  u32 magic, element, rank, swizzle;
  u64 base, dims[5], strides[5];
  u32 box[5];
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u32 kTensorMapMagic = 0x50414d54;

struct BulkStore {  // cp.async.bulk from shared memory: reads it some time before its group has been waited for
  TensorMap map;
  u64 dst;  // where the map is unused
  u32 src, bytes, site;
  int at[5];
  bool landed;
};
struct BulkLoad {  // cp.async.bulk into shared memory, on its way
  TensorMap map;
  u64 src;
  u32 dst, bytes, site, barrier;
  int at[5];
  u16 ranks;  // blocks of the cluster that it goes to
  Lane* lane;
  struct Team* team;
};

template <class T>
struct Groups {  // asynchronous operations of a lane: not committed yet, and committed
  std::vector<T> open;
  std::deque<std::vector<T>> closed;
  std::vector<std::vector<T>> spare;  // a kernel commits at every step: their memory is used again
  void commit() {
    closed.push_back(std::move(open));
    open = spare.empty() ? std::vector<T>() : std::move(spare.back());
    if (!spare.empty()) spare.pop_back();
  }
  void retire() {  // the oldest group
    closed.front().clear();
    spare.push_back(std::move(closed.front()));
    closed.pop_front();
  }
  bool empty() const { return open.empty() && closed.empty(); }
};

struct Accumulator {  // of wgmmas in flight: its registers hold poison until the last of them has been waited for
  std::vector<u32*> regs;
  std::vector<u32> values;
  u32 pending;
};
struct PendingWgmma {
  u32* accumulator;                // the first register
  std::vector<const u32*> inputs;  // registers that it may still read
  std::vector<u32> chunks;         // 16-byte pieces of shared memory that it may still read
  u32 site;
};

enum class State : u8 { ready, blocked, yielded, done };

struct Lane {
  void* sp = nullptr;
  u8 *stack_low = nullptr, *stack_high = nullptr;
  struct Block* block = nullptr;
  struct Team* team = nullptr;
  struct Worker* worker = nullptr;
  u32* clocks = nullptr;  // what it knows of every index of the team
  u32 index = 0;          // in the team
  u32 id = 0, warp = 0, lane = 0, ready_at = 0;
  Dim3 thread;
  State state = State::ready;
  const char* waits_for = nullptr;
  u32 site = 0;      // where it waits
  u64 branches = 0;  // backward branches taken
  Groups<Copy> copies;
  Groups<BulkStore> stores;
  Groups<PendingWgmma> wgmmas;
  std::deque<Accumulator> accumulators;
  bool wgmma_fenced = false;
  bool in_cluster_barrier = false;
  u32 cluster_phase = 0, barrier_result = 0, init_fence = 0;  // init_fence: own clock at the last fence.mbarrier_init
  std::vector<u32> proxy_fences;                              // own clocks at fence.proxy.async
  std::vector<u32> proxy_known;                               // clocks at the last one
  Known acquired, seen, published;
};

struct Collective {  // a warp instruction that some lanes have reached
  u32 mask, arrived, site;
  const void* op;
  long variant;
  std::array<void*, 32> arg;
};
struct Barrier {                         // bar.sync, bar.arrive and bar.red
  u32 need = 0, arrived = 0, trues = 0;  // need 0: every thread of the block that has not ended
  std::vector<Lane*> waiting;
  std::vector<u32> clocks;      // of those that arrived and went on
  std::array<u32, 32> sites{};  // where the lanes of each warp wait
};
struct MBarrier {
  u32 count = 0, pending = 0, slot = 0, generation = 0;  // generation: phases that have completed
  s64 bytes = 0;                                         // that the running phase still expects
  std::vector<u32> clocks, done;                         // of all arrivals, and of those in completed phases
  std::vector<Lane*> waiting;
  Lane* init_lane = nullptr;
  u32 init_clock = 0, init_site = 0;
};
struct ClusterBarrier {
  u32 arrived = 0, generation = 0;
  std::vector<u32> clocks, done;
  std::vector<Lane*> waiting;
};
struct WarpgroupCall {
  u32 arrived = 0, site = 0;
  std::array<void*, 128> arg;
};

struct Block {
  u32 rank = 0, exited = 0;
  Dim3 index;
  Memory shared;
  std::vector<u32> alive;  // lanes that have not ended, by warp
  std::vector<u16> busy;   // per 16 bytes: wgmmas and bulk stores that may still read them
  std::vector<std::vector<Collective>> warps;
  std::array<Barrier, 16> barriers;
  std::unordered_map<u32, MBarrier> mbarriers;
  std::vector<WarpgroupCall> warpgroups;
  u32 slots_used = 0;
};

struct Team {
  struct Launch* launch = nullptr;
  struct Worker* worker = nullptr;
  u32 serial = 0, slot = 0, lane_count = 0, width = 0, done = 0, grid_index = 0;
  bool live = false, knowledge = false;  // knowledge: a fence has been executed
  std::deque<Block> blocks;
  std::deque<Lane> lanes;
  std::vector<u32> clocks;  // lane_count rows of `width`: lanes, mbarrier slots, and whether griddepcontrol.wait is past
  ClusterBarrier cluster;
};

struct Launch {
  const Kernel* kernel = nullptr;
  Dim3 grid, block, cluster;
  u32 dynamic_bytes = 0;
  alignas(64) std::array<u8, 4096> params{};
  Options options;
  u32 first_serial = 0, stream = 0, number = 0;
  std::vector<u32> order;  // of the teams
  std::atomic<u32> next{0};
  std::atomic<bool> stopped{false}, waited{false};
  bool parallel = false;
  std::vector<u32> before, after;  // per stream: launches that have ended, before and after griddepcontrol.wait
};

extern std::atomic<u64> mma_count;

// ---- reports ---------------------------------------------------------------------------------------------------------------------
void report(const Lane* lane, const char* kind, u32 site, const char* format, ...) __attribute__((format(printf, 4, 5)));
std::string reports(bool clear);
void forget_repeats();               // a mistake is reported once a launch
[[noreturn]] void stop(Lane& lane);  // ends the launch: its state has become meaningless

// ---- launching and scheduling ----------------------------------------------------------------------------------------------------
void run(Launch& launch);
void block_on(Lane& lane, const char* what, u32 site);  // until another lane wakes it
void wake(Lane& lane);
void take_turns(Lane& lane);       // the lane can go on, and so can others that it has just woken
void pause(Lane& lane, u32 site);  // lets others run: a lane that polls would keep them from it
void many_branches(Lane& lane, u32 site);
u64 random(Lane& lane);
std::vector<BulkLoad>& loads_in_flight(Lane& lane);
void land_bulk_load(std::vector<BulkLoad>& loads, u64 choice);
inline void back_edge(Lane& lane, u32 site) {
  if ((++lane.branches & 0xffff) == 0) many_branches(lane, site);
}

// ---- memory ----------------------------------------------------------------------------------------------------------------------
u8* map_pages(u64 bytes);  // zeros, which take room when they are touched
Memory& global_memory();
u64 allocate(u64 bytes, const char* name, u64 align = 256, bool permanent = false);  // permanent: a reset leaves it
void protect(u64 address, u64 bytes, bool read_only);
bool host_access(u64 address, u64 bytes, bool write, const std::vector<u32>& known);
void reset_memory();
std::string describe(const Memory& memory, u64 offset);
const Launch* launch_of(u32 team);
Launch& new_launch();
u32 new_serials(u32 count);

// The memory behind an address, or null with a report. Space letters: g global, s shared, l local, a any (generic).
u8* at(Lane& lane, char space, u64 address, u32 bytes, const Access& access);
bool touch(Memory& memory, u64 offset, u32 bytes, Lane& lane, const Access& access);         // false: not this lane's to access
void land(Memory& memory, u64 offset, u32 bytes, u32 team, u16 index, u32 clock, u32 site);  // an asynchronous write has become visible
void check_proxy(Memory& memory, u64 offset, u32 bytes, Lane& lane, u32 site, const char* what);
Block& shared_block(Lane& lane, u32 address);
Memory& shared_memory(Lane& lane, u32 address, u64* offset);
u64 to_generic(Lane& lane, u32 address);
u32 to_shared(Lane& lane, u64 address, u32 site);
u32 space_of(Lane& lane, u64 address);  // 'g', 's', 'l' or 0
u32 map_rank(Lane& lane, u32 address, u32 rank, u32 site);
void fence(Lane& lane, bool block_scope);
void proxy_fence(Lane& lane);
void join_knowledge(const std::vector<Lane*>& lanes);
// Around an atomic access: `release` and `acquire` say which memory order it has by itself.
u8* atomic_begin(Lane& lane, char space, u64 address, u32 bytes, u32 site, bool read, bool write, bool acquire, bool release);
void atomic_end(Lane& lane, u64 address);

// ---- synchronisation -------------------------------------------------------------------------------------------------------------
using Execute = void (*)(Collective&, Block&, u32 warp);
void collective(Lane& lane, u32 mask, void* arg, Execute execute, long variant, const char* name, u32 site, bool any_site = false);
void bar_sync(Lane& lane, u32 id, u32 threads, u32 site);
void bar_arrive(Lane& lane, u32 id, u32 threads, u32 site);
u32 bar_reduce(Lane& lane, u32 id, bool value, int op, u32 site);  // 0 popc, 1 and, 2 or
void warp_sync(Lane& lane, u32 mask, u32 site);
u32 shuffle(Lane& lane, u32 value, int mode, u32 b, u32 c, u32 mask, u32 site, bool* valid);  // 0 idx, 1 up, 2 down, 3 bfly
u32 ballot(Lane& lane, bool value, u32 mask, u32 site);
u32 match_any(Lane& lane, u32 value, u32 mask, u32 site);
u32 redux(Lane& lane, u32 value, int op, u32 mask, u32 site);  // 0 add, 1 and, 2 or, 3 xor, 4 min.s, 5 max.s, 6 min.u, 7 max.u
bool elect(Lane& lane, u32 mask, u32 site);
void cluster_arrive(Lane& lane, bool release, u32 site);
void cluster_wait(Lane& lane, u32 site);
void grid_wait(Lane& lane);
void mbarrier_init(Lane& lane, u32 address, u32 count, u32 site);
void mbarrier_inval(Lane& lane, u32 address, u32 site);
u64 mbarrier_arrive(Lane& lane, u32 address, u32 count, s64 expect, u32 site);
void mbarrier_expect(Lane& lane, u32 address, u32 bytes, u32 site);
bool mbarrier_test(Lane& lane, u32 address, u64 state, bool parity, bool wait, u32 site);
void mbarrier_init_fence(Lane& lane);
void complete_bytes(Team& team, Block& block, MBarrier& barrier, u32 bytes);
u16 slot_index(const Team& team, const Block& block, const MBarrier& barrier);
void mbarrier_copies_arrive(Lane& lane, u32 address, bool no_increment, u32 site);
MBarrier* find_mbarrier(Lane& lane, u32 address, u32 site, bool by_async_proxy = false);

// ---- copies ----------------------------------------------------------------------------------------------------------------------
void cp_async(Lane& lane, u32 dst, u64 src, u32 bytes, u32 src_bytes, u32 site);
void cp_async_commit(Lane& lane);
void cp_async_wait(Lane& lane, u32 allowed);
void land_copies(Lane& lane, std::vector<Copy>& copies, u16 index, u32 clock);
void bulk_load(Lane& lane, u32 dst, u64 src, u32 bytes, u32 barrier, u32 ranks, u32 site);
void bulk_store(Lane& lane, u64 dst, u32 src, u32 bytes, u32 site);
void tensor_load(Lane& lane, u32 dst, u64 map, const int* at, int rank, u32 barrier, u32 ranks, u32 site);
void tensor_store(Lane& lane, u64 map, const int* at, int rank, u32 src, u32 site);
void bulk_commit(Lane& lane);
void bulk_wait(Lane& lane, u32 allowed);
void check_tensor_map(Lane& lane, u64 map, u32 site);

// ---- matrices --------------------------------------------------------------------------------------------------------------------
enum class Element : int { f16, bf16, s8, u8, s4, u4 };
void mma(Lane& lane, Element a_type, Element b_type, int k, bool half_sum, bool saturate, u32* d, const u32* a, const u32* b, const u32* c,
         u32 site);
void ldmatrix(Lane& lane, u32* d, int count, bool transposed, u32 address, u32 site);
void stmatrix(Lane& lane, const u32* s, int count, bool transposed, u32 address, u32 site);
u32 movmatrix(Lane& lane, u32 value, u32 site);
struct WgmmaShape {
  Element a, b;
  int n, k;
  bool half_sum;
};
void wgmma(Lane& lane, const WgmmaShape& shape, u32* const* d, int d_count, const u32* const* a_regs, u64 a, u64 b, bool scale_d,
           int negate_a, int negate_b, int transpose_a, int transpose_b, u32 site);
void wgmma_fence(Lane& lane);
void wgmma_commit(Lane& lane);
void wgmma_wait(Lane& lane, u32 allowed);
void use_register(Lane& lane, const void* reg, bool write, u32 site);  // an instruction names a register that a wgmma may hold
void check_async_readers(Lane& lane, Block& block, u64 offset, u32 bytes, u32 site, const char* what);
void lane_exit(Lane& lane);

}  // namespace emu
