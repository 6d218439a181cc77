// Quantized linear on tiles of V::lanes outputs: INT4 or INT8 codes × f32 or INT8 activations, with FP16 outliers.
//
// A lane is an output. A word of codes (ops.h, Layout) feeds 8 or 4 inputs; each is turned to f32 in a register and multiplied with
// the broadcast activation (act_bits 16), or the whole word goes through one integer dot product (act_bits 8). So weights are read
// once per block of tokens and never stored in another form. A group's sum Σ code·x is corrected by zero·Σx, with Σx computed once
// per token; for f32 both count from the middle code, so that with symmetric weights nothing is left to cancel. At one token several tiles run together, since one chain of sums would wait for the adder's latency.
//
// Outliers follow as one pass over the rows that a thread has just done: interleaving them tile by tile costs 15 % more, because
// short extra streams defeat the hardware's prefetch. From kBatch tokens on, a lane of that pass is a token instead, over x
// transposed. Both ways add an output's products in the same order (four partial sums), so a token's bits never depend on its batch.
#pragma once

#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

constexpr int64_t kBatch = 4;  // tokens from which on the outliers' lanes are tokens
constexpr int kTiles = 4;      // tiles that one token is multiplied with at once

template <class V>
struct QLinearTile {
  using F = typename V::F;
  using I = typename V::I;

  const QLinear& op;
  int64_t m, first;            // this chunk: tokens first … first + m
  int64_t k8, groups, tiles;   // k padded to 8; groups in a row; tiles of outputs
  // Carved from the workspace.
  float* x_padded;             // [m][k8], only where k is no multiple of 8
  float* x_turned;             // [m/lanes][k][lanes]
  int8_t* x_code;              // [m][k8]
  void* x_sum;                 // [m][groups], f32 or i32
  float* x_scale;              // [m]

  QLinearTile(const QLinear& op, int64_t first, int64_t m) : op(op), m(m), first(first) {
    k8 = (op.k + 7) / 8 * 8, groups = op.k / op.group, tiles = (op.n + V::lanes - 1) / V::lanes;
    const int64_t rows = (m + 15) / 16 * 16;
    char* at = static_cast<char*>(op.workspace);
    auto take = [&](int64_t bytes) { char* p = at; at += (bytes + 63) / 64 * 64; return p; };
    x_padded = reinterpret_cast<float*>(take(rows * k8 * 4));
    x_turned = reinterpret_cast<float*>(take(rows * op.k * 4));
    x_code = reinterpret_cast<int8_t*>(take(rows * k8));
    x_sum = take(rows * groups * 4);
    x_scale = reinterpret_cast<float*>(take(rows * 4));
  }

  const float* x_row(int64_t i) const { return op.x + (first + i) * op.x_stride; }
  const float* x_dense(int64_t i) const { return k8 == op.k ? x_row(i) : x_padded + i * k8; }
  float* y_row(int64_t i) const { return op.y + (first + i) * op.y_stride; }
  int group_of_block(int64_t g) const { return int(g == groups - 1 ? k8 - g * op.group : op.group); }

  // ---- before the product: sums, codes, the transposed x

  void pad(int64_t i) const {
    float* to = x_padded + i * k8;
    for (int64_t c = 0; c < k8; ++c) to[c] = c < op.k ? x_row(i)[c] : 0.0f;
  }

  void sum_groups(int64_t i) const {
    for (int64_t g = 0; g < groups; ++g) {
      const float* x = x_row(i) + g * op.group;
      F sum = V::zero();
      int64_t c = 0;
      for (; c + V::lanes <= op.group; c += V::lanes) sum = V::add(sum, V::load(x + c));
      if (c < op.group) sum = V::add(sum, V::load(x + c, int(op.group - c)));
      static_cast<float*>(x_sum)[i * groups + g] = V::sum(sum);
    }
  }

