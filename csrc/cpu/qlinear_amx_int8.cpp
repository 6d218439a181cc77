// Quantized linear for many tokens with integer activations on AMX: codes of weights are widened to i8 tiles that stay in L1, and the
// tokens' codes, tile after tile too, are multiplied with them; sums are exact in i32. All else is qlinear.h's, in the same order: results
// have the bits of qlinear_avx512, which takes what is less than a tile of tokens.
//
// A word of the layout tile16 (ops.h) is 16 outputs × 8 inputs in nibbles: its halves are two rows of a right operand, four inputs an
// output each, for a load, a shift, two masks and two subtractions. A tile of products takes 16 cycles for 16 × 16 × 64; four tiles of sums
// take two of x and two of w. What that leaves is the end of a group, where 16 vectors a tile become floats: a whole row as one group is
// what this kernel is quickest at. It comes one pair of token tiles late, so that the matrix unit has the next pair's products meanwhile.
#include "cpu/isa/amx.h"
#include "cpu/qlinear.h"

namespace pe {
namespace {

using V = Avx512;
using F = V::F;
using I = V::I;

constexpr int64_t kInputs = 64;                  // of a tile
constexpr int64_t kTileBytes = 16 * kInputs;
constexpr int64_t kTokenTiles = kMatrixChunk / Amx::rows;
constexpr int64_t kTogether = 2 * Amx::rows;     // tokens
constexpr int64_t kSlab = 384;                   // tiles of weights, 1 KiB each: a fifth of L2
constexpr int64_t kPart = 12;                    // tiles of inputs: of two tiles of tokens they fill half of L1

// Inputs begin … end of a group, whose weights begin `at` tiles into a row of the slab.
struct Part {
  int64_t group, begin, end, at;
  bool first, last;  // of the group
  int64_t step() const { return begin / kInputs; }
  int64_t steps() const { return (end + kInputs - 1) / kInputs - step(); }
};

// Some tiles of outputs, and what waits for their results; on the stack of the thread.
struct Int8Slab {
  int64_t begin, end;  // tiles of outputs
  int64_t width;       // tiles of inputs of each
  alignas(64) int8_t w[kSlab][kTileBytes];
  // By two tiles of outputs, or one of gates and one of what they gate. Where a slab holds but a part of the inputs it has no more outputs
  // than these, and all tokens' sums wait; where long rows are taken by parts, the sums of one pair of token tiles with all outputs of the
  // slab; else those of one pair with one pair of outputs, for as long as the next products take.
  alignas(64) int32_t sum[kTokenTiles][2][Amx::rows][V::lanes];
  alignas(64) float total[kTokenTiles][2][Amx::rows][V::lanes];
  int8_t* tile(int64_t t, int64_t at) { return w[(t - begin) * width + at]; }
};

struct Int8Tiles : QLinearTile<V> {
  int64_t steps;         // tiles of inputs in a row
  bool gates;            // results are gated here: even tiles of outputs are gates, and the odd one behind is what they gate
  int64_t group_steps;   // tiles of inputs that a group lies in, and of them those that a slab holds at once
  int64_t panel_steps;

  Int8Tiles(const QLinear& op, int64_t first, int64_t m)
      : QLinearTile(op, first, m), steps(divide_up(op.k, kInputs)), gates(op.gated && !op.outlier_band) {
    group_steps = groups == 1 ? steps : (op.group + kInputs - 1) / kInputs;
    const int64_t all = group_steps * groups, most = kSlab / 2;
    panel_steps = all < most ? all : group_steps < most ? most / group_steps * group_steps : most;
  }

  // Where the layout has tile t.
  int64_t place(int64_t t) const { return gates ? t % 2 * (tiles / 2) + t / 2 : t; }

  // ---- tokens: codes as tiles [m/16][steps][16][64], zeros beyond k

