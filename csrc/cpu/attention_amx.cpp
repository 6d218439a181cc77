// Attention of many queries on AMX, in bf16 with f32 sums; few queries go the way of attention.h. A lane is a query, as there: scores are
// taken as K·Qᵀ and outputs as Vᵀ·Pᵀ, so that maxima, sums and rescalings are vectors over 16 queries, and softmax's results, two
// keys a lane, are a right operand as they are. Keys lie as a left operand already; values are transposed in registers.
//
// A task converts each block of kKeys keys and values once for all of its queries, which is why it takes more rows than attention.h's.
#include "cpu/attention.h"
#include "cpu/isa/amx.h"

namespace pe {
namespace {

using V = Avx512;
using F = V::F;

constexpr int64_t kTaskRows = 64;    // rows of a task
constexpr int64_t kBlockKeys = 128;  // keys between two rescalings
constexpr int64_t kGroup = 12;       // blocks of 16 queries that share the conversion: their outputs fill 48 KiB of L2 at head_dim 64

// 2^v to 3e-6, and 0 below 2^-126; NaN stays.
F exp2(F v) {
  v = V::max(V::set(-127.0f), v);  // in this order NaN, the second operand, gets through
  const F whole = V::add(v, V::set(kToWhole)), r = V::sub(v, V::sub(whole, V::set(kToWhole)));
  F p = V::set(0.0096181291f);
  for (const float c : {0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f}) p = V::fma(p, r, V::set(c));
  return V::mul(p, V::exp2_whole(whole));
}

template <class T>
struct AttentionTiles : AttentionTask<V, T> {
  using Base = AttentionTask<V, T>;
  using Base::op, Base::queries, Base::cached, Base::row_of, Base::q_of, Base::y_of;

  // What the queries of a group share, and their state; on the stack of the thread.
  struct Scratch {
    alignas(64) uint16_t key[kBlockKeys / 16][kHeadDim / 32][Amx::elements];    // left operands: 16 keys × 32 elements
    alignas(64) uint16_t value[kBlockKeys / 32][kHeadDim / 16][Amx::elements];  // left operands: 16 elements × 32 keys
    alignas(64) uint16_t query[kGroup][kHeadDim / 32][Amx::elements];           // right operands: 16 pairs of elements × 16 queries
    alignas(64) uint16_t weight[kBlockKeys / 32][Amx::elements];                // right operands: 16 pairs of keys × 16 queries
    alignas(64) float score[kBlockKeys][16], out[kGroup][kHeadDim][16];
    alignas(64) float top[kGroup][16], sum[kGroup][16], position[kGroup][16];
  };

  int64_t elements() const { return op.head_dim; }
  int64_t query_of(int64_t start, int64_t lane) const { return start + lane < queries ? start + lane : queries - 1; }

  void load_queries(Scratch& s, int64_t block, int64_t start) const {
    const F factor = V::set(op.scale * 1.44269504f);  // scores count in powers of two
    for (int64_t j = 0; j < 16; ++j) s.position[block][j] = float(op.position[row_of(query_of(start, j))]);
    for (int64_t c = 0; c < elements(); c += 32) {
      F pair[16];
      for (int64_t j = 0; j < 16; ++j) {
        const float* q = q_of(query_of(start, j)) + c;
        pair[j] = _mm512_castsi512_ps(Amx::round(V::mul(V::load(q), factor), V::mul(V::load(q + 16), factor)));
      }
      V::transpose(pair);
      for (int64_t p = 0; p < 16; ++p) _mm512_store_ps(s.query[block][c / 32] + p * 32, pair[p]);
      Amx::stay_awake<2, 3, 7>();
    }
    V::store(s.top[block], V::set(kNever)), V::store(s.sum[block], V::zero());
    for (int64_t c = 0; c < elements(); ++c) V::store(s.out[block][c], V::zero());
  }

