// Attention of a few queries, over segments of keys: a task is one row, one KV head and one segment, so that a single sequence keeps all
// threads busy whatever the number of its heads. The query heads that share a KV head go together: a key or value is read and widened
// once for all of them. Segments have a fixed length and are merged in order: results do not depend on the number of threads.
//
// A lane is an element of the head. The partial sums of `lanes` keys are added across lanes all at once, by a tree of shuffles that ends
// in one vector of scores; values are summed in registers over as many keys.
//
// A cache of 8 or 4 bits costs a multiplication a key on either side: its scale goes into the score, and that of its value into the weight.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/threads.h"
#include "ops.h"

#include <type_traits>

namespace pe {
namespace {

constexpr float kNever = -1e30f;  // a score that no key has; finite, so that differences stay numbers

// T is what the cache holds: halves (uint16_t), or codes with a scale for each key and each value: of 8 bits (int8_t), or of 4 bits, two a
// byte and with a zero code beside the scale (uint8_t).
template <class T>
constexpr bool kScaled = sizeof(T) == 1;
template <class T>
constexpr int64_t kPerUnit = std::is_same_v<T, uint8_t> ? 2 : 1;  // elements in a T

// The keys or the values of one head in one slot, d elements each.
template <class T>
struct CachedRows {
  const T* data;
  const float* scale;
  const uint8_t* zero;
  int64_t d;

  CachedRows(const void* all, const float* scales, const uint8_t* zeros, int64_t at, int64_t d)
      : data(static_cast<const T*>(all) + at / kPerUnit<T>), scale(kScaled<T> ? scales + at / d : nullptr),
        zero(kPerUnit<T> == 2 ? zeros + at / d : nullptr), d(d) {}

  // Elements c … c + lanes of row t, before its scale; all of them within it, and c a multiple of lanes.
  template <class V>
  typename V::F vector(int64_t t, int64_t c) const {
    const auto v = V::widen(data + (t * d + c) / kPerUnit<T>);
    if constexpr (kPerUnit<T> == 2) return V::sub(v, V::set(float(zero[t])));
    else return v;
  }

  // All elements of row t; the space up to a whole number of vectors becomes 0.
  template <class V>
  void row(int64_t t, float* to) const {
    int64_t c = 0;
    for (; c + V::lanes <= d; c += V::lanes) V::store(to + c, vector<V>(t, c));
    for (const int64_t full = (d + V::lanes - 1) / V::lanes * V::lanes; c < full; ++c) to[c] = c < d ? element<V>(t, c) : 0.0f;
  }

 private:
  template <class V>
  float element(int64_t t, int64_t c) const {
    const T unit = data[(t * d + c) / kPerUnit<T>];
    if constexpr (kPerUnit<T> == 2) return float((unit >> c % 2 * 4 & 15) - zero[t]);
    else return V::widen(unit);
  }
};

// The keys and values of one head in the slot of a row.
template <class T>
struct CachedHead {
  CachedRows<T> keys, values;

  CachedHead(const Attention& op, int64_t row, int64_t kv_head)
      : CachedHead(op.cache, op.slot[row] * op.cache.slot_stride + kv_head * op.cache.head_stride, op.head_dim) {}

 private:
  CachedHead(const KVCache& cache, int64_t at, int64_t d)
      : keys(cache.k, cache.k_scale, cache.k_zero, at, d), values(cache.v, cache.v_scale, cache.v_zero, at, d) {}
};

// Queries q[G][d], scaled, over keys and values begin … end of one head.
template <class V, class T, int G>
struct Segment {
  using F = typename V::F;
  static constexpr int64_t lanes = V::lanes;

  CachedHead<T> head;
  int64_t d, begin, end;
  const float (*q)[kHeadDim];  // zeros beyond d up to whole vectors

  int64_t full() const { return (d + lanes - 1) / lanes * lanes; }
  int64_t count(int64_t t) const { return end - t < lanes ? end - t : lanes; }  // keys of the vector that begins with key t

  // Scores of keys t … t + lanes into score[g]; never those from `end` on.
  void scores(int64_t t, float (*score)[kSegment]) const {
    F sum[G][lanes];
    alignas(64) float element[kHeadDim];
    for (int64_t j = 0; j < lanes; ++j) {
      for (int g = 0; g < G; ++g) sum[g][j] = V::zero();
      if (t + j >= end) continue;
      if (d != full()) head.keys.template row<V>(t + j, element);
      for (int64_t c = 0; c < d; c += lanes) {
        const F k = d == full() ? head.keys.template vector<V>(t + j, c) : V::load(element + c);
        for (int g = 0; g < G; ++g) sum[g][j] = V::fma(V::load(q[g] + c), k, sum[g][j]);
      }
    }
    alignas(64) float position[lanes];
    for (int64_t j = 0; j < lanes; ++j) position[j] = float(t + j);
    for (int g = 0; g < G; ++g) {
      F s = V::sum_each(sum[g]);
      if constexpr (kScaled<T>) s = V::mul(s, V::load(head.keys.scale + t, int(count(t))));
      V::store(score[g] + t - begin, V::where_reaches(V::set(float(end - 1)), V::load(position), s, V::set(kNever)));
    }
  }

