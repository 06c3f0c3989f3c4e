// The weight gradient of a convolution, float32 [B, H, W, C] by [B, H', W', N], any kernel, stride and padding.
//
//     dw[n][c][tap] = sum over pixels p of dy[p][n] x[q(p, tap)][c]     q: the pixel that the tap of p reads, or none
//     jobs            a tap, some of N, some of C, some of the pixels: its products stay in a core's cache, and copies of
//                     its operands, without powers of two between rows, and with zeros for padding
//     traffic         R x and dy, for each job its part, from the shared cache after the first; W dw
//
// Sums are of 64 pixels, then of a part, then of the parts, in an order that the number of threads does not change.

#include <omp.h>

#include "vectors.h"

namespace fastres {
namespace {

constexpr int64_t kPixels = 64;              // at a time
constexpr int64_t kTerms = kPixels / kSums;  // of each sum
constexpr int64_t kPanel = kColumns * kLanes;
constexpr int64_t kResults = 256, kColumnsOfJob = 256, kFewestPixels = 512, kJobs = 48;
constexpr int64_t kApart = kResults + 16;  // rows of dy, in a thread's copy: no power of two

struct Shape {
  int64_t b, h, w, terms, down, across, results, side, stride, padding;
  int64_t pixels() const { return b * down * across; }
};

// `count` pixels of dy from `first` on, some of their results, to z: rows `apart` from each other.
void copy_results(const float* dy, const Shape& s, int64_t n, int64_t some, int64_t first, int64_t count, float* z,
                  int64_t apart) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < some; j += kLanes) store(z + i * apart + j, load(dy + (first + i) * s.results + n + j));
}

// What a tap reads of x for those pixels, some of its channels, to z: panels of kPanel channels. Zero for padding.
void copy_terms(const float* x, const Shape& s, int64_t tap, int64_t c, int64_t some, int64_t first, int64_t count,
                float* z) {
  int64_t column = first % s.across, line = first / s.across;  // line: of all images
  for (int64_t i = 0; i < count; i++) {
    const int64_t y = line % s.down * s.stride - s.padding + tap / s.side;
    const int64_t at = column * s.stride - s.padding + tap % s.side;
    const bool inside = y >= 0 && y < s.h && at >= 0 && at < s.w;
    const float* const from = x + ((line / s.down * s.h + y) * s.w + at) * s.terms + c;
    for (int64_t j = 0; j < some; j += kLanes)
      store(z + (j / kPanel * kPixels + i) * kPanel + j % kPanel, inside ? load(from + j) : Vec{});
    if (++column == s.across) column = 0, line++;
  }
}

}  // namespace

extern "C" {

// dw, at n of_result + c of_term + taps[tap], for kernels of side x side. Returns 1 where there is no memory for scratch;
// nothing was written then.
int fastres_conv_gradient(const float* x, const float* dy, float* dw, int64_t of_result, int64_t of_term,
                          const int64_t* taps, int64_t b, int64_t h, int64_t w, int64_t terms, int64_t down,
                          int64_t across, int64_t results, int64_t side, int64_t stride, int64_t padding,
                          int64_t threads) {
  const Shape s{b, h, w, terms, down, across, results, side, stride, padding};
  const int64_t kernel = side * side, pixels = s.pixels();
  const int64_t high = (results + kResults - 1) / kResults, wide = (terms + kColumnsOfJob - 1) / kColumnsOfJob;
  const int64_t outputs = kernel * high * wide;
  // Parts of the pixels, where there are few outputs to share among threads: a multiple of kPixels each.
  const int64_t most = std::max<int64_t>(1, std::min((kJobs + outputs - 1) / outputs, pixels / kFewestPixels));
  const int64_t part = ((pixels + most - 1) / most + kPixels - 1) / kPixels * kPixels;
  const int64_t parts = std::max<int64_t>(1, (pixels + part - 1) / part), size = kernel * results * terms;
  const int64_t own = kPixels * (kApart + kColumnsOfJob);
  float* const sums = scratch(parts * size + threads * own);
  if (sums == nullptr) return 1;
#pragma omp parallel num_threads(threads)
  {
    float* const left = sums + parts * size + omp_get_thread_num() * own;
    float* const right = left + kPixels * kApart;
#pragma omp for schedule(static)
    for (int64_t job = 0; job < parts * outputs; job++) {
      const int64_t mine = job / outputs, tap = job % outputs / (high * wide);
      const int64_t n = job / wide % high * kResults, c = job % wide * kColumnsOfJob;
      const int64_t some = std::min(kResults, results - n), last = std::min(pixels, (mine + 1) * part);
      float* const to = sums + mine * size + (tap * results + n) * terms;
      const int64_t columns = std::min(kColumnsOfJob, terms - c);
      for (int64_t first = mine * part; first < last; first += kPixels) {
        const int64_t count = std::min(kPixels, last - first);
        copy_results(dy, s, n, some, first, count, left, kApart);
        copy_terms(x, s, tap, c, columns, first, count, right);
        for (int64_t j = 0; j < columns; j += kPanel)
          multiply_panel({left, 1, kApart}, {right + j * kPixels, kPanel}, to + c + j, terms, some,
                         std::min(kPanel, columns - j), count, kTerms, first > mine * part);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < results; n++)
      for (int64_t tap = 0; tap < kernel; tap++)
        for (int64_t c = 0; c < terms; c += kLanes) {
          const float* const from = sums + (tap * results + n) * terms + c;
          Vec sum = load(from);
          for (int64_t i = 1; i < parts; i++) sum += load(from + i * size);
          float* const at = dw + n * of_result + c * of_term + taps[tap];
          if (of_term == 1) store(at, sum);
          else
            for (int lane = 0; lane < kLanes; lane++) at[lane * of_term] = sum[lane];
        }
  }
  return 0;
}

}  // extern "C"
}  // namespace fastres
