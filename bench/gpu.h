// The GPU's side of qbench: device memory, timing, what the machine is and what it can do at best.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>

namespace bench {
class Cublas;
}

namespace bench::gpu {

// Device memory that is freed with the object; zeros at first, 256-byte aligned.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&&) = delete;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void upload(const void* from, size_t bytes, size_t at = 0);
  void fill_from(size_t bytes);  // repeats the first `bytes` until the end
  void download(void* to, size_t bytes) const;

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Machine {
  std::string name, driver, cuda;  // of the runtime
  int capability = 0, processors = 0;
  size_t l2_bytes = 0, memory_bytes = 0;
};
Machine machine();

// The median time of run(i, stream) in microseconds, for i = 0 … copies − 1 in turn: many are recorded in a CUDA graph, which is replayed,
// so that neither launches by the host nor the resolution of an event are measured. Consecutive calls overlap as they do in a decode step.
double timed(int copies, const std::function<void(int, void*)>& run);

// The device's work is done; an error of it is thrown.
void finish();

struct Ceilings {
  std::optional<double> copy_gb_s;                // bytes read and written
  std::optional<double> fp16_gop_s, int8_gop_s;   // of a product of 8192³ by cuBLAS; none without it, or where it has no algorithm
};
Ceilings measure_ceilings(const Cublas* cublas);

// The time of a product by cuBLAS, of f16 or int8, with weights that come from memory; none where it takes too much memory or cuBLAS has no
// algorithm.
std::optional<double> product_us(const Cublas& cublas, bool int8, int64_t m, int64_t n, int64_t k, size_t cold);

}  // namespace bench::gpu
