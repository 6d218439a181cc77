// mma.sync, ldmatrix, stmatrix and movmatrix, with the fragment layouts of the PTX manual. Products are summed exactly (in double) and
// rounded once; how a tensor core rounds on the way is not modelled.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "elements.h"
#include "machine.h"

namespace emu {
namespace {

struct MmaArg {
  u32* d;
  const u32 *a, *b, *c;
};

// What the lanes of one mma agree on, in the bits of Collective::variant.
struct Kind {
  Element a, b;
  int k;
  bool half_sum, saturate;
  long pack() const { return long(a) | long(b) << 4 | long(k) << 8 | long(half_sum) << 20 | long(saturate) << 21; }
  static Kind unpack(long v) { return {Element(v & 15), Element(v >> 4 & 15), int(v >> 8 & 0xfff), bool(v >> 20 & 1), bool(v >> 21 & 1)}; }
};

// A[16][k] and B[8][k]: lane g·4 + t holds `per` neighbouring elements a register, of rows g and g + 8 and of columns t·per, in blocks of
// 4·per.
void load_fragments(const Collective& c, const Kind& kind, float (*a)[64], float (*b)[64]) {
  const int per = 32 / element_bits(kind.a), blocks = kind.k / (4 * per);
  for (int l = 0; l < 32; ++l) {
    const auto& arg = *static_cast<MmaArg*>(c.arg[size_t(l)]);
    const int g = l >> 2, t = l & 3;
    for (int r = 0; r < blocks; ++r) {
      const int col = r * 4 * per + t * per;
      for (int h = 0; h < 2; ++h) elements(kind.a, arg.a[r * 2 + h], &a[g + 8 * h][col]);
      elements(kind.b, arg.b[r], &b[g][col]);
    }
  }
}

void execute_mma(Collective& c, Block& block, u32 warp) {
  const Kind kind = Kind::unpack(c.variant);
  if (block.alive[warp] != ~0u) report(nullptr, "divergence", c.site, "mma with lanes that have ended");
  alignas(32) float a[16][64], b[8][64];
  if (c.arrived != ~0u) return;
  load_fragments(c, kind, a, b);
  alignas(32) double bt[64][8], sum[16][8] = {};
  for (int k = 0; k < kind.k; ++k)
    for (int n = 0; n < 8; ++n) bt[k][n] = b[n][k];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kind.k; ++k) {
      const double v = a[m][k];
      for (int n = 0; n < 8; ++n) sum[m][n] += v * bt[k][n];
    }
  const bool integer = kind.a != Element::f16 && kind.a != Element::bf16;
  for (int l = 0; l < 32; ++l) {
    auto& arg = *static_cast<MmaArg*>(c.arg[size_t(l)]);
    for (int r = 0; r < 4; ++r) {
      const double s = sum[(l >> 2) + 8 * (r >> 1)][(l & 3) * 2 + (r & 1)];
      if (integer) {
        const s64 total = s64(s) + s32(arg.c[r]);
        arg.d[r] = u32(kind.saturate ? std::clamp<s64>(total, INT32_MIN, INT32_MAX) : total);
      } else if (kind.half_sum) {
        const u32 half = to_f16(s + element(Element::f16, arg.c[r >> 1], r & 1)), shift = 16 * (r & 1);
        arg.d[r >> 1] = (arg.d[r >> 1] & ~(0xffffu << shift)) | half << shift;
      } else {
        arg.d[r] = float_bits(float(s + bits_float(arg.c[r])));
      }
    }
  }
}

struct MatrixArg {
  Lane* lane;
  u32* regs;
  u32 address;
  int count;
  bool transposed;
};

// The 16 bytes of row `i` of matrix `j`, whose address lane 8j + i gives; null where it lies outside shared memory.
u8* matrix_row(Collective& c, int j, int i, bool write, const char* what) {
  const auto& from = *static_cast<MatrixArg*>(c.arg[size_t(j * 8 + i)]);
  Lane& lane = *from.lane;
  u64 offset;
  Memory& memory = shared_memory(lane, from.address, &offset);
  if (offset % 16 || offset + 16 > kWindow) {
    report(&lane, offset % 16 ? "misaligned" : "out-of-bounds", c.site, "%s: the row at shared address 0x%x", what, from.address);
    return nullptr;
  }
  if (write) check_async_readers(lane, shared_block(lane, from.address), offset, 16, c.site, what);
  Team& team = *lane.team;
  const u32 first = lane.index - lane.lane;
  for (u32 q = 0; q < 4; ++q)  // a row is shared out between four lanes
    if (!touch(memory, offset + 4 * q, 4, team.lanes[first + u32(i) * 4 + q], {c.site, what, write})) return nullptr;
  return memory.data + offset;
}

// The halves that lane l holds of a matrix: (row, column) and the one after it, which is below instead of beside it if transposed.
template <class F>
void for_halves(bool transposed, F f) {
  for (int l = 0; l < 32; ++l)
    for (int h = 0; h < 2; ++h) {
      const int p = l >> 2, q = (l & 3) * 2 + h;
      transposed ? f(l, h, q, p) : f(l, h, p, q);
    }
}

void execute_ldmatrix(Collective& c, Block&, u32) {
  if (c.arrived != ~0u) return;
  const MatrixArg first = *static_cast<MatrixArg*>(c.arg[0]);
  for (int j = 0; j < first.count; ++j) {
    u16 rows[8][8] = {};
    for (int i = 0; i < 8; ++i)
      if (const u8* row = matrix_row(c, j, i, false, "ldmatrix")) memcpy(rows[i], row, 16);
    for (int l = 0; l < 32; ++l) {
      const int p = l >> 2, q = (l & 3) * 2;
      static_cast<MatrixArg*>(c.arg[size_t(l)])->regs[j] =
          first.transposed ? rows[q][p] | u32(rows[q + 1][p]) << 16 : rows[p][q] | u32(rows[p][q + 1]) << 16;
    }
  }
}

void execute_stmatrix(Collective& c, Block&, u32) {
  if (c.arrived != ~0u) return;
  const MatrixArg first = *static_cast<MatrixArg*>(c.arg[0]);
  for (int j = 0; j < first.count; ++j) {
    u16 rows[8][8];
    for_halves(first.transposed,
               [&](int l, int h, int row, int col) { rows[row][col] = u16(static_cast<MatrixArg*>(c.arg[size_t(l)])->regs[j] >> 16 * h); });
    for (int i = 0; i < 8; ++i)
      if (u8* row = matrix_row(c, j, i, true, "stmatrix")) memcpy(row, rows[i], 16);
  }
}

}  // namespace

