// Products of rows with the matrices of their experts: rows are sorted by expert, sizes[e] of them belong to expert e.
// Rows past the sum of the sizes belong to none; they come out as zeros. Where `tokens` is not empty, the inputs lie in the
// order of the tokens, and sorted row r is a copy of row tokens[r].

#include <limits>
#include <numeric>
#include <vector>

#include "ffi.h"
#include "matmul.h"
#include "work.h"

namespace dreamer {
namespace {

// Rows of a product that one thread computes at a time: enough to pay for packing the expert's weights.
constexpr int64_t kRows = 16 * kTile;

struct Group {
  int64_t expert, first, rows;
};

// Every expert's rows, cut into groups of at most `most`; experts without rows have one empty group. The largest groups come
// first, so that threads end at about the same time.
std::vector<Group> groups(const Ints& sizes, int64_t most) {
  std::vector<Group> all;
  int64_t first = 0;
  for (int64_t e = 0; e < int64_t(sizes.element_count()); ++e) {
    const int64_t end = first + sizes.typed_data()[e];
    do {
      const int64_t rows = std::min(most, end - first);
      all.push_back({e, first, rows});
      first += rows;
    } while (first < end);
  }
  std::stable_sort(all.begin(), all.end(), [](const Group& a, const Group& b) { return a.rows > b.rows; });
  return all;
}

void scale(const float* x, int64_t count, float by, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = by * x[i];
}

void clear_unowned(const Ints& sizes, FloatResult& y) {
  const int64_t owned = std::accumulate(sizes.typed_data(), sizes.typed_data() + sizes.element_count(), int64_t(0));
  const int64_t width = y->dimensions()[1];
  std::fill(y->typed_data() + owned * width, y->typed_data() + y->element_count(), 0.0f);
}

// Rows [first, first + count) of `a` sorted by expert; gathered, they are copied to `room`.
const float* sorted_rows(const Floats& a, const Ints& tokens, int64_t first, int64_t count, float* room) {
  const int64_t width = a.dimensions()[1];
  if (tokens.element_count() == 0) return a.typed_data() + first * width;
  for (int64_t r = 0; r < count; ++r)
    std::copy_n(a.typed_data() + tokens.typed_data()[first + r] * width, width, room + r * width);
  return room;
}

// y = x W: x [R or tokens, I], w [E, I, O], y [R, O]
ffi::Error forward(Threads pool, Floats x, Floats w, Ints sizes, Ints tokens, FloatResult y) {
  const int64_t I = w.dimensions()[1], O = w.dimensions()[2];
  const auto all = groups(sizes, kRows);
  clear_unowned(sizes, y);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, first, count] = all[i];
    const float* x_rows = sorted_rows(x, tokens, first, count, scratch<1>(kRows * I));
    matmul(count, O, I, rows(x_rows, I), rows(w.typed_data() + e * I * O, O), y->typed_data() + first * O, O,
           scratch<0>(I * kPanel));
  });
  return ffi::Error::Success();
}

// d_w += x^T d_y: x [R, I], d_y [R, O], d_w [E, I, O]; each thread computes some rows of one expert's matrix
void multiply_weights(Threads& pool, const float* x, const float* d_y, const Ints& sizes, FloatResult& d_w) {
  const int64_t I = d_w->dimensions()[1], O = d_w->dimensions()[2], parts = (I + kRows - 1) / kRows;
  const auto all = groups(sizes, std::numeric_limits<int64_t>::max());
  share_out(pool, all.size() * parts, [&](int64_t i) {
    const auto [e, first, count] = all[i / parts];
    const int64_t row = i % parts * kRows;
    if (count == 0) return;
    matmul(std::min(kRows, I - row), O, count, transposed(x + first * I + row, I), rows(d_y + first * O, O),
           d_w->typed_data() + (e * I + row) * O, O, scratch<0>(count * kPanel), true);
  });
}

// One linear expert for each token, weighted by its score, in the order of the tokens:
// y[t] = scores[t] x[t] W: x [T, I], scores [T], w [E, I, O], y [T, O]
ffi::Error linear(Threads pool, Floats x, Floats scores, Floats w, Ints sizes, Ints tokens, FloatResult y) {
  const int64_t I = w.dimensions()[1], O = w.dimensions()[2];
  const auto all = groups(sizes, kRows);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, first, count] = all[i];
    float* products = scratch<2>(kRows * O);
    const float* x_rows = sorted_rows(x, tokens, first, count, scratch<1>(kRows * I));
    matmul(count, O, I, rows(x_rows, I), rows(w.typed_data() + e * I * O, O), products, O, scratch<0>(I * kPanel));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = tokens.typed_data()[first + r];
      scale(products + r * O, O, scores.typed_data()[t], y->typed_data() + t * O);
    }
  });
  return ffi::Error::Success();
}

