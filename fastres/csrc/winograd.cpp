// Winograd's form of a 3x3 convolution, stride 1, padding 1, by tiles of 4x4: forward, input gradient, weight gradient.
//
//     forward          Y = A^T [ (B^T d B) . (G g G^T) ] A       d: 6x6 patch of the input, g: weights, Y: 4x4 results
//     input gradient   the same of dy, with the weights turned by 180 degrees and transposed
//     weight gradient  dg = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G
//     points           0, +-3/4, +-11/8, infinity, as fastres/kernels/winograd.py, which says why
//     traffic          a thread takes a block of tiles at a time through all three steps, in its own cache; the weight
//                      gradient's transforms of a few hundred tiles lie in the shared cache
//     source           A. Lavin, S. Gray, arXiv:1509.09308
//
// Activations are float32 [B, H, W, C], channels in whole vectors. A call allocates nothing but scratch, which the calling
// thread keeps. Functions return 0, or 1 where there is no memory for scratch; nothing was written then.

#include <omp.h>

#include "vectors.h"

namespace fastres {
namespace {

constexpr int kTile = 4, kPatch = 6, kProducts = kPatch * kPatch;
constexpr float kP = 0.75f, kQ = 1.375f, kP2 = kP * kP, kQ2 = kQ * kQ;
constexpr float kWeightP = 1 / (2 * kP2 * (kP2 - kQ2)), kWeightQ = 1 / (2 * kQ2 * (kQ2 - kP2));
constexpr int64_t kPanel = kColumns * kLanes;
constexpr int64_t kBlockTiles = 12;        // that a thread takes through all steps: twice kRows
constexpr int64_t kSlice = 48;             // of the weight gradient's rows, a job
constexpr int64_t kManyWeights = 1 << 20;  // floats: more do not stay in a core's cache
constexpr int64_t kApart = kLanes;         // keeps the products' matrices out of each other's cache lines

// Of the sums that other sums add up: the direct form is the more exact the fewer channels there are.
int64_t terms_of(int64_t depth) { return depth <= 64 ? 16 : depth <= 128 ? 32 : 64; }
constexpr int64_t kTermsOfGradient = 32;

// Tiles that all threads take through a step together: their transforms lie in the shared cache.
int64_t chunk_of(int64_t terms, int64_t results, int64_t tiles, int64_t least) {
  return std::min(tiles, std::clamp<int64_t>(16384 / (terms + results), least, 256));
}

struct Image {
  int64_t b, h, w, down, across;
  Image(int64_t b, int64_t h, int64_t w)
      : b(b), h(h), w(w), down((h + kTile - 1) / kTile), across((w + kTile - 1) / kTile) {}
  int64_t tiles() const { return b * down * across; }
};

struct Place {  // of a tile: first row of its image in the batch, and its corner there
  int64_t row, y, x;
  Place(const Image& s, int64_t tile)
      : row(tile / (s.down * s.across) * s.h), y(tile / s.across % s.down * kTile), x(tile % s.across * kTile) {}
};

// B^T d, of six vectors.
inline void patch_line(const Vec* d, int64_t step, Vec* z, int64_t z_step) {
  const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const Vec even_p = d4 - kQ2 * d2, odd_p = kP * (d3 - kQ2 * d1);
  const Vec even_q = d4 - kP2 * d2, odd_q = kQ * (d3 - kP2 * d1);
  z[0] = d4 - (kP2 + kQ2) * d2 + (kP2 * kQ2) * d0;
  z[z_step] = even_p + odd_p;
  z[2 * z_step] = even_p - odd_p;
  z[3 * z_step] = even_q + odd_q;
  z[4 * z_step] = even_q - odd_q;
  z[5 * z_step] = d5 - (kP2 + kQ2) * d3 + (kP2 * kQ2) * d1;
}

// A^T m: six to four.
inline void output_line(const Vec* m, int64_t step, Vec* y, int64_t y_step) {
  const Vec sum_p = m[step] + m[2 * step], difference_p = m[step] - m[2 * step];
  const Vec sum_q = m[3 * step] + m[4 * step], difference_q = m[3 * step] - m[4 * step];
  y[0] = m[0] + sum_p + sum_q;
  y[y_step] = kP * difference_p + kQ * difference_q;
  y[2 * y_step] = kP2 * sum_p + kQ2 * sum_q;
  y[3 * y_step] = (kP * kP2) * difference_p + (kQ * kQ2) * difference_q + m[5 * step];
}

// A d: four to six.
inline void gradient_line(const Vec* d, int64_t step, Vec* z, int64_t z_step) {
  const Vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  const Vec even_p = d0 + kP2 * d2, odd_p = kP * (d1 + kP2 * d3);
  const Vec even_q = d0 + kQ2 * d2, odd_q = kQ * (d1 + kQ2 * d3);
  z[0] = d0;
  z[z_step] = even_p + odd_p;
  z[2 * z_step] = even_p - odd_p;
  z[3 * z_step] = even_q + odd_q;
  z[4 * z_step] = even_q - odd_q;
  z[5 * z_step] = d3;
}

// G g: three to six. In double, for all products of a weight share its rounding, and there are few.
inline void weight_line(const Wide* g, int64_t step, Wide* z, int64_t z_step) {
  constexpr double p = kP, q = kQ, p2 = p * p, q2 = q * q;
  constexpr double scale_p = 1 / (2 * p2 * (p2 - q2)), scale_q = 1 / (2 * q2 * (q2 - p2));
  const Wide even_p = scale_p * (g[0] + p2 * g[2 * step]), odd_p = (scale_p * p) * g[step];
  const Wide even_q = scale_q * (g[0] + q2 * g[2 * step]), odd_q = (scale_q * q) * g[step];
  z[0] = (1 / (p2 * q2)) * g[0];
  z[z_step] = even_p + odd_p;
  z[2 * z_step] = even_p - odd_p;
  z[3 * z_step] = even_q + odd_q;
  z[4 * z_step] = even_q - odd_q;
  z[5 * z_step] = g[2 * step];
}

// G^T s: six to three.
inline void taps_line(const Vec* s, int64_t step, Vec* g, int64_t g_step) {
  const Vec sum_p = kWeightP * (s[step] + s[2 * step]), difference_p = kWeightP * (s[step] - s[2 * step]);
  const Vec sum_q = kWeightQ * (s[3 * step] + s[4 * step]), difference_q = kWeightQ * (s[3 * step] - s[4 * step]);
  g[0] = (1 / (kP2 * kQ2)) * s[0] + sum_p + sum_q;
  g[g_step] = kP * difference_p + kQ * difference_q;
  g[2 * g_step] = kP2 * sum_p + kQ2 * sum_q + s[5 * step];
}

// The Side x Side pixels from (y, x) on, zero outside the image; through Line both ways; to
// z[product * apart].
template <int Side, void (*Line)(const Vec*, int64_t, Vec*, int64_t)>
void transform(const float* image, const Image& s, const Place& at, int64_t y, int64_t x, int64_t channels, float* z,
               int64_t apart) {
  const bool all_inside = y >= 0 && x >= 0 && y + Side <= s.h && x + Side <= s.w;
  const float* const corner = image + ((at.row + y) * s.w + x) * channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec half[kPatch * Side], all[kProducts];
    for (int j = 0; j < Side; j++) {
      Vec d[Side];
      for (int i = 0; i < Side; i++) {
        const bool inside = all_inside || (y + i >= 0 && y + i < s.h && x + j >= 0 && x + j < s.w);
        d[i] = inside ? load(corner + (i * s.w + j) * channels + c) : Vec{};
      }
      Line(d, 1, half + j, Side);
    }
    for (int i = 0; i < kPatch; i++) Line(half + i * Side, 1, all + i * kPatch, 1);
    for (int k = 0; k < kProducts; k++) store(z + k * apart + c, all[k]);
  }
}

void to_patches(const float* x, const Image& s, int64_t tile, int64_t channels, float* z, int64_t apart) {
  const Place at(s, tile);
  transform<kPatch, patch_line>(x, s, at, at.y - 1, at.x - 1, channels, z, apart);
}

void to_gradients(const float* dy, const Image& s, int64_t tile, int64_t channels, float* z, int64_t apart) {
  const Place at(s, tile);
  transform<kTile, gradient_line>(dy, s, at, at.y, at.x, channels, z, apart);
}

struct Epilogue {  // of a result: + bias[channel], + other, ReLU, which keeps NaN
  const float *bias, *other;
  bool relu;
};

void to_outputs(const float* m, int64_t apart, const Image& s, int64_t tile, int64_t channels, const Epilogue& last,
                float* y) {
  const Place at(s, tile);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec all[kProducts], half[kTile * kPatch], out[kTile * kTile];
    for (int k = 0; k < kProducts; k++) all[k] = load(m + k * apart + c);
    for (int j = 0; j < kPatch; j++) output_line(all + j, kPatch, half + j, kPatch);
    for (int i = 0; i < kTile; i++) output_line(half + i * kPatch, 1, out + i * kTile, 1);
    for (int i = 0; i < kTile && at.y + i < s.h; i++)
      for (int j = 0; j < kTile && at.x + j < s.w; j++) {
        const int64_t to = ((at.row + at.y + i) * s.w + at.x + j) * channels + c;
        Vec value = out[i * kTile + j];
        if (last.bias != nullptr) value += load(last.bias + c);
        if (last.other != nullptr) value += load(last.other + to);
        if (last.relu) value = value < 0 ? Vec{} : value;
        store(y + to, value);
      }
  }
}

