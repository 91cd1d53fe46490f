// Draws from softmaxes, a row at a time: what a row gives depends on that row alone.
//
// Nothing is sorted. The smallest weight that `top_p` keeps is found by halving the range of its bits, which are in the
// order of the weights, with one sum of what is at least as large for each half: 30 passes over a row in the cache.
#include <cmath>
#include <vector>

#include "../tile.h"

using namespace llmkit;

namespace {

constexpr long BLOCK = 256, CHAINS = 4;  // weights summed in fp32 before they join the others in fp64
constexpr long NEAR = 128;               // values of a row that are passed over where none is large enough
constexpr int32_t FEW = 0x3a800000;      // the bits of 2^-10: of a peaked law few weights are as large
constexpr int32_t ONE = 0x3f800000;      // the bits of 1, the largest weight

struct Asked {
  const float* law;
  int64_t size;
  float sharp, min_p;
  double top_p, at;
};

inline float of(int32_t bits) { float x; std::memcpy(&x, &bits, sizeof x); return x; }

// The sum of the weights of a block that are at least `least`.
inline float block(const float* w, float least) {
  const vec bound = all(least);
  vec sums[CHAINS] = {};
  for (long k = 0; k < BLOCK; k += CHAINS * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; i++) {
      const vec held = load(w + k + i * LANES);
      sums[i] += held >= bound ? held : vec{};
    }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline double mass(const std::vector<float>& w, float least) {
  double total = 0;
  for (size_t k = 0; k < w.size(); k += BLOCK) total += block(&w[k], least);
  return total;
}

inline float largest(const float* law, long size) {
  vec held[CHAINS] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
  long k = 0;
  for (; k + CHAINS * LANES <= size; k += CHAINS * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; i++) {
      const vec next = load(law + k + i * LANES);
      held[i] = next > held[i] ? next : held[i];
    }
  float found = -INFINITY;
  for (const vec& one : held) found = std::max(found, most(one));
  for (; k < size; k++) found = std::max(found, law[k]);
  return found;
}

// exp((law - its largest) * sharp), with zeros up to whole blocks.
void weigh(const Asked& s, std::vector<float>& w) {
  const float top = largest(s.law, s.size);
  w.resize((s.size + BLOCK - 1) / BLOCK * BLOCK);
  std::fill(w.begin() + s.size, w.end(), 0.0f);
  long k = 0;
  for (; k + LANES <= s.size; k += LANES) store(&w[k], exp((load(s.law + k) - top) * s.sharp));
  if (k == s.size) return;
  vec rest = all(-INFINITY);
  std::memcpy(&rest, s.law + k, (s.size - k) * sizeof(float));
  store(&w[k], exp((rest - top) * s.sharp));
}

// The weights of at least `least`, if they hold `wanted` and are few: then one that is sought is among them.
std::vector<float> head(const std::vector<float>& w, float least, double wanted) {
  std::vector<float> made;
  if (mass(w, least) < wanted) return made;
  for (float held : w)
    if (held >= least) {
      if (made.size() * 8 > w.size()) return {};
      made.push_back(held);
    }
  made.resize((made.size() + BLOCK - 1) / BLOCK * BLOCK);
  return made;
}

// The bits of the smallest of the fewest weights that hold `wanted`; `above` is what the larger ones hold.
int32_t border(const std::vector<float>& w, double wanted, double* above) {
  const std::vector<float> large = head(w, of(FEW), wanted);
  const std::vector<float>& among = large.empty() ? w : large;
  int32_t low = large.empty() ? 0 : FEW, high = ONE + 1;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (mass(among, of(middle)) >= wanted ? low : high) = middle;
  }
  *above = mass(among, of(high));
  return low;
}

// Leaves the fewest weights that hold `top_p`, of equal ones the first, and of these the ones of at least `min_p`.
void narrow(const Asked& s, std::vector<float>& w) {
  float least = s.min_p;
  if (s.top_p < 1) {
    const double wanted = s.top_p * mass(w, 0);
    double above = 0;
    const float last = of(border(w, wanted, &above));
    const long equal = last > 0 ? std::count(w.begin(), w.end(), last) : 0;
    long spare = equal > 1 ? equal - std::max(1L, (long)std::ceil((wanted - above) / last)) : 0;
    for (size_t k = w.size(); spare > 0 && k--;)
      if (w[k] == last) w[k] = 0, spare--;
    least = std::max(least, last);
  }
  for (float& held : w) held = held >= least ? held : 0.0f;
}

// The first place whose share of the sum passes `at`; rounding may leave none, then the last that weighs anything.
long place(const Asked& s, const std::vector<float>& w, double* total) {
  std::vector<double> sums;
  double whole = 0;
  for (size_t k = 0; k < w.size(); k += BLOCK) sums.push_back(block(&w[k], 0)), whole += sums.back();
  *total = whole;
  double left = s.at * whole;
  long last = 0;
  for (size_t b = 0; b < sums.size(); b++) {
    if (sums[b] <= 0) continue;
    if (left >= sums[b]) {
      left -= sums[b];
      last = b;
      continue;
    }
    last = b;
    for (long k = b * BLOCK; k < (long)(b + 1) * BLOCK; left -= w[k++])
      if (w[k] > left) return k;
    break;
  }
  long k = (last + 1) * BLOCK - 1;
  while (k > 0 && w[k] <= 0) k--;
  return k;
}

// The columns of the largest of a row, the largest first and of equal ones the first; `found` has as many values.
void largest_of(const float* row, long size, long count, float* found, int64_t* columns) {
  const auto take = [&](long k) {
    long at = std::min(k, count - 1);
    for (; at > 0 && found[at - 1] < row[k]; at--) found[at] = found[at - 1], columns[at] = columns[at - 1];
    found[at] = row[k], columns[at] = k;
  };
  long k = 0;
  for (; k < count; k++) take(k);
  for (; k < size && k % NEAR; k++)
    if (row[k] > found[count - 1]) take(k);
  for (; k + NEAR <= size; k += NEAR) {
    if (largest(row + k, NEAR) <= found[count - 1]) continue;
    for (long i = k; i < k + NEAR; i++)
      if (row[i] > found[count - 1]) take(i);
  }
  for (; k < size; k++)
    if (row[k] > found[count - 1]) take(k);
}

}  // namespace

extern "C" {

void largest_rows(const float* rows, int64_t count, int64_t size, int64_t wanted, int64_t* columns, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> found(wanted);
#pragma omp for schedule(dynamic)
    for (long r = 0; r < count; r++) largest_of(rows + r * size, size, wanted, found.data(), columns + r * wanted);
  }
}

void draw_rows(const void* const* laws, const int64_t* sizes, const float* sharps, const double* top_ps,
               const float* min_ps, const double* ats, int64_t* places, double* masses, int64_t rows, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> w;
#pragma omp for schedule(dynamic)
    for (long r = 0; r < rows; r++) {
      const Asked s{(const float*)laws[r], sizes[r], sharps[r], min_ps[r], top_ps[r], ats[r]};
      weigh(s, w);
      if (s.top_p < 1 || s.min_p > 0) narrow(s, w);
      places[r] = place(s, w, &masses[r]);
    }
  }
}
}