  int8_t* token_tile(int64_t t, int64_t step) const { return x_code + (t * steps + step) * kTileBytes; }
  int64_t inputs_of(int64_t step) const { return op.k - step * kInputs < kInputs ? op.k - step * kInputs : kInputs; }

  // kInputs of the codes that the op came with.
  void copy_tile_row(int64_t i, int64_t begin, int8_t* to) const {
    const auto* from = static_cast<const uint8_t*>(op.x_code) + ((first + i) * op.k + begin) * op.act_bits / 8;
    if (op.act_bits == 8) return _mm512_store_si512(to, V::load_int(from));
    const I pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), middle = _mm512_set1_epi8(8);
    const I nibbles = _mm512_and_si512(_mm512_or_si512(pair, _mm512_slli_epi16(pair, 4)), _mm512_set1_epi8(15));
    _mm512_store_si512(to, _mm512_sub_epi8(_mm512_xor_si512(nibbles, middle), middle));
  }

  void prepare_token(int64_t i) const {
    auto row = [&](int64_t step) { return token_tile(i / Amx::rows, step) + i % Amx::rows * kInputs; };
    auto each_step = [&](auto write) {
      for (int64_t s = 0; s < steps; ++s) write(s * kInputs, inputs_of(s), row(s));
    };
    if (inputs_of(steps - 1) < kInputs) _mm512_store_si512(row(steps - 1), V::zero_int());
    if (op.x_code) {
      each_step([&](int64_t begin, int64_t count, int8_t* to) { count == kInputs ? copy_tile_row(i, begin, to) : copy_codes(i, begin, count, to); });
      x_scale[i] = op.x_scale[first + i];
    } else {
      const Quantizer<V, 1> quantizer(Range<V>(x_row(i), op.k), op.act_bits, op.act_clip);
      each_step([&](int64_t begin, int64_t count, int8_t* to) { quantizer.write(x_row(i) + begin, count, {to}); });
      x_scale[i] = quantizer.scale;
    }
    if (!op.zero) return;
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t c = g * op.group; c < (g + 1) * op.group; ++c) sum += row(c / kInputs)[c % kInputs];
      code_sum(0, i, g) = sum;
    }
  }

  void prepare_tokens() const {
    parallel_for(m, Amx::rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) prepare_token(i);
    });
    prepare_exact();
  }

  // ---- weights

  // A part of a tile of outputs, counted from the middle code; zeros in the rest of its tiles of inputs.
  template <int bits>
  void widen(int64_t t, const Part& part, int8_t* to) const {
    constexpr int64_t inputs = 32 / bits;
    const int64_t origin = part.begin / kInputs * kInputs;
    const uint8_t* from = op.weight + (t * (k8 / inputs) + part.begin / inputs) * V::lanes * 4;
    auto row = [&](int64_t c) { return to + (c - origin) * Amx::rows; };
    for (int64_t c = origin; c < part.begin; c += 4) _mm512_store_si512(row(c), V::zero_int());
    int64_t c = part.begin;
    for (; c < part.end; c += inputs, from += V::lanes * 4) {
      const I word = V::load_int(from), low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8);
      if constexpr (bits == 8) {
        _mm512_store_si512(row(c), _mm512_xor_si512(word, _mm512_set1_epi8(char(0x80))));
      } else {
        _mm512_store_si512(row(c), _mm512_sub_epi8(_mm512_and_si512(word, low), middle));
        _mm512_store_si512(row(c + 4), _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(word, 4), low), middle));
      }
    }
    for (; c % kInputs; c += 4) _mm512_store_si512(row(c), V::zero_int());
  }

  // ---- products: A tiles of tokens from tile t on times B tiles of outputs, whose sums are tiles `at` and at + 1

  // Between its steps meanwhile(steps) does a share of what else there is to do: what is far behind in the program is out of the core's sight.
  template <int A, int B, class Meanwhile>
  void multiply(Int8Slab& slab, int64_t t, const Part& part, const int8_t* w, int64_t at, Meanwhile meanwhile) const {
    auto each_sum = [&](auto body) {
      body.template operator()<0>(slab.sum[at][0]);
      if constexpr (B == 2) body.template operator()<1>(slab.sum[at][1]);
      if constexpr (A == 2) body.template operator()<2>(slab.sum[at + 1][0]);
      if constexpr (A == 2 && B == 2) body.template operator()<3>(slab.sum[at + 1][1]);
    };
    each_sum([&]<int tile>(const void* from) { part.first ? Amx::zero<tile>() : Amx::load<tile>(from, 64); });
    // Rows beyond the last token hold anything; their sums are not looked at.
    const int8_t *x = token_tile(t, part.step()), *next = x + steps * kTileBytes, *other = w + slab.width * kTileBytes;
    for (const int8_t* end = x + part.steps() * kTileBytes; x < end; x += kTileBytes, next += kTileBytes, w += kTileBytes, other += kTileBytes) {
      Amx::load<4>(x, kInputs);
      Amx::load<6>(w, 64);
      Amx::multiply_int8<0, 4, 6>();
      if constexpr (B == 2) Amx::load<7>(other, 64), Amx::multiply_int8<1, 4, 7>();
      if constexpr (A == 2) Amx::load<5>(next, kInputs), Amx::multiply_int8<2, 5, 6>();
      if constexpr (A == 2 && B == 2) Amx::multiply_int8<3, 5, 7>();
      meanwhile();
    }
    each_sum([&]<int tile>(void* to) { Amx::store<tile>(to, 64); });
  }

  // ---- results: sums that wait to become some

  struct Sums {
    int64_t tile = 0, token = 0, at = 0;  // the first tiles of outputs and of sums, and the first token
    Part part = {};
    int64_t next = 0, stop = 0;           // tokens that wait
    int64_t row(int64_t i) const { return at + (i - token) / Amx::rows; }
  };

  // Of a whole row with symmetric weights: finish(token, v) takes what they stand for.
  template <int B, class Finish>
  void scale_rows(const Int8Slab& slab, const Sums& sums, int64_t stop, Finish finish) const {
    F scale[B];
    for (int b = 0; b < B; ++b) scale[b] = scale_of(place(sums.tile + b), 0);
    for (int64_t i = sums.next; i < stop; ++i) {
      const F token = V::set(x_scale[i]);
      F v[B];
      for (int b = 0; b < B; ++b) v[b] = V::mul(V::to_float(V::load_int(slab.sum[sums.row(i)][b][i % Amx::rows])), V::mul(scale[b], token));
      finish(i, v);
    }
  }

  template <int B>
  void finish_rows(const Int8Slab& slab, const Sums& sums, int64_t stop) const {
    int64_t at[B];
    int count[B];
    F bias[B];
    for (int b = 0; b < B; ++b) {
      at[b] = place(sums.tile + b) * V::lanes;
      count[b] = int(op.n - at[b] < V::lanes ? op.n - at[b] : V::lanes);
      bias[b] = op.bias ? V::load(op.bias + at[b], count[b]) : V::zero();
    }
    if (B == 2 && gates)
      return scale_rows<B>(slab, sums, stop, [&](int64_t i, F (&v)[B]) {
        if (op.bias)
          for (int b = 0; b < B; ++b) v[b] = V::add(v[b], bias[b]);
        V::store(op.y + (first + i) * op.y_stride + at[0], silu_mul<V>(v[0], v[B - 1]));
      });
    scale_rows<B>(slab, sums, stop, [&](int64_t i, F (&v)[B]) {
      for (int b = 0; b < B; ++b) {
        if (op.bias) v[b] = V::add(v[b], bias[b]);
        if (op.residual) v[b] = V::add(v[b], V::load(op.residual + (first + i) * op.y_stride + at[b], count[b]));
        V::store(y_row(i) + at[b], v[b], count[b]);
      }
    });
  }

  // The sums of a group go into the totals, and after the last group to y.
  template <int bits, int B>
  void add_group(Int8Slab& slab, const Sums& sums, int64_t stop) const {
    const int64_t g = sums.part.group;
    F scale[B];
    for (int b = 0; b < B; ++b) scale[b] = scale_of(place(sums.tile + b), g);
    for (int64_t i = sums.next; i < stop; ++i) {
      float (*total)[Amx::rows][V::lanes] = slab.total[i / Amx::rows];
      F v[1][B];
      for (int b = 0; b < B; ++b) {
        const I sum = V::load_int(slab.sum[sums.row(i)][b][i % Amx::rows]);
        const F exact = V::to_float(op.zero ? off_middle<bits>(sum, place(sums.tile + b), g, code_sum(0, i, g)) : sum);
        v[0][b] = V::fma(exact, V::mul(scale[b], V::set(x_scale[i])), g ? V::load(total[b][i % Amx::rows]) : V::zero());
      }
      if (g == groups - 1) finish_token<B>(sums.tile, i, v);
      else for (int b = 0; b < B; ++b) V::store(total[b][i % Amx::rows], v[0][b]);
    }
  }

  template <int B>
  void finish_token(int64_t tile, int64_t i, F (&v)[1][B]) const {
    for (int b = 0; b < B && op.columns; ++b) {
      F one[1][1] = {{v[0][b]}};
      add_columns<1, 1>(one, i, place(tile + b));
      v[0][b] = one[0][0];
    }
    if constexpr (B == 2)
      if (gates) {
        const int64_t at = place(tile) * V::lanes;
        if (op.bias) v[0][0] = V::add(v[0][0], V::load(op.bias + at)), v[0][1] = V::add(v[0][1], V::load(op.bias + op.n / 2 + at));
        return V::store(op.y + (first + i) * op.y_stride + at, silu_mul<V>(v[0][0], v[0][1]));
      }
    for (int b = 0; b < B; ++b) finish(i, place(tile + b), v[0][b]);
  }

  // Of the next tokens, `count` of them at most.
  template <int bits, int B>
  void results(Int8Slab& slab, Sums& sums, int64_t count) const {
    if (sums.next == sums.stop) return;
    const int64_t stop = sums.next + count < sums.stop ? sums.next + count : sums.stop;
    groups == 1 && !op.zero && !op.columns ? finish_rows<B>(slab, sums, stop) : add_group<bits, B>(slab, sums, stop);
    sums.next = stop;
  }

  // ---- tiles of outputs for all tokens

  // The parts of a panel of inputs: whole groups, or a piece of one that is too long.
  template <class Body>
  void each_part(int64_t panel, Body body) const {
    for (int64_t at = 0; at < panel_steps && panel + at < group_steps * groups;) {
      const int64_t g = (panel + at) / group_steps, in_group = (panel + at) % group_steps, origin = g * op.group, end = origin + group_of_block(g);
      const int64_t left = group_steps - in_group, parts = divide_up(panel_steps, kPart), fit = groups == 1 ? divide_up(panel_steps, parts) : panel_steps;
      const int64_t room = fit < panel_steps - at ? fit : panel_steps - at, some = left < room ? left : room;
      const int64_t begin = origin + in_group * kInputs, stop = some < left ? begin + some * kInputs : end;
      body(Part{g, begin, stop, at, in_group == 0, stop == end});
      at += some;
    }
  }

  template <int bits>
  void run(Int8Slab& slab) const {
    const bool whole = panel_steps == group_steps * groups, by_parts = whole && groups == 1 && panel_steps > kPart;
    slab.width = panel_steps;
    for (int64_t panel = 0; panel < group_steps * groups; panel += panel_steps) {
      each_part(panel, [&](const Part& part) {
        for (int64_t t = slab.begin; t < slab.end; ++t) widen<bits>(place(t), part, slab.tile(t, part.at));
      });
      Sums waiting;
      auto products = [&](int64_t i, int64_t t, const Part& part) {
        const int64_t at = by_parts ? t - slab.begin : whole ? 0 : i / Amx::rows, share = divide_up(kTogether, part.steps());
        const int8_t* w = slab.tile(t, part.at);
        auto meanwhile = [&] { slab.end - waiting.tile > 1 ? results<bits, 2>(slab, waiting, share) : results<bits, 1>(slab, waiting, share); };
        if (m - i > Amx::rows)
          slab.end - t > 1 ? multiply<2, 2>(slab, i / Amx::rows, part, w, at, meanwhile) : multiply<2, 1>(slab, i / Amx::rows, part, w, at, meanwhile);
        else
          slab.end - t > 1 ? multiply<1, 2>(slab, i / Amx::rows, part, w, at, meanwhile) : multiply<1, 1>(slab, i / Amx::rows, part, w, at, meanwhile);
        waiting = {t, i, at, part, i, !part.last ? i : i + kTogether < m ? i + kTogether : m};
      };
      for (int64_t i = 0; i < m; i += kTogether) {
        auto outputs = [&](auto body) {
          for (int64_t t = slab.begin; t < slab.end; t += 2) body(t);
        };
        if (by_parts) each_part(panel, [&](const Part& part) { outputs([&](int64_t t) { products(i, t, part); }); });
        else outputs([&](int64_t t) { each_part(panel, [&](const Part& part) { products(i, t, part); }); });
      }
      slab.end - waiting.tile > 1 ? results<bits, 2>(slab, waiting, kTogether) : results<bits, 1>(slab, waiting, kTogether);
    }
  }

  template <int bits>
  void slabs(int64_t begin, int64_t end, int64_t size) const {
    Int8Slab slab;
    Amx::begin();
    for (slab.begin = begin; slab.begin < end; slab.begin = slab.end) {
      slab.end = slab.begin + size < end ? slab.begin + size : end;
      run<bits>(slab);
    }
    Amx::end();
  }

  // Tiles of outputs of a slab: as many as fit, or fewer where threads would else wait for the last of them.
  int64_t slab_size() const {
    const int64_t most = kSlab / panel_steps / 2 * 2, threads = pe::threads();
    int64_t best = most, least = INT64_MAX;
    for (int64_t size = most; size > 0 && 2 * size >= most; size -= 2) {
      const int64_t count = (tiles + size - 1) / size, time = (count + threads - 1) / threads * size;
      if (time < least) best = size, least = time;
    }
    return best;
  }

  template <int bits>
  void run() const {
    prepare_tokens();
    const int64_t size = slab_size();
    if (op.outlier_band) QLinearTile<V>::run([&](int64_t begin, int64_t end) { slabs<bits>(begin, end, size); });
    else parallel_for(tiles, size, [&](int64_t begin, int64_t end) { slabs<bits>(begin, end, size); });
  }
};

const char* refuses(const QLinear& op) {
  if (op.act_bits == 16) return "it multiplies activations of 8 or 4 bits";
  if (op.gated && op.n % (2 * V::lanes)) return "a gated result has two halves of whole tiles";
  if (const char* why = qlinear_refuses<V>(op)) return why;
  return op.m && op.m < Amx::rows ? "fewer than 16 tokens, which dot products take sooner" : nullptr;
}

void qlinear_amx_int8(const QLinear& op, void*) {
  for (int64_t i = 0; i < op.m; i += kMatrixChunk) {
    const Int8Tiles tiles(op, i, op.m - i < kMatrixChunk ? op.m - i : kMatrixChunk);
    op.bits == 4 ? tiles.run<4>() : tiles.run<8>();
  }
}

const Row<QLinear> row{{"qlinear_amx_int8", Device::cpu, Arch::amx, 5, Layout::tile16, refuses, qlinear_amx_int8}};

}  // namespace
}  // namespace pe