// Where the transformed weights of a product lie: panels of kPanel results (the last one narrower), each [depth, width].
int64_t weights_apart(int64_t depth, int64_t results) { return depth * results + kApart; }

// Weights w[result * of_result + term * of_term + tap], taps at `taps`, to panels, for terms [first, last) of a panel.
void to_weights(const float* w, int64_t of_result, int64_t of_term, const int64_t* taps, int64_t depth,
                int64_t results, int64_t panel, int64_t first, int64_t last, float* u) {
  const int64_t from = panel * kPanel, width = std::min(kPanel, results - from), apart = weights_apart(depth, results);
  for (int64_t term = first; term < last; term++) {
    alignas(64) float rows[9][kPanel];
    for (int tap = 0; tap < 9; tap++) {
      const float* source = w + from * of_result + term * of_term + taps[tap];
      for (int64_t i = 0; i < width; i++) rows[tap][i] = source[i * of_result];
    }
    for (int64_t i = 0; i < width; i += kLanes) {
      Wide g[9], half[kPatch * 3], all[kProducts];
      for (int tap = 0; tap < 9; tap++) g[tap] = __builtin_convertvector(load(rows[tap] + i), Wide);
      for (int j = 0; j < 3; j++) weight_line(g + j, 3, half + j, 3);
      for (int j = 0; j < kPatch; j++) weight_line(half + j * 3, 1, all + j * kPatch, 1);
      for (int k = 0; k < kProducts; k++)
        store(u + k * apart + from * depth + term * width + i, __builtin_convertvector(all[k], Vec));
    }
  }
}

