// Small float32 matrix products at the speed of large ones, and the vector functions that the kernels share.
//
// GCC's vector types, which clang has too, make this AVX-512, AVX2 or NEON code, whatever the machine has.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace dreamer {

// A tile of the result is kTile rows of two vectors. Its sums stay in registers, with two vectors of B and a number of A.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTile = 12;
#else
constexpr int kLanes = 8, kTile = 6;
#endif
constexpr int kPanel = 2 * kLanes;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// e^x to about 2e-7 of its value; 0 for x < -87, and what is not a number stays so.
inline Vec exp(Vec x) {
  const Vec shift = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
  const IntVec tiny = x < -87.0f;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x = n ln 2 + f, ln 2 in two parts
  Vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' polynomial
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const Vec power = (Vec)(((IntVec)shifted << 23) + 0x3f800000);  // 2^n: n is added to the exponent of 1
  return tiny ? Vec{} : p * power;
}

// A vector's halves combined, then the halves of that and so on, until one number is left.
template <int half, class Both, int... i>
inline float fold(Vec v, const Both& both, std::integer_sequence<int, i...> lanes) {
  if constexpr (half == 0) return v[0];
  else return fold<half / 2>(both(v, __builtin_shufflevector(v, v, (i ^ half)...)), both, lanes);
}

inline float sum(Vec v) {
  return fold<kLanes / 2>(v, [](Vec a, Vec b) { return a + b; }, std::make_integer_sequence<int, kLanes>());
}

inline float largest(Vec v) {
  return fold<kLanes / 2>(v, [](Vec a, Vec b) { return a > b ? a : b; }, std::make_integer_sequence<int, kLanes>());
}

inline float dot(const float* a, const float* b, int64_t count) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < count; ++i) rest += a[i] * b[i];
  return rest;
}

// A matrix in memory: element (i, j) is p[i * row + j * column].
struct View {
  const float* p;
  int64_t row, column;
};

inline View rows(const float* p, int64_t stride) { return {p, stride, 1}; }
inline View transposed(const float* p, int64_t stride) { return {p, 1, stride}; }

// A block of memory that will be needed soon, to be fetched into the second cache line by line: some lines at once would
// stop the loads of what is needed now.
struct Lines {
  const char* start = nullptr;
  int64_t stride = 0, rows = 0, width = 0, at = 0;  // in bytes, but for the rows

  // Columns [first, first + kPanel) of a matrix of K rows and N columns.
  static Lines of(View b, int64_t K, int64_t N, int64_t first) {
    constexpr int64_t size = sizeof(float);
    const int64_t n = std::min<int64_t>(kPanel, N - first);
    if (n <= 0) return {};
    const char* start = reinterpret_cast<const char*>(b.p + first * b.column);
    return b.column == 1 ? Lines{start, b.row * size, K, n * size} : Lines{start, b.column * size, n, K * size};
  }

  void fetch_one() {
    __builtin_prefetch(start + at, 0, 2);
    if ((at += 64) < width) return;
    at = 0;
    start += stride;
    --rows;
  }
};

// What the next panel of a product reads, and where its result goes.
struct Ahead {
  Lines b, c;
};

// One tile: C[rows i, n columns] = or += A[i, :] B, where B is a packed panel. With `adjacent`, a.row is 1.
template <bool adjacent, int... i>
inline void multiply_tile(std::integer_sequence<int, i...>, int64_t K, View a, const float* panel, float* c, int64_t c_row,
                          int n, bool add, Ahead& ahead) {
  Vec left[] = {(i, Vec{})...}, right[] = {(i, Vec{})...};
  const int64_t a_row = adjacent ? 1 : a.row;
  int64_t k = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    const Vec b_left = load(panel), b_right = load(panel + kLanes);
    const float* column = a.p + k * a.column;
    ((left[i] += column[i * a_row] * b_left, right[i] += column[i * a_row] * b_right), ...);
    ++k;
    panel += kPanel;
  };
  const auto step_and_fetch = [&](Lines& wanted) __attribute__((always_inline)) {
    Lines lines = wanted;
    for (; k < K && lines.rows > 0; step()) lines.fetch_one();
    wanted = lines;
  };
  step_and_fetch(ahead.b);
  step_and_fetch(ahead.c);
  while (k < K) step();
  if (n == kPanel) {
    if (add) ((left[i] += load(c + i * c_row), right[i] += load(c + i * c_row + kLanes)), ...);
    ((store(c + i * c_row, left[i]), store(c + i * c_row + kLanes, right[i])), ...);
    return;
  }
  float out[sizeof...(i)][kPanel];
  ((store(out[i], left[i]), store(out[i] + kLanes, right[i])), ...);
  for (int row = 0; row < int(sizeof...(i)); ++row)
    for (int j = 0; j < n; ++j) c[row * c_row + j] = add ? c[row * c_row + j] + out[row][j] : out[row][j];
}

