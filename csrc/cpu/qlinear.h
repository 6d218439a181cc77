// Quantized linear on tiles of V::lanes outputs: INT4 or INT8 codes × f32 or integer activations, with FP16 outliers.
//
// A lane is an output. A word of codes (ops.h, Layout) feeds 8 or 4 inputs, so weights are read once per block of tokens and never
// stored in another form. Activations come in `planes`:
//   0  f32: each code is turned to f32 in a register and multiplied with the broadcast activation;
//   1  act_bits 8 or 4: an i8 code with a scale a token; a word goes through one integer dot product;
//   2  act_bits 16 where dot products are quick (V::planes): 16-bit fixed point with a scale a group, split into two i8 planes,
//      x ≈ scale · (256·high + low), which two dot products sum exactly. Reading 16 weights a lane costs 7 instructions where f32
//      takes 24, so that one token is bound by the memory and several cost half.
// A group's sum Σ code·x is corrected by zero·Σx, with Σx computed once per token; all count from the middle code, so that with
// symmetric weights nothing is left to cancel. At one token several tiles run together, since one chain of sums would wait for the
// adder's latency.
//
// Outliers follow band by band (ops.h, OutlierBand) as one pass over the rows that a thread has just done: interleaving them tile by tile
// costs 15 % more, because short extra streams defeat the hardware's prefetch. A lane is an outlier, with x gathered; from kBatch tokens
// on it is a token, over x transposed. Both ways add an output's products in the same order, so a token's bits never depend on its batch.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