// The nine taps' distances from a weight's first, in the order in which they are applied.
struct Weights {
  const float* data;
  int64_t of_result, of_term;
  const int64_t* taps;
};

// All weights, by the threads of the team that calls.
void to_all_weights(const Weights& w, int64_t terms, int64_t results, float* u) {
  const int64_t panels = (results + kPanel - 1) / kPanel, slices = std::max<int64_t>(1, terms / kLanes);
#pragma omp for schedule(static)
  for (int64_t job = 0; job < panels * slices; job++)
    to_weights(w.data, w.of_result, w.of_term, w.taps, terms, results, job / slices, job % slices * terms / slices,
               (job % slices + 1) * terms / slices, u);
}

}  // namespace

extern "C" {

// Floats of the transformed weights.
int64_t fastres_winograd_size(int64_t terms, int64_t results) { return kProducts * weights_apart(terms, results); }

int fastres_winograd_weights(const float* w, int64_t of_result, int64_t of_term, const int64_t* taps, int64_t terms,
                             int64_t results, float* u, int64_t threads) {
#pragma omp parallel num_threads(threads)
  to_all_weights({w, of_result, of_term, taps}, terms, results, u);
  return 0;
}

// y[B, H, W, results] = the convolution of x[B, H, W, terms] by weights that fastres_winograd_weights made; + bias
// [results], + other [B, H, W, results] and ReLU where they are given. Or, where u is null, by w.
int fastres_winograd(const float* x, const float* u, const float* w, int64_t of_result, int64_t of_term,
                     const int64_t* taps, float* y, const float* bias, const float* other, int relu, int64_t b,
                     int64_t h, int64_t width, int64_t terms, int64_t results, int64_t threads) {
  const Image s(b, h, width);
  const int64_t u_apart = weights_apart(terms, results), tiles = s.tiles();
  // Few weights stay in every core's cache: a thread takes a block of tiles through all steps. Many would be read anew for
  // each block: all threads take a chunk of tiles through a step, each with weights of its own.
  const bool many = kProducts * u_apart > kManyWeights;
  const int64_t block = many ? chunk_of(terms, results, tiles, 128) : kBlockTiles;
  const int64_t v_apart = block * terms + kApart, m_apart = block * results + kApart;
  const int64_t own = kProducts * (v_apart + m_apart), made = u == nullptr ? kProducts * u_apart : 0;
  float* const room = scratch(made + (many ? 1 : threads) * own);
  if (room == nullptr) return 1;
  const float* const weights = u == nullptr ? room : u;
  const Epilogue last{bias, other, relu != 0};
  const int64_t panels = (results + kPanel - 1) / kPanel;
  const auto multiply = [&](const float* v, float* m, int64_t job, int64_t count) {
    const int64_t k = job / panels, n = job % panels * kPanel, wide = std::min(kPanel, results - n);
    multiply_panel({v + k * v_apart, terms, 1}, {weights + k * u_apart + n * terms, wide}, m + k * m_apart + n, results,
                   count, wide, terms, terms_of(terms));
  };
#pragma omp parallel num_threads(threads)
  {
    if (u == nullptr) to_all_weights({w, of_result, of_term, taps}, terms, results, room);
    float* const v = room + made + (many ? 0 : omp_get_thread_num() * own);
    float* const m = v + kProducts * v_apart;
    if (many) {
      for (int64_t first = 0; first < tiles; first += block) {
        const int64_t count = std::min(block, tiles - first);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) to_patches(x, s, first + t, terms, v + t * terms, v_apart);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < kProducts * panels; job++) multiply(v, m, job, count);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) to_outputs(m + t * results, m_apart, s, first + t, results, last, y);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < (tiles + block - 1) / block; part++) {
        const int64_t first = part * block, count = std::min(block, tiles - first);
        for (int64_t t = 0; t < count; t++) to_patches(x, s, first + t, terms, v + t * terms, v_apart);
        for (int64_t job = 0; job < kProducts * panels; job++) multiply(v, m, job, count);
        for (int64_t t = 0; t < count; t++) to_outputs(m + t * results, m_apart, s, first + t, results, last, y);
      }
    }
  }
  return 0;
}

