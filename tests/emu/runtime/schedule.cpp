// Running a grid: lanes as fibers, and who goes next. A lane runs until it waits for others; then the worker picks another in the order
// that was asked for. Copies in flight land in between, at times that the seed decides.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "machine.h"

// Saves the callee-saved registers and the stack pointer of the running fiber and goes on with another.
extern "C" void emu_switch(void** save, void* to);
extern "C" void emu_enter();
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
.hidden emu_enter
.globl emu_enter
emu_enter:
  movq %rbx,%rdi
  xorl %ebp,%ebp
  call emu_fiber
  ud2
)");

namespace emu {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr u32 kBlocks = 64;             // that a worker can hold at a time
constexpr u64 kPolls = 500'000;         // rounds in which nobody does anything but poll: nothing will change any more
constexpr u64 kBranches = 400'000'000;  // backward branches of one lane: a loop whose end is missed
constexpr u32 kRedZone = 64;

}  // namespace

// A processor thread that runs teams, some of them at a time. It is kept for the next launch: its memory is expensive to map.
struct Worker {
  Launch* launch = nullptr;
  std::deque<Team> teams;
  std::vector<u8*> stacks;
  u8* data = map_pages(size_t(kBlocks) * kWindow);  // the shared memory of the blocks
  u8* flags = map_pages(size_t(kBlocks) * kWindow);
  Cell* cells = reinterpret_cast<Cell*>(map_pages(size_t(kBlocks) * kWindow * sizeof(Cell)));
  std::vector<u32> ready;  // a bit for each lane that can run, 32 to a warp
  u32 ready_count = 0;
  std::vector<Lane*> lane_at, yielded;
  std::vector<BulkLoad> loads;
  void* main_sp = nullptr;
  u64 random_state = 1, polls = 0;
  u32 favourite = 0;  // the warp that goes on for as long as it can

  u64 random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state;
  }
  void make_ready(Lane& lane) {
    lane.state = State::ready;
    ready[lane.ready_at / 32] |= 1u << lane.ready_at % 32, ++ready_count;
  }
  u8* stack(u32 at);
  bool start(Team& team);
  void start_block(Team& team, Block& block);
  void finish(Team& team);
  u32 choose_warp();
  Lane* pick();
  void report_deadlock();
  void work(Launch& l, u32 number);
};

extern "C" __attribute__((used, visibility("hidden"))) void emu_fiber(Lane* lane) {
  lane->team->launch->kernel->run(*lane, lane->team->launch->params.data());
  lane_exit(*lane);
  Worker& w = *lane->worker;
  lane->state = State::done;
  w.polls = 0;
  ++lane->team->done;
  // The main loop puts the next team in the place of one that has ended; it also looks into it when nobody can run.
  Lane* next = lane->team->done == lane->team->lane_count ? nullptr : w.pick();
  emu_switch(&lane->sp, next ? next->sp : w.main_sp);
  abort();
}

u8* Worker::stack(u32 at) {
  if (stacks.size() <= at) stacks.resize(at + 1);
  if (!stacks[at]) {
    stacks[at] = map_pages(kStack);
    mprotect(stacks[at], kGuard, PROT_NONE);
  }
  return stacks[at];
}

bool Worker::start(Team& team) {
  const u32 turn = launch->next.fetch_add(1);
  team.live = turn < launch->order.size();
  if (!team.live) return false;
  const u32 number = launch->order[turn], ranks = u32(launch->cluster.count()), threads = u32(launch->block.count());
  const Dim3 &c = launch->cluster, clusters{launch->grid.x / c.x, launch->grid.y / c.y, launch->grid.z / c.z};
  team.launch = launch, team.worker = this, team.serial = launch->first_serial + number;
  team.lane_count = ranks * threads, team.width = team.lane_count + ranks * kBarrierSlots + 1;
  team.done = 0, team.knowledge = false;
  team.clocks.assign(size_t(team.lane_count) * team.width, 0);
  team.cluster = {};
  team.blocks.resize(ranks), team.lanes.resize(team.lane_count);
  for (u32 r = 0; r < ranks; ++r) {
    Block& block = team.blocks[r];
    block.rank = r, block.exited = block.slots_used = 0;
    block.index = {number % clusters.x * c.x + r % c.x, number / clusters.x % clusters.y * c.y + r / c.x % c.y,
                   number / (clusters.x * clusters.y) * c.z + r / (c.x * c.y)};
    start_block(team, block);
  }
  return true;
}

