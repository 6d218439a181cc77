// Quantized linear for many tokens on AMX: weights are dequantized to bf16 tiles that stay in L1, outliers overwrite their places there,
// and x, rounded to bf16 once, is multiplied with them tile by tile. Reads the layout of the 16-lane kernels (ops.h, tile16), so both
// share one copy of the weights.
//
// A block of 32 outputs × up to 320 inputs fills 20 of L1's 48 KiB, and as much of x passes by it at a time. Four tiles of sums take two
// tiles of x and two of w for each step of 32 inputs: 64 cycles of products beside 4 KiB of loads, half of them from L1. The sums of a
// chunk wait in a buffer between blocks, whole tiles one after another: stores to rows of y, 4 KiB apart in many models, take ten times
// as long. Dequantizing costs about 80 cycles a tile, products 16 for each 16 tokens: from 16 tokens on this beats dot products.
#include <algorithm>

#include "cpu/elementwise.h"
#include "cpu/isa/amx.h"
#include "cpu/threads.h"
#include "dispatch.h"

namespace pe {
namespace {

using V = Avx512;
using F = V::F;
using I = V::I;

constexpr int64_t kInputs = 320;     // of a block
constexpr int64_t kOutputs = 32;     // of a block: two tiles, side by side, or one of gates and one of what they gate
constexpr int64_t kPanel = 1728;     // inputs between two visits of all outputs: 512 tokens of them stay in L2
constexpr int64_t kLeastTokens = 16;

struct Chunk {
  const QLinear& op;
  int64_t first, m;       // tokens
  int64_t steps;          // of 32 inputs
  uint16_t* x_tile;       // bf16[m/16][steps][16][32], in the workspace

  Chunk(const QLinear& op, int64_t first, int64_t m)
      : op(op), first(first), m(m), steps(divide_up(op.k, Amx::inputs)), x_tile(static_cast<uint16_t*>(op.workspace)) {}

  void round_x(int64_t token_tile) const {
    uint16_t* to = x_tile + token_tile * steps * Amx::elements;
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t j = 0; j < Amx::rows; ++j, to += Amx::inputs) {
        const int64_t i = token_tile * Amx::rows + j, left = i < m ? op.k - s * Amx::inputs : 0;
        const float* x = op.x + (first + i) * op.x_stride + s * Amx::inputs;
        const F a = left >= 16 ? V::load(x) : left > 0 ? V::load(x, int(left)) : V::zero();
        const F b = left >= 32 ? V::load(x + 16) : left > 16 ? V::load(x + 16, int(left - 16)) : V::zero();
        _mm512_storeu_si512(to, Amx::round(a, b));
      }
  }

  void run() const {
    parallel_for(divide_up(m, Amx::rows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) round_x(t);
    });
    const int64_t panel = op.gated ? steps : divide_up(steps, divide_up(steps * Amx::inputs, kPanel));
    const int64_t blocks = op.gated ? op.n / kOutputs : divide_up(op.n, kOutputs);
    for (int64_t begin = 0; begin < steps; begin += panel)
      parallel_for(blocks, 1, [&](int64_t from, int64_t to) {
        Amx::begin();
        for (int64_t b = from; b < to; ++b) outputs(b, begin, std::min(begin + panel, steps));
        Amx::end();
      });
  }

  void outputs(int64_t index, int64_t begin, int64_t end) const;
};

// 32 outputs over a block of inputs: tile j's begin at output n[j].
struct Block {
  const Chunk& chunk;
  const QLinear& op;
  int64_t n[2];
  int64_t begin, end;    // steps of 32 inputs
  int64_t panel;         // where the panel of this block begins
  bool finishes;         // the panel
  alignas(64) uint16_t w[kInputs / Amx::inputs][2][Amx::elements];       // bf16: step, tile of outputs, 16 pairs of inputs × 16 outputs
  alignas(64) float sums[kMatrixChunk / Amx::rows][2][Amx::rows][V::lanes];  // tile of tokens, tile of outputs

  Block(const Chunk& chunk, int64_t index, int64_t panel) : chunk(chunk), op(chunk.op), panel(panel) {
    n[0] = op.gated ? index * V::lanes : index * kOutputs, n[1] = n[0] + (op.gated ? op.n / 2 : V::lanes);
  }
  int64_t output(int64_t r) const { return n[r / V::lanes] + r % V::lanes; }

  // ---- weights

