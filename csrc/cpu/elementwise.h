// The small ops of a block: RMSNorm and SiLU·mul, each of which reads its row once or twice from L1. And the quantizer of everything that
// gets signed codes at run time: activations, keys and values.
#pragma once

#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

// n + kToWhole, 1.5 · 2^23 + 127, is rounded to a whole number, and its low bits are the exponent of 2^n: three instructions less than to
// round and convert.
constexpr float kToWhole = 12582912.0f + 127.0f;

// e^v to 2 units in the last place for v in −87…88, and clamped there: 2^n · e^r with r = v − n·ln 2, |r| ≤ ln 2 / 2; the polynomial is
// the Taylor series, whose first term left out is r^8/8! < 6e-9.
template <class V>
typename V::F exp(typename V::F v) {
  using F = typename V::F;
  v = V::min(V::set(88.0f), V::max(V::set(-87.0f), v));  // in this order NaN, the second operand, gets through
  const F whole = V::fma(v, V::set(1.44269504f), V::set(kToWhole)), n = V::sub(whole, V::set(kToWhole));
  // ln 2 in two parts: the first has few bits, so n times it is exact.
  F r = V::fma(n, V::set(-0.693359375f), v);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = V::fma(p, r, V::set(c));
  return V::mul(p, V::exp2_whole(whole));
}

inline const char* rmsnorm_refuses(const RmsNorm& op) { return op.residual ? "adds no residual: qlinear does" : nullptr; }

template <class V>
void store_codes(int8_t* to, typename V::I code, int count) {
  if (count == V::lanes) return V::store_bytes(to, code);
  alignas(64) int8_t tail[V::lanes];
  V::store_bytes(tail, code);
  __builtin_memcpy(to, tail, size_t(count));
}

// Codes of 4 bits of an even number of lanes, two a byte.
template <class V>
void store_nibbles(uint8_t* to, typename V::I code, int count) {
  if (count == V::lanes) return V::store_nibbles(to, code);
  uint8_t tail[V::lanes / 2];
  V::store_nibbles(tail, code);
  __builtin_memcpy(to, tail, size_t(count) / 2);
}

// How far x[n] reaches above and below zero. broken is NaN if an element is NaN or infinite, which max() may lose, else 0.
template <class V>
struct Range {
  float high, low, broken;

  Range(const float* x, int64_t n) {
    using F = typename V::F;
    constexpr int kChains = 4;  // hide the latency of max()
    F up[kChains], down[kChains], bad[kChains];
    for (int j = 0; j < kChains; ++j) up[j] = down[j] = bad[j] = V::zero();
    auto take = [&](int j, F v) { up[j] = V::max(up[j], v), down[j] = V::min(down[j], v), bad[j] = V::fma(v, V::zero(), bad[j]); };
    int64_t c = 0;
    for (; c + kChains * V::lanes <= n; c += kChains * V::lanes)
      for (int j = 0; j < kChains; ++j) take(j, V::load(x + c + j * V::lanes));
    for (; c < n; c += V::lanes) take(0, V::load(x + c, int(n - c < V::lanes ? n - c : V::lanes)));
    for (int j = 1; j < kChains; ++j) up[0] = V::max(up[0], up[j]), down[0] = V::min(down[0], down[j]), bad[0] = V::add(bad[0], bad[j]);
    high = V::largest(up[0]), low = V::largest(V::sub(V::zero(), down[0])), broken = V::sum(bad[0]);
  }
};

// What x[n] becomes codes by, which share a scale (ops.h, Transform): of `bits` within clip's ratios, or for two planes in
// ±(256·127 + 127), whose low byte is a signed plane of its own. The scale is NaN, and all codes are 0, if an input is NaN or infinite.
template <class V, int planes>
struct Quantizer {
  using F = typename V::F;
  using I = typename V::I;

  float scale, inverse, most;
  bool fits;  // into an int: what can be packed with saturation

  Quantizer(const Range<V>& range, int bits, const float* clip) : most(planes == 1 ? float((1 << (bits - 1)) - 1) : 256.0f * 127.0f + 127.0f) {
    const float above = range.high * (clip ? clip[0] : 1.0f), below = range.low * (clip ? clip[1] : 1.0f);
    scale = (above > below ? above : below) / most + range.broken, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    fits = (range.high > range.low ? range.high : range.low) * inverse < 1e9f && range.broken == 0;
  }

  // In this order NaN, the second operand, gets through: as an int, to which all is rounded here, it is −2^31, whose low bytes are 0.
  I codes(F x) const {
    const F v = V::mul(x, V::set(inverse));
    return V::to_int(V::max(V::set(planes == 1 ? -most - 1.0f : -most), V::min(V::set(most), v)));
  }