void Worker::start_block(Team& team, Block& block) {
  const Kernel& kernel = *launch->kernel;
  const u32 at = team.slot * u32(launch->cluster.count()) + block.rank, threads = u32(launch->block.count()),
            padded = (threads + 31) / 32 * 32;
  block.shared = {data + size_t(at) * kWindow, flags + size_t(at) * kWindow, cells + size_t(at) * kWindow, kWindow, false, {}};
  const u32 end = std::min(kernel.dynamic_offset + launch->dynamic_bytes + kRedZone, kWindow);
  memset(block.shared.data, 0xff, end);
  memset(block.shared.flags, 0, kWindow);
  for (const Span& s : kernel.shared) memset(block.shared.flags + s.offset, kAllocated, s.bytes);
  memset(block.shared.flags + kernel.dynamic_offset, kAllocated, launch->dynamic_bytes);
  block.busy.assign(kWindow / 16, 0);
  block.alive.assign(padded / 32, ~0u);
  if (threads % 32) block.alive.back() = (1u << threads % 32) - 1;
  block.warps.assign(padded / 32, {});
  block.barriers.fill({});
  block.mbarriers.clear();
  block.warpgroups.assign((threads + 127) / 128, {});
  for (u32 t = 0; t < threads; ++t) {
    const u32 index = block.rank * threads + t;
    Lane& lane = team.lanes[index] = {};
    lane.block = &block, lane.team = &team, lane.worker = this, lane.clocks = &team.clocks[size_t(index) * team.width];
    lane.index = index, lane.id = t, lane.warp = t / 32, lane.lane = t % 32, lane.ready_at = at * padded + t;
    lane.thread = {t % launch->block.x, t / launch->block.x % launch->block.y, t / (launch->block.x * launch->block.y)};
    lane.clocks[index] = 1;
    lane.stack_low = stack(lane.ready_at) + kGuard, lane.stack_high = stack(lane.ready_at) + kStack;
    auto sp = reinterpret_cast<u64*>(lane.stack_high) - 2;  // aligned to 16 once the address of emu_enter is taken off
    *--sp = reinterpret_cast<u64>(&emu_enter);
    for (int i = 0; i < 6; ++i) *--sp = i == 1 ? reinterpret_cast<u64>(&lane) : 0;  // emu_switch takes rbx off as the last but one
    lane.sp = sp;
    lane_at[lane.ready_at] = &lane;
    make_ready(lane);
  }
}

void Worker::finish(Team& team) {
  std::erase_if(loads, [&](const BulkLoad& load) {
    if (load.team == &team) report(&team.lanes[0], "exit", load.site, "the block ends while a copy into its shared memory is on its way");
    return load.team == &team;
  });
  for (Block& block : team.blocks)
    for (auto& warp : block.warps)
      for (Collective& c : warp)
        report(&team.lanes[0], "divergence", c.site, "lanes %08x never came to where lanes %08x wait", c.mask & ~c.arrived, c.arrived);
}

u32 Worker::choose_warp() {
  const u32 n = u32(ready.size());
  switch (launch->options.order) {
    case Order::in_order:
      return u32(std::find_if(ready.begin(), ready.end(), [](u32 r) { return r; }) - ready.begin());
    case Order::reverse:
      return n - 1 - u32(std::find_if(ready.rbegin(), ready.rend(), [](u32 r) { return r; }) - ready.rbegin());
    case Order::greedy:
      if (ready[favourite]) return favourite;
      break;
    case Order::random:
      break;
  }
  u32 w = u32(random() % n);
  while (!ready[w]) w = w + 1 == n ? 0 : w + 1;
  return favourite = w;
}

Lane* Worker::pick() {
  for (;;) {
    if (launch->stopped.load(std::memory_order_relaxed)) return nullptr;
    if (!loads.empty() && (!ready_count || random() % 8 == 0)) land_bulk_load(loads, random());
    if (ready_count) break;
    if (!loads.empty()) continue;
    if (yielded.empty()) return nullptr;
    if (++polls > kPolls) {
      report(yielded[0], "livelock", yielded[0]->site, "threads poll memory that nobody will change");
      launch->stopped = true;
      return nullptr;
    }
    if (launch->parallel) std::this_thread::yield();
    for (Lane* lane : yielded) make_ready(*lane);
    yielded.clear();
  }
  const u32 warp = choose_warp(), lanes = ready[warp];
  u32 lane = u32(std::countr_zero(lanes));
  if (launch->options.order == Order::reverse) {
    lane = 31 - u32(std::countl_zero(lanes));
  } else if (launch->options.order != Order::in_order) {
    const u32 turn = u32(random() % 32);
    lane = (u32(std::countr_zero(std::rotr(lanes, int(turn)))) + turn) % 32;
  }
  ready[warp] &= ~(1u << lane), --ready_count;
  return lane_at[warp * 32 + lane];
}