  F scale_of(int64_t t, int64_t g) const {
    const int64_t at = (t * (op.k / op.group) + g) * V::lanes;
    return op.scale_f32 ? V::load(static_cast<const float*>(op.scale) + at) : V::load_half(static_cast<const uint16_t*>(op.scale) + at);
  }
  I below_middle(int64_t t, int64_t g) const {  // the middle code less zero
    if (!op.zero) return V::zero_int();
    return V::sub_int(V::set_int(1 << (op.bits - 1)), V::load_bytes(op.zero + (t * (op.k / op.group) + g) * V::lanes));
  }

  // Eight inputs of a tile of outputs: four rows of pairs.
  template <int bits>
  static void dequantize8(const uint8_t* word, F scale, F shift, uint16_t* to) {
    const I first = V::centre<bits>(V::load_int(word)), second = bits == 8 ? V::centre<bits>(V::load_int(word + 64)) : first;
    auto value = [&]<int i>() { return V::fma(V::code<bits, bits == 8 ? i % 4 : i>(i < 4 || bits == 4 ? first : second), scale, shift); };
    auto row = [&]<int p>() {
      _mm512_store_si512(to + p * 2 * V::lanes, Amx::pairs(value.template operator()<2 * p>(), value.template operator()<2 * p + 1>()));
    };
    row.template operator()<0>(), row.template operator()<1>(), row.template operator()<2>(), row.template operator()<3>();
  }

  template <int bits>
  void dequantize(int64_t tile) {
    const int64_t t = n[tile] / V::lanes, groups = op.k / op.group, k8 = (op.k + 7) / 8 * 8;
    const int64_t stop = std::min(end * Amx::inputs, k8);
    for (int64_t c = begin * Amx::inputs; c < stop;) {
      const int64_t g = std::min(c / op.group, groups - 1), until = std::min(g == groups - 1 ? k8 : (g + 1) * op.group, stop);
      const F scale = scale_of(t, g), shift = V::mul(V::to_float(below_middle(t, g)), scale);
      for (; c < until; c += 8) {
        uint16_t* to = w[c / Amx::inputs - begin][tile] + c % Amx::inputs * V::lanes;
        dequantize8<bits>(op.weight + (t * k8 + c) * V::lanes * bits / 8, scale, shift, to);
      }
    }
    for (int64_t c = stop; c < end * Amx::inputs; c += 2)
      _mm512_store_si512(w[c / Amx::inputs - begin][tile] + c % Amx::inputs * V::lanes, V::zero_int());
  }

  int64_t column(int64_t e) const {
    return op.k > 65536 ? static_cast<const int32_t*>(op.outlier_col)[e] : static_cast<const uint16_t*>(op.outlier_col)[e];
  }

  // The outliers of this block's inputs take their places. next[r]: the first of output(r) that no block has taken yet.
  void place_outliers(int32_t (&next)[kOutputs]) {
    for (int64_t r = 0; r < kOutputs && output(r) < op.n; ++r) {
      const int32_t stop = op.outlier_row[output(r) + 1];
      int32_t e = next[r];
      for (int64_t c; e < stop && (c = column(e)) < end * Amx::inputs; ++e) {
        put(r, c, op.outlier_value[e]);
      }
      next[r] = e;
    }
  }

