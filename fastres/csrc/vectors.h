// Vectors of floats and a product of matrices that stays in registers, by GCC's and Clang's vector extensions.
//
// Every result is a sum in one fixed order, whatever the number of threads and the shape of the block it is computed in.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace fastres {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kColumns = 4;  // kColumns vectors of a row of results at a time
#elif defined(__AVX2__)
constexpr int kLanes = 8, kColumns = 2;
#else
constexpr int kLanes = 4, kColumns = 2;
#endif
constexpr int kRows = 6;     // results: kRows * kColumns vectors, in registers
constexpr int kDepth = 16;   // terms of a sum before the operands' next part, so that a part stays in the first cache

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

typedef double Wide __attribute__((vector_size(8 * kLanes)));  // as many doubles

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

// A matrix whose element (i, k) lies at data[i * row + k * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// c[i][j] = sum_k a(i, k) b[k][j] for R rows and C vectors of columns; added to c where `add`, as one more term: short
// sums of sums round less than a long one.
template <int R, int C>
void multiply_block(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) sums[i][j] = Vec{};
  for (int64_t k = 0; k < depth; k++) {
    Vec right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) right[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const float left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) {
      float* to = c + i * c_row + j * kLanes;
      store(to, add ? sums[i][j] + load(to) : sums[i][j]);
    }
}

using Block = void (*)(Matrix, const float*, int64_t, float*, int64_t, int64_t, bool);

template <int C>
constexpr Block kBlocks[kRows] = {multiply_block<1, C>, multiply_block<2, C>, multiply_block<3, C>,
                                  multiply_block<4, C>, multiply_block<5, C>, multiply_block<6, C>};

inline Block block_of(int64_t rows, int64_t columns) {
  switch (columns) {
    case 1: return kBlocks<1>[rows - 1];
    case 2: return kBlocks<2>[rows - 1];
    case 3: return kBlocks<3>[rows - 1];
    default: return kBlocks<4>[rows - 1];
  }
}

// c[rows][columns] = a(rows, depth) b[depth][columns]; columns in whole vectors, at most kColumns. Sums are of `terms` at a
// time, then of those: operands of so many stay in the first cache, and fewer round less.
inline void multiply_panel(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                           int64_t columns, int64_t depth, int64_t terms) {
  for (int64_t k = 0; k < depth; k += terms) {
    const int64_t now = std::min(terms, depth - k);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t some = std::min<int64_t>(kRows, rows - i);
      const Matrix part{a.data + i * a.row + k * a.column, a.row, a.column};
      block_of(some, columns / kLanes)(part, b + k * b_row, b_row, c + i * c_row, c_row, now, k > 0);
    }
  }
}

// Memory that a thread keeps from call to call: blocks of this size, freed and asked for at each, cost page faults.
class Scratch {
 public:
  float* floats(int64_t count) {  // null where there is no memory
    if (count > size_) {
      std::free(data_);
      const size_t bytes = (sizeof(float) * count + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      size_ = data_ == nullptr ? 0 : count;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastres
