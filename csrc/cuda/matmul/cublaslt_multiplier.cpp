// Products by cuBLASLt. It counts columns first: a row-major matrix is its transpose there, so out = x @ weight.T is
//
//   out' [out_features, rows] = weight' .T [out_features, in_features] @ x' [in_features, rows]
//
// with weight' the [in_features, out_features] matrix that weight's memory is. A weight that lies transposed is the
// [out_features, in_features] matrix itself.
#include <algorithm>
#include <map>
#include <tuple>

#include "cuda/matmul/cublaslt_abi.hpp"
#include "cuda/matmul/overlapped_matmul.hpp"
#include "cuda/runtime/handles.hpp"
#include "pycomm/shared_library.hpp"

namespace pycomm::cuda {
namespace {

cublaslt::Functions load(const std::vector<std::string>& names) {
  const SharedLibrary library("cuBLASLt", names);
  cublaslt::Functions functions{};
  library.get(functions.create, "cublasLtCreate");
  library.get(functions.destroy, "cublasLtDestroy");
  library.get(functions.status_string, "cublasLtGetStatusString");
  library.get(functions.desc_create, "cublasLtMatmulDescCreate");
  library.get(functions.desc_destroy, "cublasLtMatmulDescDestroy");
  library.get(functions.desc_set, "cublasLtMatmulDescSetAttribute");
  library.get(functions.layout_create, "cublasLtMatrixLayoutCreate");
  library.get(functions.layout_destroy, "cublasLtMatrixLayoutDestroy");
  library.get(functions.preference_create, "cublasLtMatmulPreferenceCreate");
  library.get(functions.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  library.get(functions.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  library.get(functions.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  library.get(functions.matmul, "cublasLtMatmul");
  return functions;
}

/// What a product is chosen by: its shape, and how its addresses are aligned.
using Key = std::tuple<DType, std::int64_t, std::int64_t, std::int64_t, bool, unsigned, unsigned, unsigned>;

/// The largest power of two, at most 256, that divides the address.
unsigned alignment_of(const void* address) {
  const auto value = reinterpret_cast<std::uintptr_t>(address);
  unsigned alignment = 256;
  while (value % alignment != 0) alignment /= 2;
  return alignment;
}

class CublasLtMultiplier final : public Multiplier {
 public:
  CublasLtMultiplier(const std::vector<std::string>& names, int num_lanes, int num_multiprocessors,
                     std::size_t workspace_bytes)
      : functions_(load(names)), num_multiprocessors_(num_multiprocessors), workspace_bytes_(workspace_bytes) {
    for (int lane = 0; lane < num_lanes; ++lane) workspaces_.push_back(OwnedMemory::on_device(workspace_bytes));
    check(functions_.create(&context_), "cublasLtCreate");
  }
  CublasLtMultiplier(const CublasLtMultiplier&) = delete;  // one owner destroys the handles
  CublasLtMultiplier& operator=(const CublasLtMultiplier&) = delete;
  ~CublasLtMultiplier() override {
    for (auto& [key, chosen] : chosen_) release(chosen);
    if (context_ != nullptr) static_cast<void>(functions_.destroy(context_));
  }

  void multiply(const Product& product, int lane, Stream stream) override {
    const Chosen& chosen = choose(product);
    const float one32 = 1;
    const float zero32 = 0;
    const double one64 = 1;
    const double zero64 = 0;
    const bool is_double = product.dtype == DType::kFloat64;
    const void* const one = is_double ? static_cast<const void*>(&one64) : &one32;
    const void* const zero = is_double ? static_cast<const void*>(&zero64) : &zero32;
    check(functions_.matmul(context_, chosen.desc, one, product.weight, chosen.weight, product.x, chosen.x, zero,
                            product.out, chosen.out, product.out, chosen.out, &chosen.algorithm,
                            workspaces_.at(static_cast<std::size_t>(lane)).data(), workspace_bytes_, stream),
          "cublasLtMatmul");
  }

 private:
  struct Chosen {
    cublaslt::MatmulDesc* desc = nullptr;
    cublaslt::MatrixLayout* weight = nullptr;
    cublaslt::MatrixLayout* x = nullptr;
    cublaslt::MatrixLayout* out = nullptr;
    cublaslt::Algorithm algorithm{};
  };

  static cublaslt::DataType type_of(DType dtype) {
    switch (dtype) {
      case DType::kFloat32:
        return cublaslt::kFloat32;
      case DType::kFloat64:
        return cublaslt::kFloat64;
      case DType::kFloat16:
        return cublaslt::kFloat16;
      case DType::kBFloat16:
        return cublaslt::kBFloat16;
      default:
        throw std::invalid_argument(std::string("matmul: dtype ") + name_of(dtype) +
                                    "; it takes float32, float64, float16 and bfloat16");
    }
  }

  const Chosen& choose(const Product& product) {
    const Key key{product.dtype,
                  product.rows,
                  product.in_features,
                  product.out_features,
                  product.transposed,
                  alignment_of(product.x),
                  alignment_of(product.weight),
                  alignment_of(product.out)};
    const auto found = chosen_.find(key);
    if (found != chosen_.end()) return found->second;
    Chosen chosen;
    try {
      describe(product, chosen);
      find_algorithm(product, chosen);
    } catch (...) {
      release(chosen);
      throw;
    }
    return chosen_.emplace(key, chosen).first->second;
  }

  void describe(const Product& product, Chosen& chosen) const {
    const cublaslt::DataType type = type_of(product.dtype);
    const bool is_double = product.dtype == DType::kFloat64;
    check(functions_.desc_create(&chosen.desc, is_double ? cublaslt::kCompute64F : cublaslt::kCompute32F,
                                 is_double ? cublaslt::kFloat64 : cublaslt::kFloat32),
          "cublasLtMatmulDescCreate");
    const std::int32_t transposed = cublaslt::kTransposed;
    if (!product.transposed) {
      check(functions_.desc_set(chosen.desc, cublaslt::kTransA, &transposed, sizeof transposed),
            "cublasLtMatmulDescSetAttribute(TRANSA)");
    }
    if (num_multiprocessors_ > 0) {
      const std::int32_t target = num_multiprocessors_;
      check(functions_.desc_set(chosen.desc, cublaslt::kSmCountTarget, &target, sizeof target),
            "cublasLtMatmulDescSetAttribute(SM_COUNT_TARGET)");
    }
    const auto layout = [&](cublaslt::MatrixLayout** to, std::int64_t rows, std::int64_t columns) {
      check(functions_.layout_create(to, type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns),
                                     rows),
            "cublasLtMatrixLayoutCreate");
    };
    if (product.transposed) {
      layout(&chosen.weight, product.out_features, product.in_features);
    } else {
      layout(&chosen.weight, product.in_features, product.out_features);
    }
    layout(&chosen.x, product.in_features, product.rows);
    layout(&chosen.out, product.out_features, product.rows);
  }

  void find_algorithm(const Product& product, Chosen& chosen) const {
    cublaslt::Preference* preference = nullptr;
    check(functions_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    const auto set = [&](cublaslt::PreferenceAttribute attribute, const auto& value) {
      return functions_.preference_set(preference, attribute, &value, sizeof value);
    };
    int status = set(cublaslt::kMaxWorkspaceBytes, static_cast<std::uint64_t>(workspace_bytes_));
    const std::pair<cublaslt::PreferenceAttribute, const void*> addresses[] = {
        {cublaslt::kMinAlignmentA, product.weight},
        {cublaslt::kMinAlignmentB, product.x},
        {cublaslt::kMinAlignmentC, product.out},
        {cublaslt::kMinAlignmentD, product.out}};
    for (const auto& [attribute, address] : addresses) {
      if (status == 0) status = set(attribute, static_cast<std::uint32_t>(alignment_of(address)));
    }
    cublaslt::HeuristicResult result{};
    int num_found = 0;
    if (status == 0) {
      status = functions_.heuristic(context_, chosen.desc, chosen.weight, chosen.x, chosen.out, chosen.out, preference,
                                    1, &result, &num_found);
    }
    static_cast<void>(functions_.preference_destroy(preference));
    check(status, "cublasLtMatmulAlgoGetHeuristic");
    if (num_found == 0) {
      throw Error(ErrorKind::kGeneral, "cuBLASLt has no algorithm for a product of [" + std::to_string(product.rows) +
                                           ", " + std::to_string(product.in_features) + "] with [" +
                                           std::to_string(product.out_features) + ", " +
                                           std::to_string(product.in_features) + "].T of " + name_of(product.dtype));
    }
    chosen.algorithm = result.algorithm;
  }

  void release(Chosen& chosen) const {
    for (cublaslt::MatrixLayout* const layout : {chosen.weight, chosen.x, chosen.out}) {
      if (layout != nullptr) static_cast<void>(functions_.layout_destroy(layout));
    }
    if (chosen.desc != nullptr) static_cast<void>(functions_.desc_destroy(chosen.desc));
  }

  void check(int status, const char* call) const {
    if (status == 0) return;
    throw Error(ErrorKind::kGeneral, std::string(call) + ": " + functions_.status_string(status));
  }

  cublaslt::Functions functions_;
  int num_multiprocessors_;
  std::size_t workspace_bytes_;
  std::vector<OwnedMemory> workspaces_;
  cublaslt::Context* context_ = nullptr;
  std::map<Key, Chosen> chosen_;
};

}  // namespace

std::unique_ptr<Multiplier> cublaslt_multiplier(int device, const std::vector<std::string>& names, int num_lanes,
                                                int num_multiprocessors, std::size_t workspace_bytes) {
  const DeviceScope scope(device);
  return std::make_unique<CublasLtMultiplier>(names, num_lanes, num_multiprocessors, workspace_bytes);
}

}  // namespace pycomm::cuda
