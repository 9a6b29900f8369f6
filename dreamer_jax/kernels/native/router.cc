// Routing: every token's best experts by the products of its query with their keys, and the order of work that follows.
//
// query is [T, R], keys [E, R], bias [E], counted [T] (0 or 1). A token chooses the A experts of the highest
// query . key / sqrt(R) + bias, the lower of two equal ones first; their scores are sigmoids of the unbiased logits.

#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "ffi.h"
#include "matmul.h"
#include "work.h"

namespace dreamer {
namespace {

constexpr int64_t kTokens = 8 * kTile;  // that a thread takes at a time

// log(1 + x) of numbers in [0, 1], to about 1e-7 of its value.
Vec log_of_one_and(Vec x) {
  const IntVec upper = x > 0.41421356f;  // log(1 + x) = log 2 + log(1 + (x - 1) / 2)
  const Vec f = upper ? 0.5f * x - 0.5f : x;
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // Cephes' polynomial
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec log = f - 0.5f * f * f + f * f * f * p;
  return upper ? log + 0.69314718f : log;
}

// Entropy of the sigmoids of logits [E], normalised to sum to one; `logits` is filled up to whole vectors with -inf.
float entropy(const float* logits, int64_t E) {
  Vec total{}, weighted{};
  for (int64_t e = 0; e < E; e += kLanes) {
    const Vec x = load(logits + e), power = exp(x < 0.0f ? x : -x), inverse = 1.0f / (1.0f + power);
    const Vec score = x < 0.0f ? power * inverse : inverse;
    const Vec log_score = (x < 0.0f ? x : Vec{}) - log_of_one_and(power);
    total += score;
    weighted += score > 0.0f ? score * log_score : score;  // 0 log 0 is 0; what is not a number stays so
  }
  const float all = sum(total);
  return std::log(all) - sum(weighted) / all;
}

// The A best of E numbers, in order; equal ones, and those that are not numbers, stay in the order of their indices.
void best(const float* values, int64_t E, int64_t A, int32_t* ids) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (count == A && !(values[e] > values[ids[A - 1]])) continue;
    int64_t at = count < A ? count++ : A - 1;
    for (; at > 0 && values[e] > values[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = e;
  }
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

ffi::Error route(Threads pool, Floats query, Floats keys, Floats bias, Ints counted, IntResult ids,
                 FloatResult scores, IntResult counts, FloatResult entropies) {
  const int64_t T = query.dimensions()[0], R = query.dimensions()[1], E = keys.dimensions()[0];
  const int64_t A = ids->dimensions()[1], parts = (T + kTokens - 1) / kTokens, row = (E + kPanel - 1) / kPanel * kPanel;
  const float scale = 1 / std::sqrt(float(R));
  const Packed panels = packed(transposed(keys.typed_data(), R), R, E, scratch<0>(packed_size(R, E)));
  share_out(pool, parts, [&](int64_t i) {
    const int64_t first = i * kTokens, count = std::min(kTokens, T - first);
    float *logits = scratch<1>(kTokens * row), *biased = scratch<2>(row);
    matmul(count, rows(query.typed_data() + first * R, R), panels, logits, row);
    for (int64_t t = first; t < first + count; ++t) {
      float* own = logits + (t - first) * row;
      for (int64_t e = 0; e < E; ++e) own[e] *= scale;
      for (int64_t e = 0; e < E; ++e) biased[e] = own[e] + bias.typed_data()[e];
      std::fill(own + E, own + row, -INFINITY);
      int32_t* chosen = ids->typed_data() + t * A;
      best(biased, E, A, chosen);
      for (int64_t a = 0; a < A; ++a) scores->typed_data()[t * A + a] = sigmoid(own[chosen[a]]);
      entropies->typed_data()[t] = entropy(own, E);
    }
  });
  std::fill_n(counts->typed_data(), E, 0);
  for (int64_t c = 0; c < T * A; ++c) counts->typed_data()[ids->typed_data()[c]] += counted.typed_data()[c / A];
  return ffi::Error::Success();
}

// Choices sorted by expert, ties in their order: order[r] is the choice in row r, and ends[e] the row after expert e's.
void sort_choices(const Ints& ids, int64_t E, int32_t* order, std::vector<int64_t>& ends) {
  const int64_t count = ids.element_count();
  const int32_t* id = ids.typed_data();
  ends.assign(E + 1, 0);
  for (int64_t c = 0; c < count; ++c) ++ends[id[c] + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());  // ends[e] is where expert e starts, until it is filled
  for (int64_t c = 0; c < count; ++c) order[ends[id[c]]++] = c;
  ends.pop_back();
}

// The gradients of the scores for query and keys. The choice itself has none.
ffi::Error route_gradients(Threads pool, Floats query, Floats keys, Ints ids, Floats scores, Floats d_scores,
                           FloatResult d_query, FloatResult d_keys) {
  const int64_t T = query.dimensions()[0], R = query.dimensions()[1], E = keys.dimensions()[0];
  const int64_t A = ids.dimensions()[1], parts = (T + kTokens - 1) / kTokens;
  const float scale = 1 / std::sqrt(float(R));
  const auto d_logit = [&](int64_t c) {
    const float score = scores.typed_data()[c];
    return scale * d_scores.typed_data()[c] * score * (1 - score);
  };
  const auto add = [&](float factor, const float* from, float* to) {
    for (int64_t r = 0; r < R; ++r) to[r] += factor * from[r];
  };
  std::vector<int32_t> order(T * A);
  std::vector<int64_t> ends;
  sort_choices(ids, E, order.data(), ends);
  share_out(pool, parts + E, [&](int64_t i) {
    if (i < parts) {
      const int64_t first = i * kTokens, last = std::min(first + kTokens, T);
      std::fill(d_query->typed_data() + first * R, d_query->typed_data() + last * R, 0.0f);
      for (int64_t c = first * A; c < last * A; ++c)
        add(d_logit(c), keys.typed_data() + ids.typed_data()[c] * R, d_query->typed_data() + c / A * R);
      return;
    }
    const int64_t e = i - parts;
    float* own = d_keys->typed_data() + e * R;
    std::fill_n(own, R, 0.0f);
    for (int64_t r = e ? ends[e - 1] : 0; r < ends[e]; ++r)
      add(d_logit(order[r]), query.typed_data() + order[r] / A * R, own);
  });
  return ffi::Error::Success();
}

// ids [T, A]: order, inverse [T A], sizes [E]
ffi::Error plan(Ints ids, IntResult order, IntResult inverse, IntResult sizes) {
  const int64_t E = sizes->element_count(), count = ids.element_count();
  std::vector<int64_t> ends;
  sort_choices(ids, E, order->typed_data(), ends);
  for (int64_t r = 0; r < count; ++r) inverse->typed_data()[order->typed_data()[r]] = r;
  for (int64_t e = 0; e < E; ++e) sizes->typed_data()[e] = ends[e] - (e ? ends[e - 1] : 0);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dreamer

DREAMER_KERNEL(route, route);
DREAMER_KERNEL(route_gradients, route_gradients);
DREAMER_KERNEL(route_plan, plan);