// dw, by strides as above, from x[B, H, W, terms] and dy[B, H, W, results].
int fastres_winograd_gradient(const float* x, const float* dy, float* dw, int64_t of_result, int64_t of_term,
                              const int64_t* taps, int64_t b, int64_t h, int64_t width, int64_t terms, int64_t results,
                              int64_t threads) {
  const Image s(b, h, width);
  const int64_t tiles = s.tiles(), chunk = chunk_of(terms, results, tiles, 64);
  const int64_t p_apart = chunk * terms + kApart, g_apart = chunk * results + kApart;
  const int64_t sum_apart = results * terms + kApart;
  float* const p = scratch(kProducts * (p_apart + g_apart + sum_apart));
  if (p == nullptr) return 1;
  float* const g = p + kProducts * p_apart;
  float* const sums = g + kProducts * g_apart;
  const int64_t slices = (results + kSlice - 1) / kSlice;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t first = 0; first < tiles; first += chunk) {
      const int64_t count = std::min(chunk, tiles - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t++) {
        to_patches(x, s, first + t, terms, p + t * terms, p_apart);
        to_gradients(dy, s, first + t, results, g + t * results, g_apart);
      }
#pragma omp for schedule(static)
      for (int64_t job = 0; job < kProducts * slices; job++) {
        const int64_t k = job / slices, n = job % slices * kSlice, some = std::min(kSlice, results - n);
        for (int64_t c = 0; c < terms; c += kPanel) {
          const int64_t wide = std::min(kPanel, terms - c);
          alignas(64) float part[kSlice * kPanel];  // of this chunk: added as a whole, it rounds less
          multiply_panel({g + k * g_apart + n, 1, results}, {p + k * p_apart + c, terms}, part, wide, some, wide,
                         count, kTermsOfGradient);
          float* const sum = sums + k * sum_apart + n * terms + c;
          for (int64_t i = 0; i < some; i++)
            for (int64_t j = 0; j < wide; j += kLanes) {
              const Vec now = load(part + i * wide + j);
              store(sum + i * terms + j, first > 0 ? load(sum + i * terms + j) + now : now);
            }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < results; n++)
      for (int64_t c = 0; c < terms; c += kLanes) {
        Vec all[kProducts], half[3 * kPatch], taken[9];
        for (int k = 0; k < kProducts; k++) all[k] = load(sums + k * sum_apart + n * terms + c);
        for (int j = 0; j < kPatch; j++) taps_line(all + j, kPatch, half + j, kPatch);
        for (int i = 0; i < 3; i++) taps_line(half + i * kPatch, 1, taken + i * 3, 1);
        for (int tap = 0; tap < 9; tap++) {
          float* const to = dw + n * of_result + c * of_term + taps[tap];
          for (int lane = 0; lane < kLanes; lane++) to[lane * of_term] = taken[tap][lane];
        }
      }
  }
  return 0;
}

}  // extern "C"
}  // namespace fastres