// The gradients of `linear`; that of a score is x[t] . (d_y[t] W^T), that of w is added to what d_w holds.
ffi::Error linear_gradients(Threads pool, Floats x, Floats scores, Floats w, Floats d_y, Floats, Ints sizes,
                            Ints tokens, FloatResult d_x, FloatResult d_scores, FloatResult d_w) {
  const int64_t T = tokens.element_count(), I = w.dimensions()[1], O = w.dimensions()[2];
  float *x_sorted = scratch<4>(T * I), *d_sorted = scratch<5>(T * O);  // of this thread, filled by all
  const auto all = groups(sizes, kRows);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, first, count] = all[i];
    float* d_rows = scratch<1>(kRows * I);
    sorted_rows(d_y, tokens, first, count, d_sorted + first * O);
    matmul(count, I, O, rows(d_sorted + first * O, O), transposed(w.typed_data() + e * I * O, O), d_rows, I,
           scratch<0>(O * kPanel));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = tokens.typed_data()[first + r];
      const float* row = x.typed_data() + t * I;
      d_scores->typed_data()[t] = dot(row, d_rows + r * I, I);
      scale(d_rows + r * I, I, scores.typed_data()[t], d_x->typed_data() + t * I);
      scale(row, I, scores.typed_data()[t], x_sorted + (first + r) * I);
    }
  });
  multiply_weights(pool, x_sorted, d_sorted, sizes, d_w);
  return ffi::Error::Success();
}

// h = score * silu(gate) * up, from gate_up [rows, 2F] to h [rows, F]
void gate(int64_t count, int64_t F, const float* gate_up, const float* scores, float* h) {
  for (int64_t r = 0; r < count; ++r, gate_up += 2 * F, h += F) {
    int64_t f = 0;
    for (; f + kLanes <= F; f += kLanes) {
      const Vec g = load(gate_up + f);
      store(h + f, scores[r] * g / (1.0f + exp(-g)) * load(gate_up + F + f));
    }
    for (; f < F; ++f) h[f] = scores[r] * gate_up[f] / (1.0f + exp(-(Vec{} + gate_up[f]))[0]) * gate_up[F + f];
  }
}

// The gradients of `gate`: d_h [rows, F] and gate_up give d_scores and d_gate_up [rows, 2F].
void gate_gradient(int64_t count, int64_t F, const float* d_h, const float* scores, const float* gate_up,
                   float* d_gate_up, float* d_scores) {
  for (int64_t r = 0; r < count; ++r, gate_up += 2 * F, d_gate_up += 2 * F, d_h += F) {
    Vec total{};
    for (int64_t f = 0; f < F; f += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, F - f);
      float in[3][kLanes] = {};
      if (n < kLanes)
        for (int64_t j = 0; j < n; ++j) in[0][j] = gate_up[f + j], in[1][j] = gate_up[F + f + j], in[2][j] = d_h[f + j];
      const bool whole = n == kLanes;
      const Vec g = load(whole ? gate_up + f : in[0]), u = load(whole ? gate_up + F + f : in[1]);
      const Vec d = load(whole ? d_h + f : in[2]);
      const Vec s = 1.0f / (1.0f + exp(-g)), silu = g * s, scaled = scores[r] * d;
      total += d * silu * u;
      store(whole ? d_gate_up + f : in[0], scaled * u * (s + silu * (1.0f - s)));
      store(whole ? d_gate_up + F + f : in[1], scaled * silu);
      if (n < kLanes)
        for (int64_t j = 0; j < n; ++j) d_gate_up[f + j] = in[0][j], d_gate_up[F + f + j] = in[1][j];
    }
    d_scores[r] = sum(total);
  }
}

// y = (score * silu(x W_gate) * (x W_up)) W_down:
// x [R or tokens, D], scores [R, 1], w_gate_up [E, D, 2F], w_down [E, F, D], y [R, D]
ffi::Error swiglu(Threads pool, Floats x, Floats scores, Floats w_gate_up, Floats w_down, Ints sizes,
                  Ints tokens, FloatResult y) {
  const int64_t F = w_down.dimensions()[1], D = w_down.dimensions()[2];
  const auto all = groups(sizes, kRows);
  clear_unowned(sizes, y);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, first, count] = all[i];
    float* panel = scratch<0>(std::max(D, F) * kPanel);
    float* gate_up = scratch<1>(kRows * 2 * F);
    float* h = scratch<2>(kRows * F);
    const float* x_rows = sorted_rows(x, tokens, first, count, scratch<3>(kRows * D));
    matmul(count, 2 * F, D, rows(x_rows, D), rows(w_gate_up.typed_data() + e * D * 2 * F, 2 * F),
           gate_up, 2 * F, panel);
    gate(count, F, gate_up, scores.typed_data() + first, h);
    matmul(count, D, F, rows(h, F), rows(w_down.typed_data() + e * F * D, D), y->typed_data() + first * D, D, panel);
  });
  return ffi::Error::Success();
}