void Worker::report_deadlock() {
  for (Team& team : teams) {
    if (!team.live) continue;
    std::map<std::string, int> waiting;
    const Lane* one = nullptr;
    for (Lane& lane : team.lanes)
      if (lane.state == State::blocked) ++waiting[std::string(lane.waits_for) + " at " + where(lane.site)], one = &lane;
    if (!one) continue;
    std::string text;
    for (const auto& [place, count] : waiting) text += ", " + std::to_string(count) + " wait in " + place;
    report(one, "deadlock", one->site, "%u thread(s) have ended%s", team.done, text.c_str());
  }
}

void Worker::work(Launch& l, u32 number) {
  launch = &l;
  const u32 ranks = u32(l.cluster.count()), slots = std::max(1u, std::min(u32(l.options.resident), kBlocks / ranks));
  const u32 padded = u32(l.block.count() + 31) / 32 * 32;
  ready.assign(size_t(slots) * ranks * padded / 32, 0);
  lane_at.assign(ready.size() * 32, nullptr);
  ready_count = favourite = 0, polls = 0;
  random_state = (l.options.seed * 2 + 1) * 0x9e3779b97f4a7c15ull + number;
  for (int i = 0; i < 8; ++i) random();
  yielded.clear(), loads.clear();
  teams.resize(slots);
  u32 live = 0;
  for (u32 s = 0; s < slots; ++s) teams[s].slot = s, live += start(teams[s]);
  while (live && !l.stopped) {
    Lane* next = pick();
    if (!next) {
      if (!l.stopped) report_deadlock();
      l.stopped = true;
      return;
    }
    emu_switch(&main_sp, next->sp);
    for (Team& team : teams)
      if (team.live && team.done == team.lane_count) {
        finish(team);
        live -= !start(team);
      }
  }
}

namespace {

std::map<std::pair<std::string, int>, Kernel>& kernels() {
  static std::map<std::pair<std::string, int>, Kernel> all;
  return all;
}

}  // namespace

RegisterKernel::RegisterKernel(Kernel kernel) { kernels()[{kernel.name, kernel.arch}] = std::move(kernel); }

const Kernel* find_kernel(const std::string& name, int arch) {
  auto found = kernels().find({name, arch});
  return found == kernels().end() ? nullptr : &found->second;
}

void run(Launch& launch) {
  static std::deque<Worker> workers(1);
  const u32 count = u32(launch.grid.count() / launch.cluster.count());
  launch.order.resize(count);
  for (u32 i = 0; i < count; ++i) launch.order[i] = launch.options.order == Order::reverse ? count - 1 - i : i;
  if (launch.options.order == Order::random || launch.options.order == Order::greedy) {
    u64 state = launch.options.seed * 0x2545f4914f6cdd1dull + 1;
    for (u32 i = count; i > 1; --i)
      std::swap(launch.order[i - 1], launch.order[(state = state * 6364136223846793005ull + 1442695040888963407ull) % i]);
  }
  const u32 threads = std::min(u32(std::max(1, launch.options.workers)), count);
  launch.parallel = threads > 1;
  if (workers.size() < threads) workers.resize(threads);
  forget_repeats();
  std::vector<std::thread> others;
  for (u32 w = 1; w < threads; ++w) others.emplace_back([&launch, w] { workers[w].work(launch, w); });
  workers[0].work(launch, 0);
  for (std::thread& t : others) t.join();
}

void block_on(Lane& lane, const char* what, u32 site) {
  lane.state = State::blocked;
  lane.waits_for = what, lane.site = site;
  Worker& w = *lane.worker;
  Lane* next = w.pick();
  if (next != &lane) emu_switch(&lane.sp, next ? next->sp : w.main_sp);
}

void take_turns(Lane& lane) {
  lane.worker->make_ready(lane);
  Lane* next = lane.worker->pick();
  if (next != &lane) emu_switch(&lane.sp, next ? next->sp : lane.worker->main_sp);
}

void wake(Lane& lane) {
  if (lane.state != State::blocked) return;
  lane.worker->polls = 0;
  lane.worker->make_ready(lane);
}

void pause(Lane& lane, u32 site) {
  Worker& w = *lane.worker;
  lane.state = State::yielded;
  lane.site = site;
  w.yielded.push_back(&lane);
  Lane* next = w.pick();
  if (next != &lane) emu_switch(&lane.sp, next ? next->sp : w.main_sp);
}

void stop(Lane& lane) {
  lane.team->launch->stopped = true;
  emu_switch(&lane.sp, lane.worker->main_sp);
  abort();
}

void many_branches(Lane& lane, u32 site) {
  if (lane.team->launch->stopped) stop(lane);
  if (lane.branches < kBranches) return;
  report(&lane, "runaway", site, "a loop has gone round %llu times", static_cast<unsigned long long>(lane.branches));
  stop(lane);
}

u64 random(Lane& lane) { return lane.worker->random(); }
std::vector<BulkLoad>& loads_in_flight(Lane& lane) { return lane.worker->loads; }

}  // namespace emu
