// cuBLAS as the measure of a dense product, where its library is found at run time: no header and no library of it is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace bench {

class Cublas {
 public:
  // Null where libcublasLt cannot be loaded (LD_LIBRARY_PATH may name the folder that has it).
  static std::unique_ptr<Cublas> load();
  ~Cublas();

  std::string version() const;

  // y[m,n] = x[m,k] · w[n,k]ᵀ of f16 with f32 sums, or of int8 with int32 sums and y. The algorithm is the first that cuBLAS's heuristic
  // names. Throws std::runtime_error if it knows none.
  class Product {
   public:
    Product(const Cublas& cublas, bool int8, int64_t m, int64_t n, int64_t k);
    ~Product();
    Product(const Product&) = delete;
    void run(const void* x, const void* w, void* y, void* stream) const;

   private:
    struct State;
    std::unique_ptr<State> state_;
  };

 private:
  struct Functions;
  explicit Cublas(std::unique_ptr<Functions> functions);
  std::unique_ptr<Functions> functions_;
  void* handle_ = nullptr;
};

}  // namespace bench
