// Quantized linear for many tokens with integer activations on AMX: codes of weights are widened to i8 tiles that stay in L1, and the
// tokens' codes, a row after another as the quantizer leaves them, are multiplied with them tile by tile; sums are exact in i32. All else
// is qlinear.h's, in the same order: results have the bits of qlinear_avx512, which takes what is less than a tile of tokens.
//
// A word of the layout tile16 (ops.h) is 16 outputs × 8 inputs in nibbles: its halves are two rows of a right operand, four inputs an
// output each, for a load, a shift, two masks and two subtractions. A tile of products takes 16 cycles for 16 × 16 × 64; four tiles of sums
// take two of x and two of w. What that leaves is the end of a group, where 16 vectors a tile become floats: a whole row as one group is
// what this kernel is quickest at.
#include "cpu/isa/amx.h"
#include "cpu/qlinear.h"

namespace pe {
namespace {

using V = Avx512;
using F = V::F;
using I = V::I;

constexpr int64_t kInputs = 64;                  // of a tile
constexpr int64_t kSteps = 10;                   // tiles of inputs at once: with two tiles of outputs 20 of L1's 48 KiB
constexpr int64_t kTileBytes = 16 * kInputs;
constexpr int64_t kTokenTiles = kChunk / Amx::rows;

// Two tiles of outputs, side by side, or one of gates and one of what they gate; on the stack of the thread.
struct Int8Block {
  int64_t tile[2];
  alignas(64) int8_t w[kSteps][2][kTileBytes];
  alignas(64) int32_t sum[kTokenTiles][2][Amx::rows][V::lanes];
  alignas(64) float total[kTokenTiles][2][Amx::rows][V::lanes];
};

// A part of a group's inputs: tiles `steps` from input `begin` on.
struct Part {
  int64_t group, begin, steps;
  bool first, last;  // of the group
};

struct Int8Tiles : QLinearTile<V> {
  using QLinearTile<V>::QLinearTile;