  // The weight of output(r) and input c of this block.
  void put(int64_t r, int64_t c, uint16_t half) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, V::half(half));
    const uint16_t value = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // a half is finite and far below bf16's limit
    w[c / Amx::inputs - begin][r / V::lanes][c % Amx::inputs / 2 * 2 * V::lanes + r % V::lanes * 2 + c % 2] = value;
  }

  void place_columns() {
    const int32_t *last = op.column_index + op.columns, *at = std::lower_bound(op.column_index, last, int32_t(begin * Amx::inputs));
    for (; at < last && *at < end * Amx::inputs; ++at)
      for (int64_t r = 0; r < kOutputs && n[r / V::lanes] < op.n; ++r) {
        const int64_t tile = n[r / V::lanes] / V::lanes, j = at - op.column_index;
        put(r, *at, op.column_value[(tile * op.columns + j) * V::lanes + r % V::lanes]);
      }
  }

  void fill(int64_t from, int64_t to, int32_t (&next)[kOutputs]) {
    begin = from, end = to;
    for (int64_t t = 0; t < 2 && n[t] < op.n; ++t) op.bits == 4 ? dequantize<4>(t) : dequantize<8>(t);
    if (op.outlier_row) place_outliers(next);
    if (op.columns) place_columns();
  }

  // ---- products: A tiles of tokens from tile t on, B tiles of outputs

  template <int A, int B>
  void multiply(int64_t t) {
    auto each_sum = [&](auto body) {
      body.template operator()<0>(sums[t][0]);
      if constexpr (B == 2) body.template operator()<1>(sums[t][1]);
      if constexpr (A == 2) body.template operator()<2>(sums[t + 1][0]);
      if constexpr (A == 2 && B == 2) body.template operator()<3>(sums[t + 1][1]);
    };
    each_sum([&]<int tile>(const void* from) { begin == panel ? Amx::zero<tile>() : Amx::load<tile>(from, 64); });
    const uint16_t* x = chunk.x_tile + (t * chunk.steps + begin) * Amx::elements;
    for (int64_t s = 0; s < end - begin; ++s, x += Amx::elements) {
      Amx::load<4>(x, 64);
      Amx::load<6>(w[s][0], 64);
      Amx::multiply<0, 4, 6>();
      if constexpr (B == 2) Amx::load<7>(w[s][1], 64), Amx::multiply<1, 4, 7>();
      if constexpr (A == 2) Amx::load<5>(x + chunk.steps * Amx::elements, 64), Amx::multiply<2, 5, 6>();
      if constexpr (A == 2 && B == 2) Amx::multiply<3, 5, 7>();
    }
    each_sum([&]<int tile>(void* to) { Amx::store<tile>(to, 64); });
    if (finishes)
      for (int64_t i = t * Amx::rows; i < std::min((t + A) * Amx::rows, chunk.m); ++i) finish<B>(i);
  }

  template <int B>
  void multiply_all() {
    const int64_t tiles = divide_up(chunk.m, Amx::rows);
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) multiply<2, B>(t);
    if (t < tiles) multiply<1, B>(t);
  }

  // A token's sums of a panel go to y: on top of the residual, then of what earlier panels left there.
  template <int B>
  void finish(int64_t i) const {
    const bool first = panel == 0;
    const float* before = first ? op.residual : op.y;
    float* y = op.y + (chunk.first + i) * op.y_stride;
    F v[B];
    for (int64_t j = 0; j < B; ++j) {
      const int count = int(std::min<int64_t>(op.n - n[j], V::lanes));
      v[j] = V::load(sums[i / Amx::rows][j][i % Amx::rows]);
      if (first && op.bias) v[j] = V::add(v[j], V::load(op.bias + n[j], count));
      if (op.gated) continue;
      if (before) v[j] = V::add(v[j], V::load(before + (y - op.y) + n[j], count));
      count == V::lanes ? V::store(y + n[j], v[j]) : V::store(y + n[j], v[j], count);
    }
    if constexpr (B == 2)
      if (op.gated) V::store(y + n[0], silu_mul<V>(v[0], v[1]));
  }
};

void Chunk::outputs(int64_t index, int64_t begin, int64_t end) const {
  Block block(*this, index, begin);
  int32_t next[kOutputs] = {};
  if (op.outlier_row)
    for (int64_t r = 0; r < kOutputs && block.output(r) < op.n; ++r) {
      int32_t e = op.outlier_row[block.output(r)], stop = op.outlier_row[block.output(r) + 1];
      while (e < stop) {  // by halves: the first at or beyond this panel
        const int32_t middle = e + (stop - e) / 2;
        block.column(middle) < begin * Amx::inputs ? e = middle + 1 : stop = middle;
      }
      next[r] = e;
    }
  const int64_t step = divide_up(end - begin, divide_up((end - begin) * Amx::inputs, kInputs));
  for (int64_t s = begin; s < end; s += step) {
    block.fill(s, std::min(s + step, end), next);
    block.finishes = s + step >= end;
    block.n[1] < op.n ? block.multiply_all<2>() : block.multiply_all<1>();
  }
}

const char* refuses(const QLinear& op) {
  if (op.act_bits != 16) return "it multiplies 16-bit activations";
  if (op.gated && (op.n % kOutputs || op.residual)) return "a gated result has two halves of whole tiles and no residual";
  return op.m && op.m < kLeastTokens ? "fewer than 16 tokens, which dot products take sooner" : nullptr;
}

// A gated result has no place for sums of a part of the inputs: there fewer tokens keep x within L2.
void qlinear_amx(const QLinear& op, void*) {
  const int64_t fit = kMatrixChunk * kPanel / op.k / 32 * 32;
  const int64_t tokens = op.gated ? std::clamp<int64_t>(fit, 128, kMatrixChunk) : kMatrixChunk;
  for (int64_t i = 0; i < op.m; i += tokens) Chunk(op, i, std::min(op.m - i, tokens)).run();
}

const Row<QLinear> row{{"qlinear_amx", Device::cpu, Arch::amx, 4, Layout::tile16, refuses, qlinear_amx}};

}  // namespace
}  // namespace pe
