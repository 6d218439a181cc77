// What qbench says of a kernel: a line of text or of JSON.
#pragma once

#include <optional>
#include <string>

#include "problem.h"

namespace bench {

struct Line {
  std::string op, kernel;
  Spec spec;
  std::optional<double> us = {}, gb_s = {}, gop_s = {}, of_peak = {};  // none with --check-only
  std::optional<double> error = {};
  std::optional<double> fp32_us = {}, bf16_us = {};  // a dense product on the CPU
  std::optional<double> fp16_us = {}, int8_us = {};  // and by cuBLAS
  std::optional<double> apart_us = {};               // the same in a launch for each step
  int copies = 1;

  bool on_gpu() const { return spec.dtype != pe::Dtype::f32; }
};

std::string quoted(const std::string& text);
std::string real(std::optional<double> value);  // "null" for none, NaN and infinity

void print_header(bool on_gpu);
void print(const Line& line);
std::string json(const Line& line);

}  // namespace bench