// The last rows of a product, fewer than a full tile.
template <bool adjacent, int M>
inline void multiply_rest(int m, int64_t K, View a, const float* panel, float* c, int64_t c_row, int n, bool add,
                          Ahead& ahead) {
  if constexpr (M > 0) {
    if (m == M)
      return multiply_tile<adjacent>(std::make_integer_sequence<int, M>(), K, a, panel, c, c_row, n, add, ahead);
    multiply_rest<adjacent, M - 1>(m, K, a, panel, c, c_row, n, add, ahead);
  }
}

// Transpose a square of vectors: exchange halves, then quarters of halves, and so on.
template <int half, int... i>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, i...>) {
  const Vec low = __builtin_shufflevector(a, b, (i & half ? i - half + kLanes : i)...);
  const Vec high = __builtin_shufflevector(a, b, (i & half ? i + kLanes : i + half)...);
  a = low;
  b = high;
}

template <int half = kLanes / 2>
inline void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & half)) exchange<half>(v[i], v[i + half], std::make_integer_sequence<int, kLanes>());
  if constexpr (half > 1) transpose<half / 2>(v);
}

// Columns [first, first + n) of B, K rows of them, each row filled up with zeros to kPanel numbers.
__attribute__((noinline)) inline void pack(View b, int64_t K, int64_t first, int n, float* panel) {
  int64_t k = 0;
  if (n == kPanel && b.column == 1) {
    for (; k < K; ++k, panel += kPanel)
      for (int half = 0; half < kPanel; half += kLanes) store(panel + half, load(b.p + k * b.row + first + half));
  } else if (n == kPanel && b.row == 1) {
    for (; k + kLanes <= K; k += kLanes, panel += kLanes * kPanel)
      for (int half = 0; half < kPanel; half += kLanes) {
        Vec v[kLanes];
        for (int j = 0; j < kLanes; ++j) v[j] = load(b.p + (first + half + j) * b.column + k);
        transpose(v);
        for (int j = 0; j < kLanes; ++j) store(panel + j * kPanel + half, v[j]);
      }
  }
  for (; k < K; ++k, panel += kPanel)
    for (int j = 0; j < kPanel; ++j) panel[j] = j < n ? b.p[k * b.row + (first + j) * b.column] : 0;
}

// Some rows of A times `k` rows of B: C += A[:, k...] B[k..., :]. B is read as it lies in memory; as many of its rows that come
// next are brought into the second cache meanwhile, which lets a core read up to twice as fast.
template <int... k>
inline void add_outer(std::integer_sequence<int, k...>, int64_t M, int64_t N, View a, const float* b, int64_t b_row,
                      float* c, int64_t c_row) {
  constexpr int count = sizeof...(k);
  for (int64_t m = 0; m < M; ++m, a.p += a.row, c += c_row) {
    const float factor[] = {a.p[k * a.column]...};
    const auto add = [&](int64_t n) { store(c + n, (load(c + n) + ... + (factor[k] * load(b + k * b_row + n)))); };
    int64_t n = 0;
    if (m == 0)
      for (; n + kLanes <= N; n += kLanes) {
        (__builtin_prefetch(b + (count + k) * b_row + n, 0, 2), ...);
        add(n);
      }
    for (; n + kLanes <= N; n += kLanes) add(n);
    for (; n < N; ++n) c[n] = (c[n] + ... + (factor[k] * b[k * b_row + n]));
  }
}

