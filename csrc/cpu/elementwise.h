// The small ops of a block: RMSNorm, SiLU·mul, RoPE with the write to the KV cache. Each reads its row once or twice from L1. And the
// quantizer of everything that gets its codes at run time: activations, keys and values.
#pragma once

#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

// e^v to 2 units in the last place for v in −87…88, and clamped there: 2^n · e^r with r = v − n·ln 2, |r| ≤ ln 2 / 2; the polynomial is
// the Taylor series, whose first term left out is r^8/8! < 6e-9.
template <class V>
typename V::F exp(typename V::F v) {
  using F = typename V::F;
  v = V::min(V::set(88.0f), V::max(V::set(-87.0f), v));  // in this order NaN, the second operand, gets through
  const F n = V::round(V::mul(v, V::set(1.44269504f)));
  // ln 2 in two parts: the first has few bits, so n times it is exact.
  F r = V::fma(n, V::set(-0.693359375f), v);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = V::fma(p, r, V::set(c));
  return V::mul(p, V::exp2i(n));
}

inline const char* rmsnorm_refuses(const RmsNorm& op) { return op.residual ? "adds no residual: qlinear does" : nullptr; }

template <class V>
void store_codes(int8_t* to, typename V::I code, int count) {
  if (count == V::lanes) return V::store_bytes(to, code);
  alignas(64) int8_t tail[V::lanes];
  V::store_bytes(tail, code);
  __builtin_memcpy(to, tail, size_t(count));
}

// Codes of x[n], which share a scale (ops.h, Transform): of `bits` within clip's ratios, or for two planes in ±(256·127 + 127), whose low
// byte is a signed plane of its own. Returns the scale; NaN, and codes of 0, if an input is NaN or infinite.
template <class V, int planes>
float quantize_group(const float* x, int64_t n, int8_t* const (&code)[planes], int bits = 8, const float* clip = nullptr) {
  using F = typename V::F;
  F high = V::zero(), low = V::zero(), broken = V::zero();  // broken turns NaN with the first NaN or infinity, which max() may lose
  for (int64_t c = 0; c < n; c += V::lanes) {
    const F v = V::load(x + c, int(n - c < V::lanes ? n - c : V::lanes));
    high = V::max(high, v), low = V::min(low, v), broken = V::fma(v, V::zero(), broken);
  }
  const float most = planes == 1 ? float((1 << (bits - 1)) - 1) : 256.0f * 127.0f + 127.0f;
  const float above = V::largest(high) * (clip ? clip[0] : 1.0f), below = V::largest(V::sub(V::zero(), low)) * (clip ? clip[1] : 1.0f);
  const float scale = (above > below ? above : below) / most + V::sum(broken);
  const F inverse = V::set(scale > 0 ? 1.0f / scale : 0.0f), limit = V::set(most), least = V::set(planes == 1 ? -most - 1.0f : -most);
  for (int64_t c = 0; c < n; c += V::lanes) {
    const int count = int(n - c < V::lanes ? n - c : V::lanes);
    const F v = V::round(V::mul(V::load(x + c, count), inverse));
    // In this order NaN, the second operand, gets through: as an int it is −2^31, whose low bytes are 0.
    const auto i = V::to_int(V::max(least, V::min(limit, v)));
    store_codes<V>(code[0] + c, planes == 1 ? i : V::high_byte(i), count);
    if constexpr (planes == 2) store_codes<V>(code[1] + c, i, count);
  }
  return scale;
}

template <class V>
float rms_factor(const float* x, int64_t n, float eps) {
  typename V::F sum = V::zero();
  for (int64_t c = 0; c < n; c += V::lanes) {
    const auto v = V::load(x + c, int(n - c < V::lanes ? n - c : V::lanes));
    sum = V::fma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(V::sum(sum) / float(n) + eps);
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

template <class V>
struct RopeRow {
  const RopeKV& op;
  int64_t i;

  // Turns one head of d values: to f32 in place, or to f16 in the cache.
  void turn(const float* head, float* to, uint16_t* to_half) const {
    const int64_t half = op.head_dim / 2;
    const float* cos = op.cos + int64_t(op.position[i]) * half;
    const float* sin = op.sin + int64_t(op.position[i]) * half;
    int64_t c = 0;
    for (; c + V::lanes <= half; c += V::lanes) {
      const auto a = V::load(head + c), b = V::load(head + half + c), co = V::load(cos + c), si = V::load(sin + c);
      const auto first = V::sub(V::mul(a, co), V::mul(b, si)), second = V::add(V::mul(b, co), V::mul(a, si));
      if (to) V::store(to + c, first), V::store(to + half + c, second);
      else V::store_half(to_half + c, first), V::store_half(to_half + half + c, second);
    }
    for (; c < half; ++c) {
      const float a = head[c], b = head[half + c];
      const float first = a * cos[c] - b * sin[c], second = b * cos[c] + a * sin[c];
      if (to) to[c] = first, to[half + c] = second;
      else to_half[c] = V::half(first), to_half[half + c] = V::half(second);
    }
  }

  void run() const {
    const int64_t d = op.head_dim;
    float* row = op.qkv + i * op.qkv_stride;
    for (int64_t h = 0; h < op.heads; ++h) turn(row + h * d, row + h * d, nullptr);
    for (int64_t h = 0; h < op.kv_heads; ++h) {
      const int64_t at = op.slot[i] * op.cache.slot_stride + h * op.cache.head_stride + op.position[i] * d;
      float* k = row + (op.heads + h) * d;
      const float* v = k + op.kv_heads * d;
      op.cache.bits == 8 ? write_codes(k, v, at) : write_halves(k, v, at);
    }
  }

  // To element `at` of the cache.
  void write_codes(float* k, const float* v, int64_t at) const {
    const int64_t d = op.head_dim;
    turn(k, k, nullptr);
    op.cache.k_scale[at / d] = quantize_group<V, 1>(k, d, {static_cast<int8_t*>(op.cache.k) + at});
    op.cache.v_scale[at / d] = quantize_group<V, 1>(v, d, {static_cast<int8_t*>(op.cache.v) + at});
  }

  void write_halves(const float* k, const float* v, int64_t at) const {
    const int64_t d = op.head_dim;
    turn(k, nullptr, static_cast<uint16_t*>(op.cache.k) + at);
    uint16_t* to = static_cast<uint16_t*>(op.cache.v) + at;
    int64_t c = 0;
    for (; c + V::lanes <= d; c += V::lanes) V::store_half(to + c, V::load(v + c));
    for (; c < d; ++c) to[c] = V::half(v[c]);
  }
};

inline const char* rope_kv_refuses(const RopeKV& op) {
  return op.cache.bits == 4 || op.q_transform ? "writes a cache of 16 or 8 bits, without a change of basis" : nullptr;
}

template <class V>
void rope_kv(const RopeKV& op, void*) {
  parallel_for(op.m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) RopeRow<V>{op, i}.run();
  });
}

}  // namespace
}  // namespace pe
