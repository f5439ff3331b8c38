// What pycomm calls of cuBLASLt, by its documented binary interface (the same in CUDA 12 and 13), so that neither its
// headers are needed to build nor the library to load the extension.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels/launch.hpp"

namespace pycomm::cuda::cublaslt {

// Opaque.
struct Context;
struct MatmulDesc;
struct MatrixLayout;
struct Preference;

enum DataType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 14 };  // cudaDataType
enum ComputeType : int { kCompute32F = 68, kCompute64F = 70 };                     // cublasComputeType_t
enum Operation : int { kNormal = 0, kTransposed = 1 };                             // cublasOperation_t
enum DescAttribute : int { kTransA = 3, kTransB = 4, kSmCountTarget = 15 };        // cublasLtMatmulDescAttributes_t
enum PreferenceAttribute : int {  // cublasLtMatmulPreferenceAttributes_t
  kMaxWorkspaceBytes = 1,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};

struct Algorithm {  // cublasLtMatmulAlgo_t
  std::uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  std::size_t workspace_bytes;
  int status;
  float num_waves;
  int reserved[4];
};

struct Functions {
  int (*create)(Context**);
  int (*destroy)(Context*);
  const char* (*status_string)(int);
  int (*desc_create)(MatmulDesc**, ComputeType, DataType scale);
  int (*desc_destroy)(MatmulDesc*);
  int (*desc_set)(MatmulDesc*, DescAttribute, const void*, std::size_t);
  int (*layout_create)(MatrixLayout**, DataType, std::uint64_t rows, std::uint64_t columns, std::int64_t leading);
  int (*layout_destroy)(MatrixLayout*);
  int (*preference_create)(Preference**);
  int (*preference_destroy)(Preference*);
  int (*preference_set)(Preference*, PreferenceAttribute, const void*, std::size_t);
  int (*heuristic)(Context*, MatmulDesc*, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c, MatrixLayout* d,
                   Preference*, int requested, HeuristicResult*, int* returned);
  int (*matmul)(Context*, MatmulDesc*, const void* alpha, const void* a, MatrixLayout*, const void* b, MatrixLayout*,
                const void* beta, const void* c, MatrixLayout*, void* d, MatrixLayout*, const Algorithm*,
                void* workspace, std::size_t workspace_bytes, Stream);
};

}  // namespace pycomm::cuda::cublaslt
