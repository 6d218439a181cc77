// wgmma.mma_async: executed when the last of the warpgroup's 128 lanes issues it, its results kept back until the wait. Meanwhile the
// registers of the accumulator hold poison, and the shared memory that it reads must not be written.
#include <algorithm>
#include <cstring>

#include "elements.h"
#include "machine.h"

namespace emu {
namespace {

constexpr u32 kPoison = 0x7fedbeef;  // a NaN

struct WgmmaArg {
  Lane* lane;
  const WgmmaShape* shape;
  std::vector<u32> sum;  // accumulator before, then after
  const u32* const* a_regs;
  u64 a, b;
  bool scale_d;
  int negate_a, negate_b, transpose_a, transpose_b;
};

// A matrix descriptor: where byte `kb` of row `r` of a K-major operand lies, or of an operand whose rows are contiguous ("MN-major").
u32 descriptor_offset(u64 d, u32 r, u32 k, u32 size, bool mn_major) {
  const u32 start = u32(d & 0x3fff) << 4, leading = u32(d >> 16 & 0x3fff) << 4, stride = u32(d >> 32 & 0x3fff) << 4;
  const u32 mode = u32(d >> 62), width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  u32 o;
  if (!mn_major) {
    const u32 kb = k * size;
    o = mode ? start + r / 8 * stride + r % 8 * width + kb : start + r / 8 * stride + kb / 16 * leading + r % 8 * 16 + kb % 16;
  } else {
    const u32 per = width / size;
    o = mode ? start + r / per * leading + k / 8 * stride + k % 8 * width + r % per * size
             : start + r / 8 * stride + k / 8 * leading + k % 8 * 16 + r % 8 * size;
  }
  const u32 bits = mode == 1 ? 7 : mode == 2 ? 3 : mode == 3 ? 1 : 0;
  return o ^ (o >> 7 & bits) << 4;
}

// Reads operands from shared memory; each 16-byte piece is checked once, on behalf of the first lane of one of the four warps.
class Operand {
 public:
  Operand(Lane& first, u32 site) : first_(first), memory_(first.block->shared), site_(site), seen_(kWindow / 16) {}

  float get(Element e, u64 descriptor, u32 r, u32 k, bool mn_major) {
    const u32 size = u32(element_bits(e)) / 8, o = descriptor_offset(descriptor, r, k, size, mn_major);
    if (o + size > kWindow) return 0;
    if (!seen_[o / 16]) look(o / 16);
    u16 bits = 0;
    memcpy(&bits, memory_.data + o, size);
    return element(e, bits, 0);
  }

 private:
  void look(u32 piece) {
    seen_[piece] = true;
    Lane& lane = first_.team->lanes[first_.index + piece % 4 * 32];
    if (!touch(memory_, piece * 16, 16, lane, {site_, "wgmma"})) return;
    check_proxy(memory_, piece * 16, 16, lane, site_, "wgmma");
    ++first_.block->busy[piece];
    lane.wgmmas.open.back().chunks.push_back(piece);
  }
  Lane& first_;
  Memory& memory_;
  u32 site_;
  std::vector<bool> seen_;
};

// Which element of the accumulator the i-th value of lane l of the warpgroup is.
struct Place {
  int row, col;
};
Place place(int l, int i) { return {l / 32 * 16 + l % 32 / 4 + 8 * (i / 2 % 2), i / 4 * 8 + l % 4 * 2 + i % 2}; }

void load_a(WarpgroupCall& call, Operand& memory, float (*a)[32]) {
  const auto& first = *static_cast<WgmmaArg*>(call.arg[0]);
  const WgmmaShape& s = *first.shape;
  const int per = 32 / element_bits(s.a);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < s.k; ++k) {
      if (!first.a_regs) {
        a[m][k] = memory.get(s.a, first.a, u32(m), u32(k), first.transpose_a);
        continue;
      }
      const auto& from = *static_cast<WgmmaArg*>(call.arg[size_t(m / 16 * 32 + m % 8 * 4 + k / per % 4)]);
      a[m][k] = element(s.a, *from.a_regs[m % 16 / 8 + 2 * (k / (4 * per))], k % per);
    }
}

void execute(WarpgroupCall& call, Lane& first_lane) {
  const auto& first = *static_cast<WgmmaArg*>(call.arg[0]);
  const WgmmaShape& s = *first.shape;
  const bool integer = s.a == Element::s8 || s.a == Element::u8;
  Operand memory(first_lane, call.site);
  std::vector<double> sums(64 * 256);
  auto a = std::make_unique<float[][32]>(64);
  load_a(call, memory, a.get());
  std::vector<double> b(size_t(s.k) * size_t(s.n));
  for (int n = 0; n < s.n; ++n)
    for (int k = 0; k < s.k; ++k) b[size_t(k * s.n + n)] = memory.get(s.b, first.b, u32(n), u32(k), first.transpose_b);
  const double sign = first.negate_a * first.negate_b;
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < s.k; ++k) {
      const double v = sign * a[size_t(m)][k];
      for (int n = 0; n < s.n; ++n) sums[size_t(m * 256 + n)] += v * b[size_t(k * s.n + n)];
    }
  for (int l = 0; l < 128; ++l) {
    auto& arg = *static_cast<WgmmaArg*>(call.arg[size_t(l)]);
    for (int i = 0; i < s.n / 2; ++i) {
      const Place p = place(l, i);
      const double v = sums[size_t(p.row * 256 + p.col)];
      if (s.half_sum) {
        u32& reg = arg.sum[size_t(i / 2)];
        const u32 shift = 16 * u32(i & 1), half = to_f16(v + (arg.scale_d ? from_f16(u16(reg >> shift)) : 0));
        reg = (reg & ~(0xffffu << shift)) | half << shift;
      } else if (integer) {
        arg.sum[size_t(i)] = u32(s64(v)) + (arg.scale_d ? arg.sum[size_t(i)] : 0);
      } else {
        arg.sum[size_t(i)] = float_bits(float(v + (arg.scale_d ? bits_float(arg.sum[size_t(i)]) : 0)));
      }
    }
  }
}

