// Attention of a few queries, over segments of keys: a task is one row, one KV head and one segment, so that a single sequence keeps all
// threads busy whatever the number of its heads. The query heads that share a KV head go together: a key or value is read and widened
// once for all of them. Segments have a fixed length and are merged in order: results do not depend on the number of threads.
//
// A lane is an element of the head. The partial sums of `lanes` keys are added across lanes all at once, by a tree of shuffles that ends
// in one vector of scores; values are summed in registers over as many keys.
//
// A cache of 8 bits costs a multiplication a key on either side: its scale goes into the score, and that of its value into the weight.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/threads.h"
#include "ops.h"

namespace pe {
namespace {

constexpr float kNever = -1e30f;  // a score that no key has; finite, so that differences stay numbers

// T is what the cache holds: halves (uint16_t), or codes (int8_t) with a scale for each key and each value.
template <class T>
constexpr bool kScaled = sizeof(T) == 1;

// The keys and values of one head in the slot of a row.
template <class T>
struct CachedHead {
  const T* keys;
  const T* values;
  const float* key_scale;
  const float* value_scale;

  CachedHead(const Attention& op, int64_t row, int64_t kv_head) {
    const int64_t at = op.slot[row] * op.cache.slot_stride + kv_head * op.cache.head_stride;
    keys = static_cast<const T*>(op.cache.k) + at, values = static_cast<const T*>(op.cache.v) + at;
    key_scale = kScaled<T> ? op.cache.k_scale + at / op.head_dim : nullptr;
    value_scale = kScaled<T> ? op.cache.v_scale + at / op.head_dim : nullptr;
  }
};

// Elements of the cache to floats; the space up to a whole number of vectors becomes 0.
template <class V, class T>
void widen(const T* from, float* to, int64_t count) {
  int64_t c = 0;
  for (; c + V::lanes <= count; c += V::lanes) V::store(to + c, V::widen(from + c));
  for (const int64_t full = (count + V::lanes - 1) / V::lanes * V::lanes; c < full; ++c) to[c] = c < count ? V::widen(from[c]) : 0.0f;
}

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
      const T* key = head.keys + (t + j) * d;
      if (d != full()) widen<V>(key, element, d);
      for (int64_t c = 0; c < d; c += lanes) {
        const F k = d == full() ? V::widen(key + c) : V::load(element + c);
        for (int g = 0; g < G; ++g) sum[g][j] = V::fma(V::load(q[g] + c), k, sum[g][j]);
      }
    }
    alignas(64) float position[lanes];
    for (int64_t j = 0; j < lanes; ++j) position[j] = float(t + j);
    for (int g = 0; g < G; ++g) {
      F s = V::sum_each(sum[g]);
      if constexpr (kScaled<T>) s = V::mul(s, V::load(head.key_scale + t, int(count(t))));
      V::store(score[g] + t - begin, V::where_reaches(V::set(float(end - 1)), V::load(position), s, V::set(kNever)));
    }
  }

  // out[g] += Σ weight · value over keys t … t + lanes.
  void add_values(int64_t t, const float (*weight)[kSegment], Seen& seen) const {
    alignas(64) float element[lanes][kHeadDim];
    const T* value = head.values + t * d;
    if (d != full())
      for (int64_t j = 0; j < count(t); ++j) widen<V>(value + j * d, element[j], d);
    for (int64_t c = 0; c < d; c += lanes) {
      F out[G];
      for (int g = 0; g < G; ++g) out[g] = V::load(seen.out[g] + c);
      for (int64_t j = 0; j < count(t); ++j) {
        const F v = d == full() ? V::widen(value + j * d + c) : V::load(element[j] + c);
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
        V::store(score[g] + t, kScaled<T> ? V::mul(p, V::load(head.value_scale + begin + t, int(count(begin + t)))) : p);
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
