// Attention of rows (slot, position) over the KV cache, with online softmax. A task is one KV head and up to kRows rows; the query
// heads that share the KV head are handled together, so the cache is read once for all of them.
//
// Many queries (prefill): a lane is a query. q is transposed once; then every key costs head_dim multiply-adds with a broadcast element
// of k, and scores, maxima, sums and outputs are vectors over the queries: nothing is ever summed across lanes.
// Few queries: attention_decode.h, where a lane is an element of the head; a lane for each query would leave lanes empty.
#pragma once

#include "cpu/attention_decode.h"

namespace pe {
namespace {

constexpr int64_t kRows = 32;     // rows of a task: a few tasks for each thread from 64 tokens on
constexpr int64_t kKeys = 32;     // keys between two rescalings of the sums

template <class V, class T>  // T: what the cache holds
struct AttentionTask {
  using F = typename V::F;
  static constexpr int64_t lanes = V::lanes;

  const Attention& op;
  int64_t head, first, rows;   // KV head; rows first … first + rows, all of one slot with ascending positions
  int64_t share, queries;      // query heads of a KV head; share · rows

  CachedHead<T> cached() const { return {op, first, head}; }
  int64_t row_of(int64_t query) const { return first + query / share; }
  const float* q_of(int64_t query) const { return op.q + row_of(query) * op.q_stride + (head * share + query % share) * op.head_dim; }
  float* y_of(int64_t query) const { return op.y + row_of(query) * op.y_stride + (head * share + query % share) * op.head_dim; }

  // ---- a lane is a query: `lanes` queries from `start` on

  void many(int64_t start) const {
    const int64_t d = op.head_dim, count = queries - start < lanes ? queries - start : lanes;
    alignas(64) float q[kHeadDim * lanes], out[kHeadDim * lanes], position[lanes], element[kHeadDim], score[kKeys * lanes];
    for (int64_t j = 0; j < lanes; ++j) {
      const int64_t query = start + (j < count ? j : count - 1);
      position[j] = float(op.position[row_of(query)]);
      for (int64_t c = 0; c < d; ++c) q[c * lanes + j] = q_of(query)[c] * op.scale, out[c * lanes + j] = 0.0f;
    }
    const F limit = V::load(position);
    const CachedHead<T> cache = cached();
    F top = V::set(kNever), sum = V::zero();
    const int64_t length = op.position[row_of(start + count - 1)] + 1;
    for (int64_t begin = 0; begin < length; begin += kKeys) {
      const int64_t end = begin + kKeys < length ? begin + kKeys : length;
      F highest = top;
      for (int64_t t = begin; t < end; ++t) {
        cache.keys.template row<V>(t, element);
        F s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // four chains hide the latency of the sum
        int64_t c = 0;
        for (; c + 4 <= d; c += 4)
          for (int j = 0; j < 4; ++j) s[j] = V::fma(V::load(q + (c + j) * lanes), V::set(element[c + j]), s[j]);
        for (; c < d; ++c) s[0] = V::fma(V::load(q + c * lanes), V::set(element[c]), s[0]);
        F v = V::add(V::add(s[0], s[1]), V::add(s[2], s[3]));
        if constexpr (kScaled<T>) v = V::mul(v, V::set(cache.keys.scale[t]));
        v = V::where_reaches(limit, V::set(float(t)), v, V::set(kNever));
        V::store(score + (t - begin) * lanes, v);
        highest = V::max(highest, v);
      }
      const F shrink = exp<V>(V::sub(top, highest));
      top = highest, sum = V::mul(sum, shrink);
      for (int64_t t = begin; t < end; ++t) {
        // A masked score stays far below any maximum, but exp() clamps at e^-87: set its weight to zero outright.
        const F p = V::where_reaches(limit, V::set(float(t)), exp<V>(V::sub(V::load(score + (t - begin) * lanes), top)), V::zero());
        sum = V::add(sum, p);
        V::store(score + (t - begin) * lanes, kScaled<T> ? V::mul(p, V::set(cache.values.scale[t])) : p);
      }
      accumulate(begin, end, shrink, score, out);
    }
    const F inverse = V::div(V::set(1.0f), sum);
    for (int64_t c = 0; c < d; ++c) V::store(out + c * lanes, V::mul(V::load(out + c * lanes), inverse));
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < d; ++c) y_of(start + j)[c] = out[c * lanes + j];
  }

  // out = out · shrink + Σ score · value over keys begin … end, four keys for each pass over out.
  void accumulate(int64_t begin, int64_t end, F shrink, const float* score, float* out) const {
    const int64_t d = op.head_dim;
    const CachedRows<T> values = cached().values;
    alignas(64) float value[4][kHeadDim];
    for (int64_t c = 0; c < d; ++c) V::store(out + c * lanes, V::mul(V::load(out + c * lanes), shrink));
    for (int64_t t = begin; t < end; t += 4) {
      F p[4];
      for (int64_t j = 0; j < 4; ++j) {
        const bool real = t + j < end;
        p[j] = real ? V::load(score + (t + j - begin) * lanes) : V::zero();
        values.template row<V>(real ? t + j : t, value[j]);
      }
      for (int64_t c = 0; c < d; ++c) {
        F v = V::load(out + c * lanes);
        for (int j = 0; j < 4; ++j) v = V::fma(p[j], V::set(value[j][c]), v);
        V::store(out + c * lanes, v);
      }
    }
  }

  void run() const {
    if (queries >= lanes / 2) {
      for (int64_t start = 0; start < queries; start += lanes) many(start);
      return;
    }
    for (int64_t row = first; row < first + rows; ++row)
      for (int64_t h = 0; h < share; h += kTogether) Heads{op, row, head, h}.template run<V, T>();
  }
};

inline const char* attention_refuses(const Attention& op) {
  return op.head_dim > kHeadDim ? "head_dim is above 256" : nullptr;
}

// Cuts the rows into tasks: one KV head, up to `most` rows of one slot with ascending positions. The last rows, which in a prompt have
// the most keys, go first, so that no thread starts a long task when the others are done.
template <class Task, int64_t most>
void attention_tasks(const Attention& op) {
  const int64_t blocks = (op.m + most - 1) / most, share = op.heads / op.kv_heads;
  parallel_for(blocks * op.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t task = blocks * op.kv_heads - 1 - t;
      const int64_t last = (task / op.kv_heads + 1) * most < op.m ? (task / op.kv_heads + 1) * most : op.m;
      for (int64_t i = task / op.kv_heads * most, stop; i < last; i = stop) {
        for (stop = i + 1; stop < last && op.slot[stop] == op.slot[i] && op.position[stop] >= op.position[stop - 1];) ++stop;
        Task{op, task % op.kv_heads, i, stop - i, share, (stop - i) * share}.run();
      }
    }
  });
}

template <class V, class T>
void attention_over(const Attention& op) {
  op.m < kFewRows ? attention_decode<V, T>(op) : attention_tasks<AttentionTask<V, T>, kRows>(op);
}

template <class V>
void attention(const Attention& op, void*) {
  if (op.cache.bits == 16) attention_over<V, uint16_t>(op);
  if (op.cache.bits == 8) attention_over<V, int8_t>(op);
  if (op.cache.bits == 4) attention_over<V, uint8_t>(op);
}

}  // namespace
}  // namespace pe
