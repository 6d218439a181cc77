// qbench's command line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace bench {

struct Options {
  bool list = false, check = false, check_only = false, json = false, help = false;
  std::string op, kernel, model;
  std::string device;  // "cpu" or "cuda"; empty: the CPU's are timed, all are listed
  pe::Dtype dtype = pe::Dtype::f16;
  std::vector<int64_t> shape, tokens = {1};
  int threads = 0;  // 0: all cores
  bool cold_given = false;
  size_t cold_bytes = size_t(512) << 20;
  Spec spec;
};

// The command cannot be understood (exit code 2); std::runtime_error is for what it asks that cannot be done (1).
struct WrongUsage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

extern const char* const kHelp;
Options parse(int argc, char** argv);

// The problems of op `name` that the options ask for: one of --shape, or the layers of --model for each of --tokens.
std::vector<Spec> specs(const std::string& name, const Options& options);

}  // namespace bench
