// Change of basis of what linears read, with RMSNorm or a gate before it and the quantizer after it: t = leftᵀ · mat(v)[a, b] · right for
// each token.
//
// Both products are one small matrix product, C[rows, b] = A[rows, inner] · B[inner, b] with a lane for a column of B: right's operands are
// (v, right), left's (leftᵀ, what right has left). A and B lie in L1 (24 × 24 and 32 × 48 floats take 2 to 9 KiB), six rows by two vectors
// of sums wait in registers, and an element of A is broadcast to both: 8 loads for 12 multiply-adds. All sums run over the inner index in
// ascending order, whatever the rows beside them, so a token's bits never depend on its batch.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

constexpr int64_t kFactor = 256;  // the largest factor

// C = A · B for b columns. Element (i, j) of A is a[i · a_row + j · a_column]; rows of B are b_stride, those of C c_stride apart.
template <class V>
struct SmallProduct {
  using F = typename V::F;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t rows, inner, columns;

  // M rows from row i on, T vectors of columns from column j on, the last of `count` lanes.
  template <int M, int T>
  void block(int64_t i, int64_t j, int count) const {
    F sum[M][T];
    for (auto& row : sum) for (F& s : row) s = V::zero();
    for (int64_t k = 0; k < inner; ++k) {
      F v[T];
      for (int t = 0; t < T; ++t) v[t] = load(b + k * b_stride + j + t * V::lanes, t == T - 1 ? count : V::lanes);
      for (int r = 0; r < M; ++r) {
        const F x = V::set(a[(i + r) * a_row + k * a_column]);
        for (int t = 0; t < T; ++t) sum[r][t] = V::fma(x, v[t], sum[r][t]);
      }
    }
    for (int r = 0; r < M; ++r)
      for (int t = 0; t < T; ++t) store(c + (i + r) * c_stride + j + t * V::lanes, sum[r][t], t == T - 1 ? count : V::lanes);
  }

  static F load(const float* p, int count) { return count == V::lanes ? V::load(p) : V::load(p, count); }
  static void store(float* p, F v, int count) { count == V::lanes ? V::store(p, v) : V::store(p, v, count); }

  template <int M>
  void band(int64_t i) const {
    int64_t j = 0;
    for (; j + V::lanes < columns; j += 2 * V::lanes) {
      const int64_t left = columns - j - V::lanes;
      block<M, 2>(i, j, int(left < V::lanes ? left : V::lanes));
    }
    if (j < columns) block<M, 1>(i, j, int(columns - j));
  }

  void run() const {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) band<6>(i);
    for (; i + 2 <= rows; i += 2) band<2>(i);
    if (i < rows) band<1>(i);
  }
};

// The codes of token i, which has become t[n].
template <class V>
void write_token(const Transform& op, int64_t i, const float* t) {
  op.scale[i] = write_codes<V>(t, op.n, op.bits, op.clip, static_cast<uint8_t*>(op.code) + i * op.n * op.bits / 8);
}

// One token. y, or where codes alone are asked for a buffer, takes the result of `right`, made from a few rows of mat(v) at a time; then in
// place that of `left`, a few columns at a time.
template <class V>
struct TransformRow {
  static constexpr int64_t kRowsAtOnce = 6;

  const Transform& op;
  int64_t i;
  float factor;  // of RMSNorm

  TransformRow(const Transform& op, int64_t i) : op(op), i(i), factor(op.weight ? rms_factor<V>(x(), op.n, op.eps) : 1.0f) {}

  const float* x() const { return op.x + i * op.x_stride; }

  // Elements begin … begin + count of v: in `to`, or where x has them.
  const float* input(int64_t begin, int64_t count, float* to) const {
    if (op.gated) return gate_row<V>(x() + begin, x() + op.n + begin, to, count), to;
    if (op.weight) return scale_row<V>(x() + begin, factor, op.weight + begin, to, count), to;
    return x() + begin;
  }

  void times_right(float* y) const {
    alignas(64) float room[kRowsAtOnce * kFactor];
    for (int64_t r = 0; r < op.a; r += kRowsAtOnce) {
      const int64_t rows = op.a - r < kRowsAtOnce ? op.a - r : kRowsAtOnce;
      const float* v = input(r * op.b, rows * op.b, room);
      SmallProduct<V>{v, op.b, 1, static_cast<const float*>(op.right), op.b, y + r * op.b, op.b, rows, op.b, op.b}.run();
    }
  }

  // leftᵀ · from[a, b] for two vectors of columns at a time, whose copy is at most two thirds of L1. y may be `from`.
  void times_left(const float* from, float* y) const {
    constexpr int64_t width = 2 * V::lanes;
    alignas(64) float copy[kFactor * width];
    for (int64_t j = 0; j < op.b; j += width) {
      const int64_t columns = op.b - j < width ? op.b - j : width;
      for (int64_t r = 0; r < op.a; ++r)
        for (int64_t c = 0; c < columns; c += V::lanes) {
          const int count = int(columns - c < V::lanes ? columns - c : V::lanes);
          V::store(copy + r * width + c, V::load(from + r * op.b + j + c, count));
        }
      SmallProduct<V>{static_cast<const float*>(op.left), 1, op.a, copy, width, y + j, op.b, op.a, op.a, columns}.run();
    }
  }

  // room[n] takes the result where there is no y for it.
  void run(float* room) const {
    float* y = op.y ? op.y + i * op.y_stride : room;
    const float* t = y;
    op.right ? times_right(y) : void(t = input(0, op.n, y));
    if (op.left) times_left(t, y);
    else if (t != y && op.y) __builtin_memcpy(y, t, size_t(op.n) * sizeof(float));
    if (op.code) write_token<V>(op, i, op.left ? y : t);
  }
};

inline const char* transform_refuses(const Transform& op) {
  return op.a > kFactor || op.b > kFactor ? "a factor is above 256" : nullptr;
}

template <class V>
void transform(const Transform& op, void*) {
  parallel_for(op.m, 4, [&](int64_t begin, int64_t end) {
    alignas(64) float room[kFactor * kFactor];
    for (int64_t i = begin; i < end; ++i) TransformRow<V>(op, i).run(room);
  });
}

}  // namespace
}  // namespace pe