// A product of so few rows that reading B is most of it: C stays in the first cache, B streams by once.
inline void matmul_thin(int64_t M, int64_t N, int64_t K, View a, const float* b, int64_t b_row, float* c, int64_t c_row,
                        bool add) {
  if (!add)
    for (int64_t m = 0; m < M; ++m) std::fill_n(c + m * c_row, N, 0.0f);
  int64_t k = 0;
  for (; k + 8 <= K; k += 8, a.p += 8 * a.column, b += 8 * b_row)
    add_outer(std::make_integer_sequence<int, 8>(), M, N, a, b, b_row, c, c_row);
  for (; k < K; ++k, a.p += a.column, b += b_row)
    add_outer(std::make_integer_sequence<int, 1>(), M, N, a, b, b_row, c, c_row);
}

// C's columns of one panel: C[M, n] = A[M, K] B[K, n], or += with `add`.
template <bool adjacent>
__attribute__((always_inline)) inline void multiply_panel_of(int64_t M, int n, int64_t K, View a, const float* panel,
                                                             float* c, int64_t c_row, bool add, Ahead ahead) {
  int64_t m = 0;
  for (; m + kTile <= M; m += kTile, a.p += kTile * a.row)
    multiply_tile<adjacent>(std::make_integer_sequence<int, kTile>(), K, a, panel, c + m * c_row, c_row, n, add, ahead);
  multiply_rest<adjacent, kTile - 1>(M - m, K, a, panel, c + m * c_row, c_row, n, add, ahead);
}

__attribute__((always_inline)) inline void multiply_panel(int64_t M, int n, int64_t K, View a, const float* panel, float* c,
                                                          int64_t c_row, bool add, Ahead ahead) {
  if (a.row == 1) multiply_panel_of<true>(M, n, K, a, panel, c, c_row, add, ahead);
  else multiply_panel_of<false>(M, n, K, a, panel, c, c_row, add, ahead);
}

// C[M, N] = A[M, K] B[K, N], or += with `add`. C's rows are contiguous; `panel` is scratch for K * kPanel numbers.
__attribute__((noinline)) inline void matmul(int64_t M, int64_t N, int64_t K, View a, View b, float* c, int64_t c_row,
                                             float* panel, bool add = false) {
  if (M == 0) return;
  if (M <= kTile && b.column == 1) return matmul_thin(M, N, K, a, b.p, b.row, c, c_row, add);
  for (int64_t first = 0; first < N; first += kPanel) {
    const int n = std::min<int64_t>(kPanel, N - first);
    const int64_t next = first + kPanel;
    const Ahead ahead{Lines::of(b, K, N, next), Lines::of(rows(c, c_row), M, N, next)};
    pack(b, K, first, n, panel);
    multiply_panel(M, n, K, a, panel, c + first, c_row, add, ahead);
  }
}

// A matrix B[K, N] packed once for many products: panels of `stride` rows, one after the other.
struct Packed {
  int64_t K, N, stride;
  const float* panels;

  Packed columns(int64_t count) const { return {K, count, stride, panels}; }
  Packed rows(int64_t first, int64_t count) const { return {count, N, stride, panels + first * kPanel}; }
};

inline int64_t packed_size(int64_t K, int64_t N) { return (N + kPanel - 1) / kPanel * kPanel * K; }

// `panels` has room for packed_size(K, N) numbers.
inline Packed packed(View b, int64_t K, int64_t N, float* panels) {
  for (int64_t first = 0; first < N; first += kPanel)
    pack(b, K, first, std::min<int64_t>(kPanel, N - first), panels + first * K);
  return {K, N, K, panels};
}

__attribute__((noinline)) inline void matmul(int64_t M, View a, Packed b, float* c, int64_t c_row, bool add = false) {
  for (int64_t first = 0; first < b.N; first += kPanel) {
    const int n = std::min<int64_t>(kPanel, b.N - first);
    multiply_panel(M, n, b.K, a, b.panels + first * b.stride, c + first, c_row, add, {});
  }
}

}  // namespace dreamer