  // 16 elements of a key or value.
  static F number(const CachedRows<T>& from, int64_t t, int64_t c) {
    const F v = from.template vector<V>(t, c);
    if constexpr (kScaled<T>) return V::mul(v, V::set(from.scale[t]));
    else return v;
  }

  // Keys and values begin … end as bf16 tiles; zeros up to a whole number of 32 keys, since what follows `end` may be anything.
  void load_keys(Scratch& s, int64_t begin, int64_t end) const {
    const int64_t d = elements(), count = end - begin;
    const CachedHead<T> from = cached();
    for (int64_t t = 0; t < (count + 31) / 32 * 32; ++t)
      for (int64_t c = 0; c < d; c += 32) {
        const __m512i row = t < count ? Amx::round(number(from.keys, begin + t, c), number(from.keys, begin + t, c + 16)) : V::zero_int();
        _mm512_store_si512(s.key[t / 16][c / 32] + t % 16 * 32, row);
        if (t % 32 == 0) Amx::stay_awake<2, 3, 7>();
      }
    for (int64_t t = 0; t < count; t += 32)
      for (int64_t c = 0; c < d; c += 16) {
        F pair[16];
        for (int64_t p = 0; p < 16; ++p) {
          const int64_t at = begin + t + 2 * p;
          const F low = at < end ? number(from.values, at, c) : V::zero(), high = at + 1 < end ? number(from.values, at + 1, c) : V::zero();
          pair[p] = _mm512_castsi512_ps(Amx::pairs(low, high));
        }
        V::transpose(pair);
        for (int64_t e = 0; e < 16; ++e) _mm512_store_ps(s.value[t / 32][c / 16] + e * 32, pair[e]);
        Amx::stay_awake<2, 3, 7>();
      }
  }

  void scores(Scratch& s, int64_t block, int64_t tiles) const {
    for (int64_t t = 0; t < tiles; t += 2) {
      Amx::zero<0>(), Amx::zero<1>();
      for (int64_t c = 0; c < elements() / 32; ++c) {
        Amx::load<6>(s.query[block][c], 64);
        Amx::load<4>(s.key[t][c], 64), Amx::multiply<0, 4, 6>();
        Amx::load<5>(s.key[t + 1][c], 64), Amx::multiply<1, 5, 6>();
      }
      Amx::store<0>(s.score[t * 16], 64), Amx::store<1>(s.score[t * 16 + 16], 64);
    }
  }

  // Scores of keys begin … begin + count → weights against the new maximum. Returns what the sums so far shrink by.
  F softmax(Scratch& s, int64_t block, int64_t begin, int64_t count) const {
    const F limit = V::load(s.position[block]), before = V::load(s.top[block]);
    F top[4] = {before, before, before, before};  // hide the latency of max()
    const bool masked = begin + count - 1 > int64_t(s.position[block][0]);
    for (int64_t t = 0; t < count; ++t) {
      F v = V::load(s.score[t]);
      if (masked) V::store(s.score[t], v = V::where_reaches(limit, V::set(float(begin + t)), v, V::set(kNever)));
      top[t % 4] = V::max(top[t % 4], v);
    }
    const F highest = V::max(V::max(top[0], top[1]), V::max(top[2], top[3])), shrink = exp2(V::sub(before, highest));
    F sum[2] = {V::mul(V::load(s.sum[block]), shrink), V::zero()};
    auto weight = [&](int64_t t) {
      const F p = t < count ? exp2(V::sub(V::load(s.score[t]), highest)) : V::zero();
      // Where all scores are masked, the maximum is kNever itself and exp2() gives 1.
      return masked && t < count ? V::where_reaches(limit, V::set(float(begin + t)), p, V::zero()) : p;
    };
    for (int64_t t = 0; t < (count + 31) / 32 * 32; t += 2) {
      if (t % 32 == 0) Amx::stay_awake<2, 3, 7>();
      const F low = weight(t), high = weight(t + 1);
      sum[0] = V::add(sum[0], low), sum[1] = V::add(sum[1], high);
      _mm512_store_si512(s.weight[t / 32] + t % 32 / 2 * 32, Amx::pairs(low, high));
    }
    V::store(s.top[block], highest), V::store(s.sum[block], V::add(sum[0], sum[1]));
    return shrink;
  }