  void quantize(int64_t i) const {
    const float* x = x_row(i);
    F top = V::zero(), broken = V::zero();  // broken turns NaN with the first NaN or infinity, which max() may lose
    for (int64_t c = 0; c < op.k; c += V::lanes) {
      const F v = V::load(x + c, int(op.k - c < V::lanes ? op.k - c : V::lanes));
      top = V::max(top, V::abs(v)), broken = V::fma(v, V::zero(), broken);
    }
    const float scale = V::largest(top) / 127.0f, doubt = V::sum(broken);
    const F inverse = V::set(scale > 0 ? 1.0f / scale : 0.0f), limit = V::set(127.0f);
    x_scale[i] = scale + doubt;
    int8_t* code = x_code + i * k8;
    alignas(64) int8_t tail[16];
    for (int64_t c = 0; c < k8; c += V::lanes) {
      const int count = int(k8 - c < V::lanes ? k8 - c : V::lanes), real = int(op.k - c < V::lanes ? op.k - c : V::lanes);
      const F v = V::max(V::min(V::round(V::mul(V::load(x + c, real), inverse)), limit), V::sub(V::zero(), limit));
      V::store_bytes(tail, V::to_int(v));
      __builtin_memcpy(code + c, tail, size_t(count));
    }
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t c = g * op.group; c < (g + 1) * op.group; ++c) sum += code[c];
      static_cast<int32_t*>(x_sum)[i * groups + g] = sum;
    }
  }

  void turn(int64_t block) const {
    float* to = x_turned + block * op.k * V::lanes;
    for (int j = 0; j < V::lanes; ++j) {
      const int64_t i = block * V::lanes + j;
      for (int64_t c = 0; c < op.k; ++c) to[c * V::lanes + j] = i < m ? x_row(i)[c] : 0.0f;
    }
  }

  void prepare() const {
    parallel_for(m, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (op.act_bits == 8) {
          quantize(i);
        } else {
          if (k8 != op.k) pad(i);
          sum_groups(i);
        }
      }
    });
    if (op.outlier_row && m >= kBatch)
      parallel_for((m + V::lanes - 1) / V::lanes, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) turn(b);
      });
  }

  // ---- the product of M tokens from token i on and T tiles from tile t on

  F scale_of(int64_t t, int64_t g) const {
    const int64_t at = (t * groups + g) * V::lanes;
    return op.scale_f32 ? V::load(static_cast<const float*>(op.scale) + at) : V::load_half(static_cast<const uint16_t*>(op.scale) + at);
  }

  I zero_of(int64_t t, int64_t g) const {
    return op.zero ? V::load_bytes(op.zero + (t * groups + g) * V::lanes) : V::set_int(1 << (op.bits - 1));
  }

  template <int bits, int M, int T>
  void add_word_float(F (&sum)[M][T], I (&word)[T], const float* x, int64_t stride) const {
    for (I& w : word) w = V::template centre<bits>(w);
    auto input = [&]<int j>() {
      F code[T];
      for (int b = 0; b < T; ++b) code[b] = V::template code<bits, j>(word[b]);
      for (int a = 0; a < M; ++a) {
        const F v = V::set(x[a * stride + j]);
        for (int b = 0; b < T; ++b) sum[a][b] = V::fma(code[b], v, sum[a][b]);
      }
    };
    input.template operator()<0>(), input.template operator()<1>(), input.template operator()<2>(), input.template operator()<3>();
    if constexpr (bits == 4)
      input.template operator()<4>(), input.template operator()<5>(), input.template operator()<6>(), input.template operator()<7>();
  }

  template <int bits, bool integer, int M, int T>
  void block(int64_t i, int64_t t) const {
    constexpr int inputs = 32 / bits;
    const int64_t words = k8 / inputs;
    F total[M][T];
    for (auto& row : total) for (F& v : row) v = V::zero();
    int64_t w = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = w + group_of_block(g) / inputs;
      F sum[M][T];
      I sum_int[M][T];
      for (int a = 0; a < M; ++a)
        for (int b = 0; b < T; ++b) sum[a][b] = V::zero(), sum_int[a][b] = V::zero_int();
      for (; w < end; ++w) {
        I word[T];
        for (int b = 0; b < T; ++b) word[b] = V::load_int(op.weight + (((t + b) * words + w) * V::lanes) * 4);
        if constexpr (integer) {
          for (int a = 0; a < M; ++a)
            for (int b = 0; b < T; ++b) sum_int[a][b] = V::template dot<bits>(sum_int[a][b], word[b], x_code + (i + a) * k8 + w * inputs);
        } else {
          add_word_float<bits, M, T>(sum, word, x_dense(i) + w * inputs, k8 == op.k ? op.x_stride : k8);
        }
      }
      for (int b = 0; b < T; ++b) {
        const F scale = scale_of(t + b, g);
        const I zero = zero_of(t + b, g);
        for (int a = 0; a < M; ++a) {
          const int64_t at = (i + a) * groups + g;
          F v;
          if constexpr (integer)
            v = V::to_float(V::sub_int(sum_int[a][b], V::mul_int(zero, V::set_int(static_cast<const int32_t*>(x_sum)[at]))));
          else
            v = V::sub(sum[a][b], V::mul(V::to_float(V::sub_int(zero, V::set_int(1 << (bits - 1)))), V::set(static_cast<const float*>(x_sum)[at])));
          total[a][b] = V::fma(v, scale, total[a][b]);
        }
      }
    }
    for (int a = 0; a < M; ++a)
      for (int b = 0; b < T; ++b) finish<integer>(i + a, t + b, total[a][b]);
  }

  template <bool integer>
  void finish(int64_t i, int64_t t, F v) const {
    const int64_t at = t * V::lanes;
    const int count = int(op.n - at < V::lanes ? op.n - at : V::lanes);
    if constexpr (integer) v = V::mul(v, V::set(x_scale[i]));
    if (op.bias) v = V::add(v, V::load(op.bias + at, count));
    if (op.residual) v = V::add(v, V::load(op.residual + (first + i) * op.y_stride + at, count));
    V::store(y_row(i) + at, v, count);
  }

  // Tiles by two beside several tokens, by four beside one. The totals of all groups are touched once a group and may wait in L1.
  template <int bits, bool integer, int M>
  void rows(int64_t i, int64_t begin, int64_t end) const {
    constexpr int T = M == 1 ? kTiles : 2;
    int64_t t = begin;
    for (; t + T <= end; t += T) block<bits, integer, M, T>(i, t);
    for (; t < end; ++t) block<bits, integer, M, 1>(i, t);
  }

  // Tokens in blocks of V::tokens, then 4, then 1.
  template <int bits, bool integer>
  void tokens(int64_t begin, int64_t end) const {
    int64_t i = 0;
    for (; i + V::tokens <= m; i += V::tokens) rows<bits, integer, V::tokens>(i, begin, end);
    if constexpr (V::tokens > 4)
      for (; i + 4 <= m; i += 4) rows<bits, integer, 4>(i, begin, end);
    for (; i < m; ++i) rows<bits, integer, 1>(i, begin, end);
  }

  // ---- outliers of outputs begin … end

  int64_t column(int64_t e) const {
    return op.k > 65536 ? static_cast<const int32_t*>(op.outlier_col)[e] : static_cast<const uint16_t*>(op.outlier_col)[e];
  }

  void outliers_one(int64_t i, int64_t begin, int64_t end) const {
    const float* x = x_row(i);
    float* y = y_row(i);
    for (int64_t r = begin; r < end; ++r) {
      float sum[4] = {0, 0, 0, 0};
      int64_t e = op.outlier_row[r];
      const int64_t stop = op.outlier_row[r + 1];
      for (; e + 4 <= stop; e += 4)
        for (int j = 0; j < 4; ++j) sum[j] = __builtin_fmaf(V::half(op.outlier_value[e + j]), x[column(e + j)], sum[j]);
      for (int j = 0; e < stop; ++e, ++j) sum[j] = __builtin_fmaf(V::half(op.outlier_value[e]), x[column(e)], sum[j]);
      y[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }

  void outliers_batch(int64_t block, int64_t begin, int64_t end) const {
    const float* x = x_turned + block * op.k * V::lanes;
    const int64_t i = block * V::lanes;
    const int count = int(m - i < V::lanes ? m - i : V::lanes);
    alignas(64) float out[V::lanes];
    for (int64_t r = begin; r < end; ++r) {
      int64_t e = op.outlier_row[r];
      const int64_t stop = op.outlier_row[r + 1];
      if (e == stop) continue;
      F sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      auto term = [&](int64_t at, F s) { return V::fma(V::set(V::half(op.outlier_value[at])), V::load(x + column(at) * V::lanes), s); };
      for (; e + 4 <= stop; e += 4)
        for (int j = 0; j < 4; ++j) sum[j] = term(e + j, sum[j]);
      for (int j = 0; e < stop; ++e, ++j) sum[j] = term(e, sum[j]);
      V::store(out, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
      for (int j = 0; j < count; ++j) y_row(i + j)[r] += out[j];
    }
  }

  void outliers(int64_t begin, int64_t end) const {
    if (m < kBatch) {
      for (int64_t i = 0; i < m; ++i) outliers_one(i, begin, end);
    } else {
      for (int64_t b = 0; b * V::lanes < m; ++b) outliers_batch(b, begin, end);
    }
  }

  template <int bits, bool integer>
  void run() const {
    prepare();
    // Four pieces a thread: enough to even out skewed outliers, few enough that each stays a long stream.
    const int64_t pieces = 4 * pe::threads();
    int64_t grain = (tiles + pieces - 1) / pieces;
    grain = (grain + kTiles - 1) / kTiles * kTiles;
    parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
      tokens<bits, integer>(begin, end);
      const int64_t last = end * V::lanes;
      if (op.outlier_row) outliers(begin * V::lanes, last < op.n ? last : op.n);
    });
  }
};

inline const char* qlinear_refuses(const QLinear& op) {
  const bool overflows = op.act_bits == 8 && op.group > INT32_MAX / 127 / ((1 << op.bits) - 1);
  return overflows ? "the int32 sum of a group this long may overflow" : nullptr;
}

template <class V>
void qlinear(const QLinear& op, void*) {
  for (int64_t i = 0; i < op.m; i += kChunk) {
    const QLinearTile<V> tile(op, i, op.m - i < kChunk ? op.m - i : kChunk);
    if (op.bits == 4)
      op.act_bits == 8 ? tile.template run<4, true>() : tile.template run<4, false>();
    else
      op.act_bits == 8 ? tile.template run<8, true>() : tile.template run<8, false>();
  }
}

}  // namespace
}  // namespace pe
