// Vectors of floats and a product of matrices that stays in registers, by GCC's and Clang's vector extensions.
//
// Every result is a sum in one fixed order, whatever the number of threads and the shape of the block it is computed in.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

// Of this library alone: another build, for other instructions, may be in the process.
#pragma GCC visibility push(hidden)

namespace fastres {

// Results that are kept in registers, kRows times kColumns vectors of them, and how many sums each is made of.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kColumns = 2, kSums = 2;
#else  // AVX2
constexpr int kLanes = 8, kRows = 6, kColumns = 2, kSums = 1;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

typedef double Wide __attribute__((vector_size(8 * kLanes)));  // as many doubles

// In a register: the compiler would read it again for each use.
inline Vec held(Vec v) {
  asm("" : "+v"(v));
  return v;
}

inline Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

// A matrix whose element (i, k) lies at data[i * row + k * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// Rows one after another.
struct Rows {
  const float* data;
  int64_t step;
};

// c[i][j] = sum_k a(i, k) b[k][j] for `rows` rows, R at a time, and C vectors of columns; added to c where `add`. Each is
// kSums sums, of every kSums-th term: short sums round less than a long one, and do not wait for each other.
template <int R, int C>
void multiply_rows(Matrix a, Rows b, float* c, int64_t c_row, int64_t rows, int64_t depth, bool add) {
  for (int64_t first = 0; first + R <= rows; first += R) {
    Vec sums[kSums][R][C] = {};
    const float* left = a.data + first * a.row;
    const float* right = b.data;
    const auto step = [&](Vec(&sum)[R][C]) {
      Vec now[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) now[j] = held(load(right + j * kLanes));
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Vec term = held(left[i * a.row] - Vec{});
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) sum[i][j] += term * now[j];
      }
      left += a.column, right += b.step;
    };
    int64_t k = 0;
    for (; k + kSums <= depth; k += kSums)
#pragma GCC unroll 8
      for (int s = 0; s < kSums; s++) step(sums[s]);
    for (; k < depth; k++) step(sums[0]);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) {
        Vec total = sums[0][i][j];
#pragma GCC unroll 8
        for (int s = 1; s < kSums; s++) total += sums[s][i][j];
        float* to = c + (first + i) * c_row + j * kLanes;
        store(to, add ? load(to) + total : total);
      }
  }
}

template <int C>
void multiply_columns(Matrix a, Rows b, float* c, int64_t c_row, int64_t rows, int64_t depth, bool add) {
  const int64_t full = rows / kRows * kRows;
  multiply_rows<kRows, C>(a, b, c, c_row, full, depth, add);
  a.data += full * a.row, c += full * c_row, rows -= full;
  if (rows >= 4) {
    multiply_rows<4, C>(a, b, c, c_row, 4, depth, add);
    a.data += 4 * a.row, c += 4 * c_row, rows -= 4;
  }
  if (rows >= 2) {
    multiply_rows<2, C>(a, b, c, c_row, 2, depth, add);
    a.data += 2 * a.row, c += 2 * c_row, rows -= 2;
  }
  if (rows > 0) multiply_rows<1, C>(a, b, c, c_row, 1, depth, add);
}

// c[rows][columns] = a(rows, depth) b[depth][columns]; columns in whole vectors, at most kColumns. Sums are of `terms` each,
// then of those and, where `add`, of c: operands of so many stay in the first cache.
inline void multiply_panel(Matrix a, Rows b, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
                           int64_t terms, bool add = false) {
  terms *= kSums;
  for (int64_t k = 0; k < depth; k += terms) {
    const Matrix part{a.data + k * a.column, a.row, a.column};
    const auto multiply = columns == kLanes ? multiply_columns<1> : multiply_columns<kColumns>;
    multiply(part, {b.data + k * b.step, b.step}, c, c_row, rows, std::min(terms, depth - k), add || k > 0);
  }
}

// Memory that a thread keeps from call to call, one piece for all functions: blocks of this size, freed and asked for at each, cost page faults.
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

inline float* scratch(int64_t count) {
  static thread_local Scratch kept;
  return kept.floats(count);
}

}  // namespace fastres

#pragma GCC visibility pop