  void accumulate(Scratch& s, int64_t block, int64_t steps) const {
    for (int64_t c = 0; c < elements() / 16; c += 2) {
      float* out = s.out[block][c * 16];
      Amx::load<0>(out, 64), Amx::load<1>(out + 256, 64);
      for (int64_t t = 0; t < steps; ++t) {
        Amx::load<6>(s.weight[t], 64);
        Amx::load<4>(s.value[t][c], 64), Amx::multiply<0, 4, 6>();
        Amx::load<5>(s.value[t][c + 1], 64), Amx::multiply<1, 5, 6>();
      }
      Amx::store<0>(out, 64), Amx::store<1>(out + 256, 64);
    }
  }

  void finish(Scratch& s, int64_t block, int64_t start) const {
    const F inverse = V::div(V::set(1.0f), V::load(s.sum[block]));
    for (int64_t c = 0; c < elements(); c += 16) {
      F value[16];
      for (int64_t e = 0; e < 16; ++e) value[e] = V::mul(V::load(s.out[block][c + e]), inverse);
      V::transpose(value);
      for (int64_t j = 0; j < 16 && start + j < queries; ++j) V::store(y_of(start + j) + c, value[j]);
      Amx::stay_awake<2, 3, 7>();
    }
  }

  // Blocks of 16 queries from query `start` on, up to kGroup of them.
  void group(int64_t start) const {
    Scratch s;
    const int64_t left = (queries - start + 15) / 16, blocks = left < kGroup ? left : kGroup;
    for (int64_t b = 0; b < blocks; ++b) load_queries(s, b, start + 16 * b);
    const int64_t length = op.position[row_of(query_of(start, 16 * blocks - 1))] + 1;
    for (int64_t begin = 0; begin < length; begin += kBlockKeys) {
      const int64_t end = begin + kBlockKeys < length ? begin + kBlockKeys : length;
      load_keys(s, begin, end);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t reach = int64_t(s.position[b][15]) + 1, count = (reach < end ? reach : end) - begin;
        if (count <= 0) continue;
        scores(s, b, (count + 31) / 32 * 2);
        const F shrink = softmax(s, b, begin, count);
        if (V::changes(shrink))
          for (int64_t c = 0; c < elements(); ++c) V::store(s.out[b][c], V::mul(V::load(s.out[b][c]), shrink));
        accumulate(s, b, (count + 31) / 32);
      }
    }
    for (int64_t b = 0; b < blocks; ++b) finish(s, b, start + 16 * b);
  }

  void run() const {
    if (queries < 16) return Base::run();
    Amx::begin();
    for (int64_t start = 0; start < queries; start += 16 * kGroup) group(start);
    Amx::end();
  }
};

const char* refuses(const Attention& op) {
  if (op.exact) return "it rounds to bf16";
  if (op.head_dim % 32) return "head_dim is no multiple of 32";
  return op.m < kFewRows ? "fewer than 16 rows, which need no matrix unit" : attention_refuses(op);
}

void attention_amx(const Attention& op, void*) {
  if (op.cache.bits == 16) attention_tasks<AttentionTiles<uint16_t>, kTaskRows>(op);
  if (op.cache.bits == 8) attention_tasks<AttentionTiles<int8_t>, kTaskRows>(op);
  if (op.cache.bits == 4) attention_tasks<AttentionTiles<uint8_t>, kTaskRows>(op);
}

const Row<Attention> row{{"attention_amx", Device::cpu, Arch::amx, 4, Layout::canonical, refuses, attention_amx}};

}  // namespace
}  // namespace pe