  // Inputs begin … end of a tile of outputs, counted from the middle code; zeros up to a whole tile, since x goes on there.
  template <int bits>
  void widen(int8_t (*to)[2][kTileBytes], int b, int64_t t, int64_t begin, int64_t end) const {
    constexpr int64_t inputs = 32 / bits;
    const uint8_t* from = op.weight + (t * (k8 / inputs) + begin / inputs) * V::lanes * 4;
    auto row = [&](int64_t c) { return to[c / kInputs][b] + c % kInputs / 4 * 64; };
    for (int64_t c = 0; c < end - begin; c += inputs, from += V::lanes * 4) {
      const I word = V::load_int(from), low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8);
      if constexpr (bits == 8) {
        _mm512_store_si512(row(c), _mm512_xor_si512(word, _mm512_set1_epi8(char(0x80))));
      } else {
        _mm512_store_si512(row(c), _mm512_sub_epi8(_mm512_and_si512(word, low), middle));
        _mm512_store_si512(row(c + 4), _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(word, 4), low), middle));
      }
    }
    for (int64_t c = end - begin; c % kInputs; c += 4) _mm512_store_si512(row(c), V::zero_int());
  }

  // A tiles of tokens from tile t on times B tiles of outputs.
  template <int A, int B>
  void multiply(Int8Block& block, int64_t t, const Part& part, int64_t at) const {
    auto each_sum = [&](auto body) {
      body.template operator()<0>(block.sum[at][0]);
      if constexpr (B == 2) body.template operator()<1>(block.sum[at][1]);
      if constexpr (A == 2) body.template operator()<2>(block.sum[at + 1][0]);
      if constexpr (A == 2 && B == 2) body.template operator()<3>(block.sum[at + 1][1]);
    };
    each_sum([&]<int tile>(const void* from) { part.first ? Amx::zero<tile>() : Amx::load<tile>(from, 64); });
    // Rows beyond the last token hold anything; their sums are not looked at.
    const int8_t* x = code_row(0, t * Amx::rows) + part.begin;
    for (int64_t s = 0; s < part.steps; ++s, x += kInputs) {
      Amx::load<4>(x, k8);
      Amx::load<6>(block.w[s][0], 64);
      Amx::multiply_int8<0, 4, 6>();
      if constexpr (B == 2) Amx::load<7>(block.w[s][1], 64), Amx::multiply_int8<1, 4, 7>();
      if constexpr (A == 2) Amx::load<5>(x + Amx::rows * k8, k8), Amx::multiply_int8<2, 5, 6>();
      if constexpr (A == 2 && B == 2) Amx::multiply_int8<3, 5, 7>();
    }
    each_sum([&]<int tile>(void* to) { Amx::store<tile>(to, 64); });
  }

  // The sums of group g for tokens i … stop, which begin with those of tile `at`, go into the totals, and after the last group to y.
  template <int bits, int B>
  void add_group(Int8Block& block, int64_t i, int64_t stop, int64_t g, int64_t at, bool gates) const {
    F scale[B];
    for (int b = 0; b < B; ++b) scale[b] = scale_of(block.tile[b], g);
    for (int64_t j = 0; i < stop; ++i, ++j) {
      float (*total)[Amx::rows][V::lanes] = block.total[i / Amx::rows];
      F v[1][B];
      for (int b = 0; b < B; ++b) {
        const I sum = V::load_int(block.sum[at + j / Amx::rows][b][j % Amx::rows]);
        const F exact = V::to_float(off_middle<bits>(sum, block.tile[b], g, code_sum(0, i, g)));
        v[0][b] = V::fma(exact, V::mul(scale[b], V::set(x_scale[i * groups + g])), g ? V::load(total[b][i % Amx::rows]) : V::zero());
      }
      if (g == groups - 1) finish_token<B>(block, i, v, gates);
      else for (int b = 0; b < B; ++b) V::store(total[b][i % Amx::rows], v[0][b]);
    }
  }

  template <int B>
  void finish_token(const Int8Block& block, int64_t i, F (&v)[1][B], bool gates) const {
    if (op.columns)
      for (int b = 0; b < B; ++b) {
        F one[1][1] = {{v[0][b]}};
        add_columns<1, 1>(one, i, block.tile[b]);
        v[0][b] = one[0][0];
      }
    if constexpr (B == 2)
      if (gates) {
        if (op.bias)
          for (int b = 0; b < B; ++b) v[0][b] = V::add(v[0][b], V::load(op.bias + block.tile[b] * V::lanes));
        return V::store(op.y + (first + i) * op.y_stride + block.tile[0] * V::lanes, silu_mul<V>(v[0][0], v[0][1]));
      }
    for (int b = 0; b < B; ++b) finish(i, block.tile[b], v[0][b]);
  }

  template <int bits, int B>
  void outputs(Int8Block& block, bool gates) const {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * op.group, end = begin + group_of_block(g), whole = kSteps * kInputs;
      for (int64_t c = begin; c < end; c += whole) {
        const int64_t stop = end - c < whole ? end : c + whole;
        const Part part{g, c, (stop - c + kInputs - 1) / kInputs, c == begin, stop == end};
        for (int b = 0; b < B; ++b) widen<bits>(block.w, b, block.tile[b], c, stop);
        for (int64_t i = 0; i < m; i += 2 * Amx::rows) {
          const int64_t until = m - i < 2 * Amx::rows ? m : i + 2 * Amx::rows, t = i / Amx::rows;
          const int64_t at = part.first && part.last ? 0 : t;  // a group in one part needs no more than the tiles it is in
          until - i > Amx::rows ? multiply<2, B>(block, t, part, at) : multiply<1, B>(block, t, part, at);
          if (part.last) add_group<bits, B>(block, i, until, g, at, gates);
        }
      }
    }
  }

  template <int bits>
  void run() const {
    if (op.gated && !op.outlier_band) return run_gated<bits>();
    QLinearTile<V>::run<1>([&](int64_t begin, int64_t end) {
      Int8Block block;
      Amx::begin();
      int64_t t = begin;
      for (; t + 2 <= end; t += 2) block.tile[0] = t, block.tile[1] = t + 1, outputs<bits, 2>(block, false);
      if (t < end) block.tile[0] = t, outputs<bits, 1>(block, false);
      Amx::end();
    });
  }

  // Gates and what they gate side by side: nothing ungated goes through memory. Outliers would come too late for that.
  template <int bits>
  void run_gated() const {
    prepare<1>();
    parallel_for(tiles / 2, 1, [&](int64_t begin, int64_t end) {
      Int8Block block;
      Amx::begin();
      for (int64_t t = begin; t < end; ++t) block.tile[0] = t, block.tile[1] = t + tiles / 2, outputs<bits, 2>(block, true);
      Amx::end();
    });
  }
};

const char* refuses(const QLinear& op) {
  if (op.act_bits == 16) return "it multiplies activations of 8 or 4 bits";
  if (op.gated && op.n % (2 * V::lanes)) return "a gated result has two halves of whole tiles";
  if (const char* why = qlinear_refuses<V>(op)) return why;
  return op.m && op.m < Amx::rows ? "fewer than 16 tokens, which dot products take sooner" : nullptr;
}

void qlinear_amx_int8(const QLinear& op, void*) {
  for (int64_t i = 0; i < op.m; i += kChunk) {
    const Int8Tiles tiles(op, i, op.m - i < kChunk ? op.m - i : kChunk);
    op.bits == 4 ? tiles.run<4>() : tiles.run<8>();
  }
}

const Row<QLinear> row{{"qlinear_amx_int8", Device::cpu, Arch::amx, 5, Layout::tile16, refuses, qlinear_amx_int8}};

}  // namespace
}  // namespace pe