constexpr int64_t kBatch = 16; // tokens from which on the outliers' lanes are tokens
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
  int8_t* x_code;              // [2][m][k8], or in tiles (qlinear_amx_int8.cpp)
  void* x_sum;                 // [2][m][groups], i32; f32[m][groups] without planes
  float* x_scale;              // [m][groups]
  float* x_column;             // [m][columns]
  float* ungated;              // [m][n], only where the result is gated

  QLinearTile(const QLinear& op, int64_t first, int64_t m) : op(op), m(m), first(first) {
    k8 = (op.k + 7) / 8 * 8, groups = op.k / op.group, tiles = (op.n + V::lanes - 1) / V::lanes;
    const int64_t rows = (m + 15) / 16 * 16;
    char* at = static_cast<char*>(op.workspace);
    auto take = [&](int64_t bytes) { char* p = at; at += (bytes + 63) / 64 * 64; return p; };
    x_padded = reinterpret_cast<float*>(take(op.act_bits == 16 ? rows * k8 * 4 : 0));
    x_turned = reinterpret_cast<float*>(take(op.outlier_band ? rows * op.k * 4 : 0));
    x_code = reinterpret_cast<int8_t*>(take(2 * rows * ((op.k + 63) / 64 * 64)));
    x_sum = take(2 * rows * groups * 4);
    x_scale = reinterpret_cast<float*>(take(rows * groups * 4));
    x_column = reinterpret_cast<float*>(take(rows * op.columns * 4));
    ungated = reinterpret_cast<float*>(at);
  }

  const float* x_row(int64_t i) const { return op.x + (first + i) * op.x_stride; }
  const float* x_dense(int64_t i) const { return k8 == op.k ? x_row(i) : x_padded + i * k8; }
  float* y_row(int64_t i) const { return op.gated ? ungated + i * op.n : op.y + (first + i) * op.y_stride; }
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

  int8_t* code_row(int plane, int64_t i) const { return x_code + (plane * m + i) * k8; }
  int32_t& code_sum(int plane, int64_t i, int64_t g) const { return static_cast<int32_t*>(x_sum)[(plane * m + i) * groups + g]; }

  // The codes of inputs begin … end, which share a scale; returns it.
  template <int planes>
  float quantize(int64_t i, int64_t begin, int64_t end) const {
    int8_t* code[planes];
    for (int p = 0; p < planes; ++p) code[p] = code_row(p, i) + begin;
    return quantize_group<V, planes>(x_row(i) + begin, end - begin, code, op.act_bits, op.act_clip);
  }

  // Codes begin … begin + count of those that came with the op, a byte each; begin is even.
  void copy_codes(int64_t i, int64_t begin, int64_t count, int8_t* to) const {
    const auto* from = static_cast<const int8_t*>(op.x_code) + (first + i) * op.k * op.act_bits / 8 + begin * op.act_bits / 8;
    if (op.act_bits == 8) return void(__builtin_memcpy(to, from, size_t(count)));
    for (int64_t c = 0; c < count; c += 2, ++from) to[c] = int8_t(int8_t(*from << 4) >> 4), to[c + 1] = int8_t(*from >> 4);
  }

  // Of a token, whose codes are made, or are what the op came with.
  float token_scale(int64_t i) const {
    if (!op.x_code) return quantize<1>(i, 0, op.k);
    copy_codes(i, 0, op.k, code_row(0, i));
    return op.x_scale[first + i];
  }

  template <int planes>
  void quantize(int64_t i) const {
    const float scale = planes == 1 ? token_scale(i) : 0;
    for (int64_t g = 0; g < groups; ++g) {
      x_scale[i * groups + g] = planes == 1 ? scale : quantize<planes>(i, g * op.group, (g + 1) * op.group);
      for (int p = 0; p < planes; ++p) {
        int32_t sum = 0;
        for (int64_t c = g * op.group; c < (g + 1) * op.group; ++c) sum += code_row(p, i)[c];
        code_sum(p, i, g) = sum;
      }
    }
    for (int p = 0; p < planes; ++p)
      for (int64_t c = op.k; c < k8; ++c) code_row(p, i)[c] = 0;
  }

  // Inputs c … c + lanes of a block of tokens.
  void turn(int64_t block, int64_t c) const {
    F v[V::lanes];
    const int count = int(op.k - c < V::lanes ? op.k - c : V::lanes);
    for (int j = 0; j < V::lanes; ++j) {
      const int64_t i = block * V::lanes + j;
      v[j] = i < m ? V::load(x_row(i) + c, count) : V::zero();
    }
    V::transpose(v);
    for (int j = 0; j < count; ++j) V::store(x_turned + (block * op.k + c + j) * V::lanes, v[j]);
  }

  template <int planes>
  void prepare() const {
    parallel_for(m, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if constexpr (planes > 0) {
          quantize<planes>(i);
        } else {
          if (k8 != op.k) pad(i);
          sum_groups(i);
        }
      }
    });
    prepare_exact();
  }

  // What outliers and columns read of x.
  void prepare_exact() const {
    if (op.columns)
      parallel_for(m, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = 0; j < op.columns; ++j) x_column[i * op.columns + j] = x_row(i)[op.column_index[j]];
      });
    if (op.outlier_band && m >= kBatch) {
      const int64_t pieces = (op.k + V::lanes - 1) / V::lanes;
      parallel_for((m + V::lanes - 1) / V::lanes * pieces, 16, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) turn(p / pieces, p % pieces * V::lanes);
      });
    }
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

  // Σ (code − middle)·x over group g, whose words are begin … end.
  template <int bits, int planes, int M, int T>
  void group_sums(F (&sum)[M][T], int64_t i, int64_t t, int64_t g, int64_t begin, int64_t end) const {
    constexpr int inputs = 32 / bits, count = planes ? planes : 1;
    const int64_t words = k8 / inputs;
    I exact[count][M][T];
    for (int p = 0; p < count; ++p)
      for (int a = 0; a < M; ++a)
        for (int b = 0; b < T; ++b)
          if constexpr (planes > 0) exact[p][a][b] = V::set_int(-(1 << (bits - 1)) * code_sum(p, i + a, g));
          else sum[a][b] = V::zero();
    for (int64_t w = begin; w < end; ++w) {
      I word[T];
      for (int b = 0; b < T; ++b) word[b] = V::load_int(op.weight + (((t + b) * words + w) * V::lanes) * 4);
      if constexpr (planes > 0) {
        for (int p = 0; p < planes; ++p)
          for (int a = 0; a < M; ++a)
            for (int b = 0; b < T; ++b) exact[p][a][b] = V::template dot<bits>(exact[p][a][b], word[b], code_row(p, i + a) + w * inputs);
      } else {
        add_word_float<bits, M, T>(sum, word, x_dense(i) + w * inputs, k8 == op.k ? op.x_stride : k8);
      }
    }
    if constexpr (planes == 1) each<M, T>([&](int a, int b) { sum[a][b] = V::to_float(off_middle<bits>(exact[0][a][b], t + b, g, code_sum(0, i + a, g))); });
    if constexpr (planes == 2)
      each<M, T>([&](int a, int b) {
        const F high = V::to_float(off_middle<bits>(exact[0][a][b], t + b, g, code_sum(0, i + a, g)));
        sum[a][b] = V::fma(high, V::set(256.0f), V::to_float(off_middle<bits>(exact[1][a][b], t + b, g, code_sum(1, i + a, g))));
      });
    if (planes == 0 && op.zero)
      each<M, T>([&](int a, int b) {
        const F offset = V::to_float(V::sub_int(zero_of(t + b, g), V::set_int(1 << (bits - 1))));
        sum[a][b] = V::sub(sum[a][b], V::mul(offset, V::set(static_cast<const float*>(x_sum)[(i + a) * groups + g])));
      });
  }

  template <int M, int T, class Body>
  static void each(Body body) {
    for (int a = 0; a < M; ++a)
      for (int b = 0; b < T; ++b) body(a, b);
  }

  // Takes away what zero points off the middle add to a sum of codes counted from the middle.
  template <int bits>
  I off_middle(I sum, int64_t t, int64_t g, int32_t x_total) const {
    if (!op.zero) return sum;
    return V::sub_int(sum, V::mul_int(V::sub_int(zero_of(t, g), V::set_int(1 << (bits - 1))), V::set_int(x_total)));
  }

  template <int bits, int planes, int M, int T>
  void block(int64_t i, int64_t t) const {
    F total[M][T];
    for (auto& row : total) for (F& v : row) v = V::zero();
    int64_t w = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = w + group_of_block(g) * bits / 32;
      F sum[M][T];
      group_sums<bits, planes, M, T>(sum, i, t, g, w, end);
      w = end;
      for (int b = 0; b < T; ++b) {
        const F scale = scale_of(t + b, g);
        for (int a = 0; a < M; ++a)
          total[a][b] = V::fma(sum[a][b], planes ? V::mul(scale, V::set(x_scale[(i + a) * groups + g])) : scale, total[a][b]);
      }
    }
    add_columns<M, T>(total, i, t);
    each<M, T>([&](int a, int b) { finish(i + a, t + b, total[a][b]); });
  }

  // The inputs that stayed f16: a short stream of lanes behind the tile's codes.
  template <int M, int T>
  void add_columns(F (&total)[M][T], int64_t i, int64_t t) const {
    for (int64_t j = 0; j < op.columns; ++j) {
      F w[T];
      for (int b = 0; b < T; ++b) w[b] = V::load_half(op.column_value + ((t + b) * op.columns + j) * V::lanes);
      for (int a = 0; a < M; ++a) {
        const F x = V::set(x_column[(i + a) * op.columns + j]);
        for (int b = 0; b < T; ++b) total[a][b] = V::fma(w[b], x, total[a][b]);
      }
    }
  }

  void finish(int64_t i, int64_t t, F v) const {
    const int64_t at = t * V::lanes;
    const int count = int(op.n - at < V::lanes ? op.n - at : V::lanes);
    if (op.bias) v = V::add(v, V::load(op.bias + at, count));
    if (op.residual) v = V::add(v, V::load(op.residual + (first + i) * op.y_stride + at, count));
    count == V::lanes ? V::store(y_row(i) + at, v) : V::store(y_row(i) + at, v, count);
  }

  // Tiles by two beside several tokens, by four beside one. The totals of all groups are touched once a group and may wait in L1.
  template <int bits, int planes, int M>
  void rows(int64_t i, int64_t begin, int64_t end) const {
    constexpr int T = M == 1 ? kTiles : 2;
    int64_t t = begin;
    for (; t + T <= end; t += T) block<bits, planes, M, T>(i, t);
    for (; t < end; ++t) block<bits, planes, M, 1>(i, t);
  }

  // Tokens in blocks as large as the registers hold; what is left over goes through the weights once more.
  template <int bits, int planes>
  void tokens(int64_t begin, int64_t end) const {
    constexpr int most = planes == 2 ? V::tokens / 2 : V::tokens;
    int64_t i = 0;
    for (; i + most <= m; i += most) rows<bits, planes, most>(i, begin, end);
    if constexpr (most > 4)
      for (; i + 4 <= m; i += 4) rows<bits, planes, 4>(i, begin, end);
    if (m - i == 3) rows<bits, planes, 3>(i, begin, end);
    if (m - i == 2) rows<bits, planes, 2>(i, begin, end);
    if (m - i == 1) rows<bits, planes, 1>(i, begin, end);
  }

  // ---- outliers of a band

  // A vector of outliers: V::lanes columns, then values.
  template <class Index>
  struct Vector {
    const Index* column;
    explicit Vector(const uint8_t* p) : column(reinterpret_cast<const Index*>(p)) {}
    const uint16_t* value() const { return reinterpret_cast<const uint16_t*>(column + V::lanes); }
    static constexpr int64_t bytes = V::lanes * (sizeof(Index) + 2);
  };

  // The runs, then the groups of a band: run(row, its vectors), group(rows of its lanes, steps, vectors).
  template <class Index, class Run, class Group>
  void each_part(const OutlierBand& band, Run run, Group group) const {
    const uint8_t* at = op.outlier_vector + int64_t(band.first_vector) * Vector<Index>::bytes;
    for (uint32_t r = 0; r < band.runs; ++r) {
      const OutlierRun& it = op.outlier_run[band.first_run + r];
      run(it.row, int64_t(it.vectors), at);
      at += it.vectors * Vector<Index>::bytes;
    }
    for (int64_t g = 0; g < OutlierBand::rows / V::lanes && band.steps[g]; ++g) {
      group(band.row + g * V::lanes, int64_t(band.steps[g]), at);
      at += band.steps[g] * Vector<Index>::bytes;
    }
  }

  template <class Index, int M>
  void outliers_few(int64_t i, const OutlierBand& band, int64_t row) const {
    auto totals = [&](F (&sum)[M], int64_t count, const uint8_t* at) {
      for (F& s : sum) s = V::zero();
      for (; count > 0; --count, at += Vector<Index>::bytes) {
        const Vector<Index> v(at);
        const F value = V::load_half(v.value());
        const I column = V::columns(v.column);
        for (int a = 0; a < M; ++a) sum[a] = V::fma(value, V::gather(x_row(i + a), column), sum[a]);
      }
    };
    F sum[M];
    each_part<Index>(
        band,
        [&](int64_t r, int64_t vectors, const uint8_t* at) {
          totals(sum, vectors, at);
          for (int a = 0; a < M; ++a) y_row(i + a)[row + r] += V::sum(sum[a]);
        },
        [&](const uint8_t* rows, int64_t steps, const uint8_t* at) {
          totals(sum, steps, at);
          alignas(64) float lane[V::lanes];
          const int64_t lanes = row + OutlierBand::rows <= op.n ? V::lanes : real_rows(rows, row);
          for (int a = 0; a < M; ++a) {
            V::store(lane, sum[a]);
            float* y = y_row(i + a) + row;
            for (int64_t j = 0; j < lanes; ++j) y[rows[j]] += lane[j];
          }
        });
  }

  // Rows of a group before those that have no outliers because they are beyond n: sorted last, as everything without.
  int64_t real_rows(const uint8_t* rows, int64_t row) const {
    int64_t count = 0;
    while (count < V::lanes && row + rows[count] < op.n) ++count;
    return count;
  }

  template <class Index>
  void outliers_batch(int64_t block, const OutlierBand& band, int64_t row) const {
    const float* x = x_turned + block * op.k * V::lanes;
    const int64_t i = block * V::lanes;
    const int count = int(m - i < V::lanes ? m - i : V::lanes);
    alignas(64) float out[V::lanes];
    auto add = [&](const uint8_t* at, int64_t lane, F sum) {
      const Vector<Index> v(at);
      return V::fma(V::set(V::half(v.value()[lane])), V::load(x + int64_t(v.column[lane]) * V::lanes), sum);
    };
    auto write = [&](int64_t r, F sum) {
      V::store(out, sum);
      for (int j = 0; j < count; ++j) y_row(i + j)[row + r] += out[j];
    };
    each_part<Index>(
        band,
        [&](int64_t r, int64_t vectors, const uint8_t* at) {
          F sum[V::lanes];
          for (F& s : sum) s = V::zero();
          for (int64_t v = 0; v < vectors; ++v, at += Vector<Index>::bytes)
            for (int64_t lane = 0; lane < V::lanes; ++lane) sum[lane] = add(at, lane, sum[lane]);
          for (int64_t half = V::lanes / 2; half; half /= 2)  // in the order of V::sum
            for (int64_t lane = 0; lane < half; ++lane) sum[lane] = V::add(sum[lane], sum[lane + half]);
          write(r, sum[0]);
        },
        [&](const uint8_t* rows, int64_t steps, const uint8_t* at) {
          for (int64_t lane = 0; lane < V::lanes && row + rows[lane] < op.n; ++lane) {
            F sum = V::zero();
            for (int64_t s = 0; s < steps; ++s) sum = add(at + s * Vector<Index>::bytes, lane, sum);
            write(rows[lane], sum);
          }
        });
  }

  template <class Index>
  void outliers(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row += OutlierBand::rows) {
      const OutlierBand& band = op.outlier_band[row / OutlierBand::rows];
      if (m < kBatch) {
        int64_t i = 0;
        for (; i + 4 <= m; i += 4) outliers_few<Index, 4>(i, band, row);
        for (; i < m; ++i) outliers_few<Index, 1>(i, band, row);
      } else {
        for (int64_t b = 0; b * V::lanes < m; ++b) outliers_batch<Index>(b, band, row);
      }
    }
  }

  // multiply(begin, end) makes all sums of those tiles of outputs but for the outliers.
  template <class Multiply>
  void run(Multiply multiply) const {
    // Four pieces a thread: enough to even out skewed outliers, few enough that each stays a long stream. All are whole bands.
    constexpr int64_t kBand = OutlierBand::rows / V::lanes;
    const int64_t pieces = 4 * pe::threads(), grain = (tiles + pieces - 1) / pieces;
    parallel_for(tiles, (grain + kBand - 1) / kBand * kBand, [&](int64_t begin, int64_t end) {
      multiply(begin, end);
      if (!op.outlier_band) return;
      const int64_t from = begin * V::lanes, to = end * V::lanes < op.n ? end * V::lanes : op.n;
      op.k > 65536 ? outliers<int32_t>(from, to) : outliers<uint16_t>(from, to);
    });
    if (op.gated)
      parallel_for(m, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) gate_row<V>(y_row(i), y_row(i) + op.n / 2, op.y + (first + i) * op.y_stride, op.n / 2);
      });
  }

  template <int bits, int planes>
  void run() const {
    prepare<planes>();
    run([&](int64_t begin, int64_t end) { tokens<bits, planes>(begin, end); });
  }
};

template <class V>
const char* qlinear_refuses(const QLinear& op) {
  if (op.gated && (op.n % 2 || op.residual)) return "a gated result has two halves and no residual";
  if (op.layout != Layout::canonical && bool(op.outlier_row) != bool(op.outlier_band)) return "outliers are not packed";
  const bool integer = op.act_bits < 16 || V::planes;
  const bool overflows = integer && op.group > INT32_MAX / 128 / ((1 << op.bits) - 1);
  return overflows ? "the int32 sum of a group this long may overflow" : nullptr;
}

template <class V>
void qlinear(const QLinear& op, void*) {
  for (int64_t i = 0; i < op.m; i += kChunk) {
    const QLinearTile<V> tile(op, i, op.m - i < kChunk ? op.m - i : kChunk);
    if (op.bits == 4)
      op.act_bits < 16 ? tile.template run<4, 1>() : tile.template run<4, V::planes>();
    else
      op.act_bits < 16 ? tile.template run<8, 1>() : tile.template run<8, V::planes>();
  }
}

}  // namespace
}  // namespace pe
