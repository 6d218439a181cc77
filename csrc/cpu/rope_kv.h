// RoPE in place, the change of basis after it where there is one, and the write to the KV cache: as halves, or as codes of 8 or 4 bits.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/threads.h"
#include "cpu/transform.h"
#include "ops.h"

namespace pe {
namespace {

// Codes of 4 bits of x[d], two a byte, with their zero (ops.h, RopeKV). Returns the scale; NaN, and codes of 0, if an element is NaN or infinite.
template <class V>
float quantize_head(const float* x, int64_t d, const float* clip, uint8_t* to, uint8_t& zero_code) {
  using F = typename V::F;
  const Range<V> range(x, d);
  const float above = range.high * (clip ? clip[0] : 1.0f), below = range.low * (clip ? clip[1] : 1.0f);
  const float scale = (above + below) / 15.0f + range.broken, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const float middle = __builtin_nearbyintf(below * inverse);
  const float zero = middle > 0 ? middle < 15 ? middle : 15.0f : 0.0f;  // NaN, which is 0 · infinity, becomes 0
  zero_code = uint8_t(zero);
  for (int64_t c = 0; c < d; c += V::lanes) {
    const int count = int(d - c < V::lanes ? d - c : V::lanes);
    const F v = V::add(V::round(V::mul(V::load(x + c, count), V::set(inverse))), V::set(zero));
    // In this order NaN, the second operand, gets through: as an int it is −2^31, whose low byte is 0.
    store_nibbles<V>(to + c / 2, V::to_int(V::max(V::zero(), V::min(V::set(15.0f), v))), count);
  }
  return scale;
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

  // `count` heads from `head` on times basis[d, d], in place: a few at a time, from a copy.
  void change_basis(float* head, int64_t count, const void* basis) const {
    constexpr int64_t kHeads = 6;  // what the product takes at once
    alignas(64) float copy[kHeads * kFactor];
    const int64_t d = op.head_dim;
    for (int64_t h = 0; h < count; h += kHeads) {
      const int64_t some = count - h < kHeads ? count - h : kHeads;
      __builtin_memcpy(copy, head + h * d, size_t(some * d) * sizeof(float));
      SmallProduct<V>{copy, d, 1, static_cast<const float*>(basis), d, head + h * d, d, some, d, d}.run();
    }
  }

  float* heads() const { return op.qkv + i * op.qkv_stride; }
  bool turns_keys() const { return op.cache.bits < 16 || op.k_transform; }  // before they go to the cache, else on their way

  void run() const {
    const int64_t d = op.head_dim;
    for (int64_t h = 0; h < op.heads + (turns_keys() ? op.kv_heads : 0); ++h) turn(heads() + h * d, heads() + h * d, nullptr);
    if (op.q_transform) change_basis(heads(), op.heads, op.q_transform);
    if (op.k_transform) change_basis(heads() + op.heads * d, op.kv_heads, op.k_transform);
    write();
  }

  // Keys and values to the cache.
  void write() const {
    const int64_t d = op.head_dim;
    const float* keys = heads() + op.heads * d;
    for (int64_t h = 0; h < op.kv_heads; ++h) {
      const int64_t at = op.slot[i] * op.cache.slot_stride + h * op.cache.head_stride + op.position[i] * d;
      const float *k = keys + h * d, *v = k + op.kv_heads * d;
      if (op.cache.bits == 4) write_nibbles(k, v, at);
      if (op.cache.bits == 8) write_codes(k, v, at);
      if (op.cache.bits == 16) {
        uint16_t* to = static_cast<uint16_t*>(op.cache.k) + at;
        turns_keys() ? write_halves(k, to) : turn(k, nullptr, to);
        write_halves(v, static_cast<uint16_t*>(op.cache.v) + at);
      }
    }
  }

  // To element `at` of the cache.
  void write_codes(const float* k, const float* v, int64_t at) const {
    const int64_t d = op.head_dim;
    op.cache.k_scale[at / d] = quantize_group<V, 1>(k, d, {static_cast<int8_t*>(op.cache.k) + at});
    op.cache.v_scale[at / d] = quantize_group<V, 1>(v, d, {static_cast<int8_t*>(op.cache.v) + at});
  }

  void write_nibbles(const float* k, const float* v, int64_t at) const {
    const int64_t d = op.head_dim, head = at / d;
    op.cache.k_scale[head] = quantize_head<V>(k, d, op.k_clip, static_cast<uint8_t*>(op.cache.k) + at / 2, op.cache.k_zero[head]);
    op.cache.v_scale[head] = quantize_head<V>(v, d, op.v_clip, static_cast<uint8_t*>(op.cache.v) + at / 2, op.cache.v_zero[head]);
  }

  void write_halves(const float* from, uint16_t* to) const {
    int64_t c = 0;
    for (; c + V::lanes <= op.head_dim; c += V::lanes) V::store_half(to + c, V::load(from + c));
    for (; c < op.head_dim; ++c) to[c] = V::half(from[c]);
  }
};

inline const char* rope_kv_refuses(const RopeKV& op) {
  return op.q_transform && op.head_dim > kFactor ? "head_dim is above 256, which is too much for a change of basis" : nullptr;
}

template <class V>
void rope_kv(const RopeKV& op, void*) {
  parallel_for(op.m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) RopeRow<V>{op, i}.run();
  });
}

}  // namespace
}  // namespace pe
