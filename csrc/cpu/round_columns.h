// Columns rounded in turn (ops.h, RoundColumns): a thread takes a tile of outputs, whose values stay in its cache, through all columns.
#pragma once

#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

template <class V>
struct RoundTile {
  using F = typename V::F;
  static constexpr int64_t width = RoundColumns::tile, block = RoundColumns::block;
  static constexpr int vectors = int(width) / V::lanes;
  static constexpr int together = 8 / vectors;      // later columns at a time: 8 sums hide the latency of fma()

  const RoundColumns& op;
  float* value;
  const int64_t at;                                 // of the tile's first column among all tiles'
  const float *scale, *zero;
  alignas(64) float change[block][width];           // q − base

  RoundTile(const RoundColumns& o, int64_t tile)
      : op(o), value(o.value + tile * o.k * width), at(tile * o.k * width), scale(o.scale + tile * o.groups * width),
        zero(o.zero ? o.zero + tile * o.groups * width : nullptr) {}

  void run() {
    for (int64_t a = 0; a < op.k; a += block) {
      const int64_t count = op.k - a < block ? op.k - a : block;
      for (int64_t j = a; j < a + count; ++j) {
        round(j, change[j - a]);
        for (int64_t c = j + 1; c < a + count; ++c) follow<1>(c, j, 1);
      }
      int64_t c = a + count;
      for (; c + together <= op.k; c += together) follow<together>(c, a, count);
      for (; c < op.k; ++c) follow<1>(c, a, count);
    }
  }

  // Rounds column j.
  void round(int64_t j, float* to) {
    alignas(64) uint16_t half[V::lanes];
    for (int64_t i = 0; i < width; i += V::lanes) {
      const int64_t in_group = op.group[j] * width + i, place = j * width + i;
      const F x = V::load(value + place), s = V::load(scale + in_group), z = zero ? V::load(zero + in_group) : V::zero();
      F code = V::add(V::round(V::div(x, s)), z);
      code = V::min(V::set(float(op.high)), V::max(V::set(float(op.low)), code));
      V::store_bytes(reinterpret_cast<int8_t*>(op.code + at + place), V::to_int(V::add(code, V::set(float(op.excess)))));
      F q = V::mul(V::sub(code, z), s);
      if (op.mask) {
        V::store_half(half, x);
        q = V::where_reaches(V::to_float(V::load_bytes(op.mask + at + place)), V::set(1.0f), V::load_half(half), q);
      }
      V::store(to + i, V::sub(q, op.base ? V::load(op.base + at + place) : x));
    }
  }

  // Columns c … c + columns − 1 take the changes of `count` columns from j on, in their order.
  template <int columns>
  void follow(int64_t c, int64_t j, int64_t count) {
    F sum[columns][vectors];
    for (int i = 0; i < columns; ++i)
      for (int v = 0; v < vectors; ++v) sum[i][v] = V::load(value + (c + i) * width + v * V::lanes);
    const float(*from)[width] = change + j % block;
    const float* factors = op.coupling + (j / block * op.k + c) * block + j % block;
    for (int64_t b = 0; b < count; ++b) {
      F moved[vectors];
      for (int v = 0; v < vectors; ++v) moved[v] = V::load(from[b] + v * V::lanes);
      for (int i = 0; i < columns; ++i) {
        const F factor = V::set(factors[i * block + b]);
        for (int v = 0; v < vectors; ++v) sum[i][v] = V::fma(factor, moved[v], sum[i][v]);
      }
    }
    for (int i = 0; i < columns; ++i)
      for (int v = 0; v < vectors; ++v) V::store(value + (c + i) * width + v * V::lanes, sum[i][v]);
  }
};

template <class V>
void round_columns(const RoundColumns& op, void*) {
  parallel_for(op.n / RoundColumns::tile, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) RoundTile<V>(op, tile).run();
  });
}

}  // namespace
}  // namespace pe
