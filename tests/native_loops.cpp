// Runs the compiled loops of fastres/csrc under sanitizers, on buffers of exactly the size that they are told, beside
// plain loops in double. Prints what differs; the exit code is 1 then.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>

extern "C" {
int64_t fastres_winograd_size(int64_t, int64_t);
int fastres_winograd_weights(const float*, int64_t, int64_t, const int64_t*, int64_t, int64_t, float*, int64_t);
int fastres_winograd(const float*, const float*, const float*, int64_t, int64_t, const int64_t*, float*, const float*,
                     const float*, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int fastres_winograd_gradient(const float*, const float*, float*, int64_t, int64_t, const int64_t*, int64_t, int64_t,
                              int64_t, int64_t, int64_t, int64_t);
int fastres_conv_gradient(const float*, const float*, float*, int64_t, int64_t, const int64_t*, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
}

namespace {

struct Buffer {  // on the heap, so that one float too far is seen
  int64_t size;
  std::unique_ptr<float[]> data;
  explicit Buffer(int64_t size, float value = NAN) : size(size), data(new float[size]) {
    for (int64_t i = 0; i < size; i++) data[i] = value;
  }
  float* random() {
    static uint64_t state = 20;
    for (int64_t i = 0; i < size; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      data[i] = static_cast<float>(static_cast<int32_t>(state >> 33) - (1 << 30)) / (1 << 30);
    }
    return data.get();
  }
  float* get() { return data.get(); }
};

int compare(const char* name, Buffer& got, const double* wanted) {
  double largest = 1e-6, worst = 0;
  for (int64_t i = 0; i < got.size; i++) {
    largest = std::fmax(largest, std::fabs(wanted[i]));
    const double apart = std::fabs(got.data[i] - wanted[i]);
    if (!(apart <= worst)) worst = std::isnan(apart) ? INFINITY : apart;
  }
  if (worst <= 1e-5 * largest) return 0;
  std::printf("%s: %g of %g\n", name, worst, largest);
  return 1;
}

int check(int64_t b, int64_t h, int64_t w, int64_t c, int64_t n, int64_t threads) {
  Buffer x(b * h * w * c), dy(b * h * w * n), weight(n * 9 * c), bias(n), other(b * h * w * n);
  x.random(), dy.random(), weight.random(), bias.random(), other.random();
  const int64_t pixels = b * h * w;
  std::unique_ptr<double[]> y(new double[pixels * n]()), dx(new double[pixels * c]()), dw(new double[n * 9 * c]());
  int64_t taps[9], turned[9];
  for (int t = 0; t < 9; t++) taps[t] = t * c, turned[8 - t] = t * c;
  for (int64_t p = 0; p < pixels; p++)
    for (int t = 0; t < 9; t++) {
      const int64_t row = p / w % h + t / 3 - 1, column = p % w + t % 3 - 1;
      if (row < 0 || row >= h || column < 0 || column >= w) continue;
      const int64_t q = p + (t / 3 - 1) * w + t % 3 - 1;
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++) {
          const int64_t at = (i * 9 + t) * c + j;
          y[p * n + i] += double(weight.data[at]) * x.data[q * c + j];
          dx[q * c + j] += double(weight.data[at]) * dy.data[p * n + i];
          dw[at] += double(dy.data[p * n + i]) * x.data[q * c + j];
        }
    }
  Buffer gy(pixels * n), gx(pixels * c), gw(n * 9 * c), u(fastres_winograd_size(c, n)), ends(pixels * n);
  fastres_winograd(x.get(), nullptr, weight.get(), 9 * c, 1, taps, gy.get(), nullptr, nullptr, 0, b, h, w, c, n, threads);
  fastres_winograd(dy.get(), nullptr, weight.get(), 1, 9 * c, turned, gx.get(), nullptr, nullptr, 0, b, h, w, n, c,
                   threads);
  fastres_winograd_gradient(x.get(), dy.get(), gw.get(), 9 * c, 1, taps, b, h, w, c, n, threads);
  int wrong = compare("y", gy, y.get()) + compare("dx", gx, dx.get()) + compare("dw", gw, dw.get());
  fastres_winograd_weights(weight.get(), 9 * c, 1, taps, c, n, u.get(), threads);
  fastres_winograd(x.get(), u.get(), nullptr, 0, 0, nullptr, ends.get(), bias.get(), other.get(), 1, b, h, w, c, n,
                   threads);
  for (int64_t i = 0; i < pixels * n; i++) y[i] = std::fmax(0.0, y[i] + bias.data[i % n] + other.data[i]);
  return wrong + compare("end", ends, y.get());
}

int check_gradient(int64_t b, int64_t h, int64_t w, int64_t c, int64_t n, int64_t side, int64_t stride, int64_t padding,
                   int64_t threads) {
  const int64_t down = (h + 2 * padding - side) / stride + 1, across = (w + 2 * padding - side) / stride + 1;
  Buffer x(b * h * w * c), dy(b * down * across * n), dw(n * side * side * c);
  x.random(), dy.random();
  std::unique_ptr<double[]> wanted(new double[dw.size]());
  int64_t taps[9];
  for (int64_t t = 0; t < side * side; t++) taps[t] = t * c;
  for (int64_t p = 0; p < b * down * across; p++)
    for (int64_t t = 0; t < side * side; t++) {
      const int64_t row = p / across % down * stride - padding + t / side, column = p % across * stride - padding + t % side;
      if (row < 0 || row >= h || column < 0 || column >= w) continue;
      const int64_t q = (p / across / down * h + row) * w + column;
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++)
          wanted[(i * side * side + t) * c + j] += double(dy.data[p * n + i]) * x.data[q * c + j];
    }
  fastres_conv_gradient(x.get(), dy.get(), dw.get(), side * side * c, 1, taps, b, h, w, c, down, across, n, side, stride,
                        padding, threads);
  return compare("gradient", dw, wanted.get());
}

}  // namespace

int main() {
  int wrong = 0;
  for (int64_t threads = 1; threads <= 3; threads++) {
    wrong += check(1, 1, 1, 16, 16, threads);
    wrong += check(2, 5, 9, 48, 80, threads);
    wrong += check(3, 12, 8, 16, 112, threads);
    wrong += check(1, 70, 65, 16, 32, threads);   // two chunks of the weight gradient
    wrong += check(1, 5, 4, 256, 192, threads);   // many weights
    wrong += check_gradient(1, 1, 1, 16, 16, 1, 1, 0, threads);
    wrong += check_gradient(2, 7, 5, 48, 80, 3, 2, 1, threads);
    wrong += check_gradient(1, 6, 9, 272, 272, 1, 2, 0, threads);  // several jobs
    wrong += check_gradient(3, 25, 23, 16, 32, 3, 1, 0, threads);  // several parts
  }
  if (wrong == 0) std::puts("agree");
  return wrong != 0;
}
