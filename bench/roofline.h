// What this machine can do at best, measured: the lines that kernels are held against.
#pragma once

#include <cstddef>
#include <vector>

namespace bench {

struct Roofline {
  double read_gb_s = 0;   // from memory, of a buffer that no cache holds
  double fp32_gop_s = 0;  // multiply and add count as two operations, everywhere
  double vnni_gop_s = 0;  // u8 x i8; 0 where the processor lacks the instruction
  double bf16_gop_s = 0;  // vdpbf16ps
  double amx_int8_gop_s = 0;
  double amx_bf16_gop_s = 0;

  // The highest rates for INT8 codes and for float activations.
  double int_gop_s() const;
  double float_gop_s() const;
};

// With the threads of pe::set_threads; reads `bytes` bytes at `data`.
Roofline measure_roofline(const void* data, size_t bytes);

// The median of `runs` calls of run(i) in microseconds, after one call that is not counted.
template <class F>
double median_us(int runs, F&& run);

}  // namespace bench

#include <algorithm>
#include <chrono>

namespace bench {

template <class F>
double median_us(int runs, F&& run) {
  std::vector<double> times;
  for (int i = -1; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run(i + 1);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    if (i >= 0) times.push_back(time.count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

}  // namespace bench