  // Those of four vectors that fit, a byte each.
  I bytes(const float* x) const {
    auto code = [&](int j) { return V::to_int(V::mul(V::load(x + j * V::lanes), V::set(inverse))); };
    const I all = V::pack(code(0), code(1), code(2), code(3));
    return most == 7.0f ? V::clamp_bytes(all, -8, 7) : all;
  }
  int64_t packable(int64_t n) const { return planes == 1 && fits ? n / (4 * V::lanes) * (4 * V::lanes) : 0; }

  // Those of n of the inputs.
  void write(const float* x, int64_t n, int8_t* const (&code)[planes]) const {
    int64_t c = 0;
    for (const int64_t end = packable(n); c < end; c += 4 * V::lanes) V::store_int(code[0] + c, bytes(x + c));
    for (; c < n; c += V::lanes) {
      const int count = int(n - c < V::lanes ? n - c : V::lanes);
      const auto i = codes(V::load(x + c, count));
      store_codes<V>(code[0] + c, planes == 1 ? i : V::high_byte(i), count);
      if constexpr (planes == 2) store_codes<V>(code[1] + c, i, count);
    }
  }

  // The same of 4 bits, two a byte with the even one in the low nibble; n is even.
  void write_pairs(const float* x, int64_t n, uint8_t* to) const {
    int64_t c = 0;
    for (const int64_t end = packable(n); c < end; c += 4 * V::lanes) V::store_half_bytes(to + c / 2, bytes(x + c));
    for (; c < n; c += V::lanes) {
      const int count = int(n - c < V::lanes ? n - c : V::lanes);
      store_nibbles<V>(to + c / 2, codes(V::load(x + c, count)), count);
    }
  }
};

// Makes the codes of all of x[n]; returns the scale.
template <class V, int planes>
float quantize_group(const float* x, int64_t n, int8_t* const (&code)[planes], int bits = 8, const float* clip = nullptr) {
  const Quantizer<V, planes> quantizer(Range<V>(x, n), bits, clip);
  quantizer.write(x, n, code);
  return quantizer.scale;
}

// The codes of 8 bits of x[n], or of 4, two a byte with the even one in the low nibble (ops.h, Transform); n is even then. Returns the scale.
template <class V>
float write_codes(const float* x, int64_t n, int bits, const float* clip, void* to) {
  if (bits == 8) return quantize_group<V, 1>(x, n, {static_cast<int8_t*>(to)}, 8, clip);
  const Quantizer<V, 1> quantizer(Range<V>(x, n), bits, clip);
  quantizer.write_pairs(x, n, static_cast<uint8_t*>(to));
  return quantizer.scale;
}

template <class V>
float rms_factor(const float* x, int64_t n, float eps) {
  constexpr int kChains = 4;  // hide the latency of fma()
  typename V::F sum[kChains];
  for (auto& s : sum) s = V::zero();
  int64_t c = 0;
  auto take = [&](int j, typename V::F v) { sum[j] = V::fma(v, v, sum[j]); };
  for (; c + kChains * V::lanes <= n; c += kChains * V::lanes)
    for (int j = 0; j < kChains; ++j) take(j, V::load(x + c + j * V::lanes));
  for (; c < n; c += V::lanes) take(0, V::load(x + c, int(n - c < V::lanes ? n - c : V::lanes)));
  return 1.0f / __builtin_sqrtf(V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))) / float(n) + eps);
}

// y[n] = x · factor · weight.
template <class V>
void scale_row(const float* x, float factor, const float* weight, float* y, int64_t n) {
  for (int64_t c = 0; c < n; c += V::lanes) {
    const int count = int(n - c < V::lanes ? n - c : V::lanes);
    V::store(y + c, V::mul(V::mul(V::load(x + c, count), V::set(factor)), V::load(weight + c, count)), count);
  }
}

template <class V>
void rmsnorm(const RmsNorm& op, void*) {
  parallel_for(op.m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* x = op.x + (op.row ? op.row[i] : i) * op.n;
      scale_row<V>(x, rms_factor<V>(x, op.n, op.eps), op.weight, op.y + i * op.n, op.n);
    }
  });
}

template <class V>
typename V::F silu_mul(typename V::F gate, typename V::F up) {
  const auto sigmoid = V::div(V::set(1.0f), V::add(V::set(1.0f), exp<V>(V::sub(V::zero(), gate))));
  return V::mul(V::mul(gate, sigmoid), up);
}

template <class V>
void gate_row(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t c = 0; c < n; c += V::lanes) {
    const int count = int(n - c < V::lanes ? n - c : V::lanes);
    V::store(y + c, silu_mul<V>(V::load(gate + c, count), V::load(up + c, count)), count);
  }
}

template <class V>
void silu_mul(const SiluMul& op, void*) {
  parallel_for(op.m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gate_row<V>(op.x + i * 2 * op.n, op.x + i * 2 * op.n + op.n, op.y + i * op.n, op.n);
  });
}

}  // namespace
}  // namespace pe
