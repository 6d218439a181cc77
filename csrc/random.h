// The random numbers of Sample (ops.h), the same bits on the CPU and on a GPU: integers, and float operations that both round alike. No
// product is followed by a sum, which one of them might fuse, but where fmaf() says so.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PE_BOTH __host__ __device__ __forceinline__
#else
#define PE_BOTH inline
#endif

namespace pe::random {

struct Four {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): four random words for each pair of a counter and a key.
PE_BOTH Four philox(Four counter, uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.word[0], b = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(b >> 32) ^ counter.word[1] ^ low, uint32_t(b), uint32_t(a >> 32) ^ counter.word[3] ^ high, uint32_t(a)}};
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return counter;
}

// 2 · atanh(s) = ln((1 + s) / (1 − s)) for |s| < 0.18, where the first term left out is below 1e-9 of it.
PE_BOTH float log_ratio(float s) {
  const float square = s * s;
  float p = 2.0f / 9;
  for (const float c : {2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = fmaf(p, square, c);
  return s * p;
}

// ln x of a positive normal number: x = 2^e · f with f between √½ and √2.
PE_BOTH float log(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int e = int(bits - 0x3f3504f3u) >> 23;
  bits -= uint32_t(e) << 23;
  float f;
  memcpy(&f, &bits, 4);
  return fmaf(float(e), 0.693147181f, log_ratio((f - 1) / (f + 1)));
}

// A draw of the exponential distribution, −ln(1 − v) with v = (word + ½) / 2^32, with all of f32's digits also where v is small.
PE_BOTH float exponential(uint32_t word) {
  const float v = (float(word) + 0.5f) * 0x1p-32f;
  return v < 0.25f ? log_ratio(v / (2 - v)) : -log((float(~word) + 0.5f) * 0x1p-32f);
}

// The exponential race: the least e/p of draws e belongs to a token with probability p, and so does the largest ln p − ln e.
// `over`: how far the token's logit lies from the largest, over the temperature.
PE_BOTH float race(float over, uint32_t word) { return over - log(exponential(word)); }

}  // namespace pe::random