void rendezvous(Lane& lane, WgmmaArg& arg, u32 site) {
  WarpgroupCall& call = lane.block->warpgroups[lane.id / 128];
  if (call.arrived && call.site != site)
    report(&lane, "divergence", site, "wgmma, while the warpgroup waits in another at %s", where(call.site).c_str());
  call.site = site;
  call.arg[lane.id % 128] = &arg;
  if (++call.arrived < 128) {
    block_on(lane, "wgmma", site);
    return;
  }
  WarpgroupCall done = call;
  call = {};
  Lane& first = lane.team->lanes[lane.index - lane.id % 128];
  execute(done, first);
  for (u32 l = 0; l < 128; ++l)
    if (&lane.team->lanes[first.index + l] != &lane) wake(lane.team->lanes[first.index + l]);
  take_turns(lane);
}

}  // namespace

void wgmma(Lane& lane, const WgmmaShape& shape, u32* const* d, int d_count, const u32* const* a_regs, u64 a, u64 b, bool scale_d,
           int negate_a, int negate_b, int transpose_a, int transpose_b, u32 site) {
  if (lane.team->launch->block.count() < (lane.id / 128 + 1) * 128) {
    report(&lane, "divergence", site, "wgmma in a warpgroup of less than 128 threads");
    stop(lane);
  }
  if (!lane.wgmma_fenced) report(&lane, "wgmma", site, "no wgmma.fence since its registers were last written");
  auto same = std::find_if(lane.accumulators.begin(), lane.accumulators.end(), [&](const Accumulator& x) { return x.regs[0] == d[0]; });
  WgmmaArg arg{&lane, &shape, {}, a_regs, a, b, scale_d, negate_a, negate_b, transpose_a, transpose_b};
  if (same != lane.accumulators.end()) {
    arg.sum = same->values;
  } else {
    for (int i = 0; i < d_count; ++i) arg.sum.push_back(*d[i]);
  }
  PendingWgmma& pending = lane.wgmmas.open.emplace_back();
  pending.accumulator = d[0], pending.site = site;
  if (a_regs) pending.inputs.assign(a_regs, a_regs + 4);
  rendezvous(lane, arg, site);
  if (same == lane.accumulators.end()) same = lane.accumulators.insert(same, {{d, d + d_count}, {}, 0});
  same->values = std::move(arg.sum);
  ++same->pending;
  for (u32* reg : same->regs) *reg = kPoison;
}

void wgmma_fence(Lane& lane) { lane.wgmma_fenced = true; }
void wgmma_commit(Lane& lane) { lane.wgmmas.commit(); }

void wgmma_wait(Lane& lane, u32 allowed) {
  for (; lane.wgmmas.closed.size() > allowed; lane.wgmmas.retire())
    for (PendingWgmma& w : lane.wgmmas.closed.front()) {
      for (u32 piece : w.chunks) {
        --lane.block->busy[piece];
        touch(lane.block->shared, piece * 16, 16, lane, {w.site, "wgmma"});  // its read lasts until here
      }
      auto a = std::find_if(lane.accumulators.begin(), lane.accumulators.end(),
                            [&](const Accumulator& x) { return x.regs[0] == w.accumulator; });
      if (--a->pending) continue;
      for (size_t i = 0; i < a->regs.size(); ++i) *a->regs[i] = a->values[i];
      lane.accumulators.erase(a);
    }
}

void use_register(Lane& lane, const void* reg, bool write, u32 site) {
  if (write) lane.wgmma_fenced = false;
  for (const Accumulator& a : lane.accumulators)
    if (std::find(a.regs.begin(), a.regs.end(), reg) != a.regs.end()) {
      report(&lane, "wgmma", site, "%s a register of the accumulator before wgmma.wait_group", write ? "writes" : "reads");
      return;
    }
  if (!write) return;
  const auto reads = [&](const std::vector<PendingWgmma>& group) {
    return std::any_of(group.begin(), group.end(),
                       [&](const PendingWgmma& w) { return std::find(w.inputs.begin(), w.inputs.end(), reg) != w.inputs.end(); });
  };
  if (reads(lane.wgmmas.open) || std::any_of(lane.wgmmas.closed.begin(), lane.wgmmas.closed.end(), reads))
    report(&lane, "wgmma", site, "writes a register that a wgmma still reads, before wgmma.wait_group");
}

}  // namespace emu