std::atomic<u64> mma_count{0};

void mma(Lane& lane, Element a_type, Element b_type, int k, bool half_sum, bool saturate, u32* d, const u32* a, const u32* b, const u32* c,
         u32 site) {
  if (lane.lane == 0) mma_count.fetch_add(1, std::memory_order_relaxed);
  MmaArg arg{d, a, b, c};
  collective(lane, ~0u, &arg, execute_mma, Kind{a_type, b_type, k, half_sum, saturate}.pack(), "mma", site);
}

void ldmatrix(Lane& lane, u32* d, int count, bool transposed, u32 address, u32 site) {
  MatrixArg arg{&lane, d, address, count, transposed};
  collective(lane, ~0u, &arg, execute_ldmatrix, count * 2 + transposed, "ldmatrix", site);
}

void stmatrix(Lane& lane, const u32* s, int count, bool transposed, u32 address, u32 site) {
  MatrixArg arg{&lane, const_cast<u32*>(s), address, count, transposed};
  collective(lane, ~0u, &arg, execute_stmatrix, count * 2 + transposed, "stmatrix", site);
}

u32 movmatrix(Lane& lane, u32 value, u32 site) {
  auto execute = [](Collective& c, Block&, u32) {
    u16 rows[8][8] = {};
    if (c.arrived != ~0u) return;
    for_halves(false, [&](int l, int h, int row, int col) { rows[row][col] = u16(*static_cast<u32*>(c.arg[size_t(l)]) >> 16 * h); });
    for (int l = 0; l < 32; ++l) *static_cast<u32*>(c.arg[size_t(l)]) = 0;
    for_halves(true, [&](int l, int h, int row, int col) { *static_cast<u32*>(c.arg[size_t(l)]) |= u32(rows[row][col]) << 16 * h; });
  };
  collective(lane, ~0u, &value, execute, 0, "movmatrix", site);
  return value;
}

}  // namespace emu