// The second half of `swiglu`, from gate_up = x [W_gate W_up], [R, 2F]
ffi::Error gated(Threads pool, Floats gate_up, Floats scores, Floats w_down, Ints sizes, FloatResult y) {
  const int64_t F = w_down.dimensions()[1], D = w_down.dimensions()[2];
  const auto all = groups(sizes, kRows);
  clear_unowned(sizes, y);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, first, count] = all[i];
    float *panel = scratch<0>(F * kPanel), *h = scratch<1>(kRows * F);
    gate(count, F, gate_up.typed_data() + first * 2 * F, scores.typed_data() + first, h);
    matmul(count, D, F, rows(h, F), rows(w_down.typed_data() + e * F * D, D), y->typed_data() + first * D, D, panel);
  });
  return ffi::Error::Success();
}

// All gradients of `swiglu` from d_y [R or tokens, D] and gate_up [R, 2F]; d_x [R, D]. Those of the weights are added to
// what their results hold.
ffi::Error swiglu_gradients(Threads pool, Floats x, Floats scores, Floats gate_up, Floats w_gate_up,
                            Floats w_down, Floats d_y, Floats, Floats, Ints sizes, Ints tokens, FloatResult d_x,
                            FloatResult d_scores, FloatResult d_w_gate_up, FloatResult d_w_down) {
  const int64_t F = w_down.dimensions()[1], D = w_down.dimensions()[2];
  const auto all = groups(sizes, std::numeric_limits<int64_t>::max());
  clear_unowned(sizes, d_x);
  clear_unowned(sizes, d_scores);
  share_out(pool, all.size(), [&](int64_t i) {
    const auto [e, begin, total] = all[i];
    float *panel = scratch<0>(std::max({D, 2 * F, kRows}) * kPanel), *h = scratch<1>(kRows * F);
    float *d_h = scratch<2>(kRows * F), *d_gate_up = scratch<3>(kRows * 2 * F);
    const float *into = w_gate_up.typed_data() + e * D * 2 * F, *out_of = w_down.typed_data() + e * F * D;
    float *d_into = d_w_gate_up->typed_data() + e * D * 2 * F, *d_out_of = d_w_down->typed_data() + e * F * D;
    for (int64_t done = 0; done < total; done += kRows) {
      const int64_t first = begin + done, count = std::min(kRows, total - done);
      const float* x_rows = sorted_rows(x, tokens, first, count, scratch<4>(kRows * D));
      const float* d_rows = sorted_rows(d_y, tokens, first, count, scratch<5>(kRows * D));
      const float *inner = gate_up.typed_data() + first * 2 * F, *score = scores.typed_data() + first;
      gate(count, F, inner, score, h);
      matmul(F, D, count, transposed(h, F), rows(d_rows, D), d_out_of, D, panel, true);
      matmul(count, F, D, rows(d_rows, D), transposed(out_of, D), d_h, F, panel);
      gate_gradient(count, F, d_h, score, inner, d_gate_up, d_scores->typed_data() + first);
      matmul(D, 2 * F, count, transposed(x_rows, D), rows(d_gate_up, 2 * F), d_into, 2 * F, panel, true);
      matmul(count, D, 2 * F, rows(d_gate_up, 2 * F), transposed(into, 2 * F), d_x->typed_data() + first * D, D, panel);
    }
  });
  return ffi::Error::Success();
}

// The sum of each token's rows: rows [T A, D], inverse [T A] (where a choice's row lies), y [T, D]
ffi::Error collect(Threads pool, Floats rows, Ints inverse, FloatResult y) {
  const int64_t T = y->dimensions()[0], D = y->dimensions()[1], A = T ? inverse.element_count() / T : 0;
  share_out_parts(pool, T, kRows, [&](int64_t t, int64_t) {
    float* total = y->typed_data() + t * D;
    std::copy_n(rows.typed_data() + inverse.typed_data()[t * A] * D, D, total);
    for (int64_t a = 1; a < A; ++a) {
      const float* row = rows.typed_data() + inverse.typed_data()[t * A + a] * D;
      for (int64_t d = 0; d < D; ++d) total[d] += row[d];
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

DREAMER_KERNEL(grouped_forward, forward);
DREAMER_KERNEL(grouped_linear, linear);
DREAMER_KERNEL(grouped_linear_gradients, linear_gradients);
DREAMER_KERNEL(grouped_swiglu, swiglu);
DREAMER_KERNEL(grouped_gated, gated);
DREAMER_KERNEL(grouped_collect, collect);
DREAMER_KERNEL(grouped_swiglu_gradients, swiglu_gradients);
