// A plain blocked product, written once over vectors of any width: four weight rows meet four tokens in registers, and a panel of the
// weights stays in L2 while all tokens pass it. It is what a careful person writes in an afternoon, not a tuned library.
#include "dense.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/threads.h"

namespace bench {
namespace {

constexpr int kBlock = 4;         // rows and tokens: 16 sums and 5 operands fit 32 registers
constexpr int64_t kRows = 64;     // of a task
constexpr int64_t kPanel = 1024;  // inputs: 64 rows of floats are 256 KiB of L2, 4 tokens 16 KiB of L1

template <int lanes>
struct Vector {
  typedef float type __attribute__((vector_size(lanes * 4)));
  typedef uint32_t words __attribute__((vector_size(lanes * 4)));
  typedef uint16_t halves __attribute__((vector_size(lanes * 2)));
};

template <int lanes>
[[gnu::always_inline]] inline void load(typename Vector<lanes>::type& to, const float* from) {
  std::memcpy(&to, from, sizeof to);
}

template <int lanes>
[[gnu::always_inline]] inline void load(typename Vector<lanes>::type& to, const bf16* from) {
  typename Vector<lanes>::halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const auto words = __builtin_convertvector(halves, typename Vector<lanes>::words) << 16;
  std::memcpy(&to, &words, sizeof to);
}

template <int lanes>
[[gnu::always_inline]] inline float total(const typename Vector<lanes>::type& v) {
  if constexpr (lanes == 1) {
    return v[0];
  } else {
    typename Vector<lanes / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return total<lanes / 2>(half[0] + half[1]);
  }
}

inline float widen(float w) { return w; }
inline float widen(bf16 w) {
  const uint32_t bits = uint32_t(w) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// A panel of the weights: rows from `first` on, from input `begin` on.
template <class W>
struct Panel {
  const W* w;
  int64_t stride, first, last, begin, end;
};

// y += over the panel's inputs of 4 rows and `batch` tokens; where there are fewer, the first stands in and its result is dropped.
template <int lanes, int batch, class W>
[[gnu::always_inline]] inline void block(const Dense& op, const Panel<W>& p, int64_t row, int64_t token) {
  using V = typename Vector<lanes>::type;
  const int rows = int(std::min<int64_t>(kBlock, p.last - row)), tokens = int(std::min<int64_t>(batch, op.m - token));
  const W* wr[kBlock];
  const float* xt[batch];
  for (int i = 0; i < kBlock; ++i) wr[i] = p.w + (row - p.first + (i < rows ? i : 0)) * p.stride;
  for (int t = 0; t < batch; ++t) xt[t] = op.x + (token + (t < tokens ? t : 0)) * op.k + p.begin;
  V sum[batch][kBlock] = {};
  const int64_t count = p.end - p.begin;
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    V a[kBlock], b;
    for (int i = 0; i < kBlock; ++i) load<lanes>(a[i], wr[i] + c);
    for (int t = 0; t < batch; ++t) {
      load<lanes>(b, xt[t] + c);
      for (int i = 0; i < kBlock; ++i) sum[t][i] += a[i] * b;
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < rows; ++i) {
      float dot = total<lanes>(sum[t][i]);
      for (int64_t r = c; r < count; ++r) dot += widen(wr[i][r]) * xt[t][r];
      float& y = op.y[(token + t) * op.n + row + i];
      y = p.begin ? y + dot : dot;
    }
}

template <int lanes, class W>
[[gnu::always_inline]] inline void tokens(const Dense& op, const Panel<W>& p) {
  for (int64_t token = 0; token < op.m; token += kBlock)
    for (int64_t row = p.first; row < p.last; row += kBlock)
      op.m - token == 1 ? block<lanes, 1>(op, p, row, token) : block<lanes, kBlock>(op, p, row, token);
}

template <int lanes, class W>
[[gnu::always_inline]] inline void panels(const Dense& op, const W* w, int64_t from, int64_t to) {
  const bool many = op.m > kBlock;
  const int64_t panel = many ? kPanel : op.k;  // read once, weights are better read along the row
  for (int64_t begin = 0; begin < op.k; begin += panel) {
    const int64_t end = std::min(op.k, begin + panel);
    if (std::is_same_v<W, bf16> && many) {  // widened once for all tokens
      static thread_local float wide[kRows * kPanel];
      for (int64_t r = from; r < to; ++r)
        for (int64_t c = begin; c < end; ++c) wide[(r - from) * kPanel + c - begin] = widen(w[r * op.k + c]);
      tokens<lanes>(op, Panel<float>{wide, kPanel, from, to, begin, end});
    } else {
      tokens<lanes>(op, Panel<W>{w + from * op.k + begin, op.k, from, to, begin, end});
    }
  }
}

#if defined(__x86_64__)
template <class W>
__attribute__((target("avx512f,avx512bw,avx512vl"))) void rows_avx512(const Dense& op, const W* w, int64_t from, int64_t to) {
  panels<16>(op, w, from, to);
}
template <class W>
__attribute__((target("avx2,fma"))) void rows_avx2(const Dense& op, const W* w, int64_t from, int64_t to) {
  panels<8>(op, w, from, to);
}
#endif
template <class W>
void rows_plain(const Dense& op, const W* w, int64_t from, int64_t to) {
  panels<4>(op, w, from, to);
}

template <class W>
void run(const Dense& op, const W* w) {
  auto* rows = rows_plain<W>;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    rows = rows_avx512<W>;
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    rows = rows_avx2<W>;
#endif
  pe::parallel_for((op.n + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows(op, w, i * kRows, std::min((i + 1) * kRows, op.n));  // with one thread it is all of them
  });
}

}  // namespace

void dense(const Dense& op, const float* w) { run(op, w); }
void dense(const Dense& op, const bf16* w) { run(op, w); }

}  // namespace bench