  // out[g] += Σ weight · value over keys t … t + lanes.
  void add_values(int64_t t, const float (*weight)[kSegment], Seen& seen) const {
    alignas(64) float element[lanes][kHeadDim];
    if (d != full())
      for (int64_t j = 0; j < count(t); ++j) head.values.template row<V>(t + j, element[j]);
    for (int64_t c = 0; c < d; c += lanes) {
      F out[G];
      for (int g = 0; g < G; ++g) out[g] = V::load(seen.out[g] + c);
      for (int64_t j = 0; j < count(t); ++j) {
        const F v = d == full() ? head.values.template vector<V>(t + j, c) : V::load(element[j] + c);
        for (int g = 0; g < G; ++g) out[g] = V::fma(V::set(weight[g][t - begin + j]), v, out[g]);
      }
      for (int g = 0; g < G; ++g) V::store(seen.out[g] + c, out[g]);
    }
  }

  void run(Seen& seen) const {
    alignas(64) float score[G][kSegment];
    for (int64_t t = begin; t < end; t += lanes) scores(t, score);
    for (int g = 0; g < G; ++g) {
      F top = V::set(kNever), sum = V::zero();
      for (int64_t t = 0; t < end - begin; t += lanes) top = V::max(top, V::load(score[g] + t));
      seen.top[g] = V::largest(top);
      for (int64_t t = 0; t < end - begin; t += lanes) {
        const F p = exp<V>(V::sub(V::load(score[g] + t), V::set(seen.top[g])));
        sum = V::add(sum, p);
        V::store(score[g] + t, kScaled<T> ? V::mul(p, V::load(head.values.scale + begin + t, int(count(begin + t)))) : p);
      }
      // exp() clamps at e^-87, so the keys beyond the end have counted for that: nothing beside the 1 of the maximum.
      seen.sum[g] = V::sum(sum);
      for (int64_t c = 0; c < full(); c += lanes) V::store(seen.out[g] + c, V::zero());
    }
    for (int64_t t = begin; t < end; t += lanes) add_values(t, score, seen);
  }
};

// The query heads of a row that share a KV head and go together: `first` … `first` + kTogether of those that share it.
struct Heads {
  const Attention& op;
  int64_t row, kv_head, first;

  int64_t head() const { return kv_head * (op.heads / op.kv_heads) + first; }
  int64_t count() const {
    const int64_t left = op.heads / op.kv_heads - first;
    return left < kTogether ? left : kTogether;
  }
  int64_t length() const { return op.position[row] + 1; }

  template <class V, class T>
  void attend(int64_t segment, Seen& seen) const {
    const int64_t d = op.head_dim, begin = segment * kSegment;
    alignas(64) float q[kTogether][kHeadDim];
    for (int64_t g = 0; g < count(); ++g) {
      const float* from = op.q + row * op.q_stride + (head() + g) * d;
      for (int64_t c = 0; c < (d + V::lanes - 1) / V::lanes * V::lanes; ++c) q[g][c] = c < d ? from[c] * op.scale : 0.0f;
    }
    auto run = [&]<int G>() {
      Segment<V, T, G>{{op, row, kv_head}, d, begin, begin + kSegment < length() ? begin + kSegment : length(), q}.run(seen);
    };
    if (count() == 1) run.template operator()<1>();
    if (count() == 2) run.template operator()<2>();
    if (count() == 3) run.template operator()<3>();
    if (count() == 4) run.template operator()<4>();
  }

  // Adds what a later segment has seen to `all`.
  void absorb(Seen& all, const Seen& part) const {
    for (int64_t g = 0; g < count(); ++g) {
      const float top = part.top[g] > all.top[g] ? part.top[g] : all.top[g];
      const float a = __builtin_expf(all.top[g] - top), b = __builtin_expf(part.top[g] - top);
      all.top[g] = top, all.sum[g] = all.sum[g] * a + part.sum[g] * b;
      for (int64_t c = 0; c < op.head_dim; ++c) all.out[g][c] = all.out[g][c] * a + part.out[g][c] * b;
    }
  }

  void finish(const Seen& all) const {
    for (int64_t g = 0; g < count(); ++g)
      for (int64_t c = 0; c < op.head_dim; ++c) op.y[row * op.y_stride + (head() + g) * op.head_dim + c] = all.out[g][c] / all.sum[g];
  }

  // All segments, one after another.
  template <class V, class T>
  void run() const {
    Seen all, part;
    attend<V, T>(0, all);
    for (int64_t s = 1; s * kSegment < length(); ++s) {
      attend<V, T>(s, part);
      absorb(all, part);
    }
    finish(all);
  }
};

template <class V, class T>
void attention_decode(const Attention& op) {
  int64_t longest = 0;
  for (int64_t i = 0; i < op.m; ++i) longest = op.position[i] > longest ? op.position[i] : longest;
  const int64_t parts = (op.heads / op.kv_heads + kTogether - 1) / kTogether, tasks = op.m * op.kv_heads * parts;
  Seen* seen = static_cast<Seen*>(op.workspace);  // [segment][task]
  auto heads = [&](int64_t task) { return Heads{op, task / parts / op.kv_heads, task / parts % op.kv_heads, task % parts * kTogether}; };
  parallel_for(tasks * (longest / kSegment + 1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Heads h = heads(i % tasks);
      if (i / tasks * kSegment < h.length()) h.attend<V, T>(i / tasks, seen[i]);
    }
  });
  for (int64_t t = 0; t < tasks; ++t) {
    const Heads h = heads(t);
    for (int64_t s = 1; s * kSegment < h.length(); ++s) h.absorb(seen[t], seen[s * tasks + t]);
    h.finish(seen[t]);
  }
}

}  // namespace
}  // namespace pe
