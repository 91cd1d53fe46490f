// Few rows: a weight goes from memory to the sums without a stop in the cache.
#pragma once
#include "../gate.h"

namespace llmkit {

constexpr long DEPTH = 128;
constexpr long TURNED = 4;  // rows up to which it takes less to turn the weight than to fill lanes with rows
constexpr long FEW = 32;    // rows up to which a weight goes from memory to the sums without a stop in the cache
constexpr long HALF = 21;   // rows from 17 to here leave too many of 32 lanes empty: they go as many do
constexpr long STRIP = 8;   // outputs whose weights meet rows in lanes at once: sums enough to hide how long one takes

typedef float half __attribute__((vector_size(32)));

// x (rows, in), rows `step` apart; weight (out, in); bias (out) or null; y (rows, out), rows `width` apart. `across`: x of
// few rows turned, (in, lanes). `more`: what comes of up to 128 inputs is added to what y holds; there is no bias.
struct Linear {
  const float *x, *weight, *bias, *across;
  float* y;
  long rows, in, out, step, width;
  bool more = false;
};

// 16 outputs of a row.
inline void give(const Linear& s, float* y, vec made) { store(y, s.more ? load(y) + made : made); }

// A square of 16 x 16, turned: four perfect shuffles of the rows swap its two indices.
inline void turned(vec (&square)[LANES]) {
  const ivec low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const ivec high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; stage++) {
    vec next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = __builtin_shuffle(square[i], square[i + LANES / 2], low);
      next[2 * i + 1] = __builtin_shuffle(square[i], square[i + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) square[i] = next[i];
  }
}

// 16 outputs at 16 inputs; `ahead` numbers on is what will be asked for next.
inline void fetch(const float* weight, long step, long ahead, vec (&square)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    __builtin_prefetch(weight + i * step + ahead, 0, 2);
    square[i] = load(weight + i * step);
  }
  turned(square);
}

// y (M x 16) of 16 outputs from `o` on, straight from the weight.
template <int M>
void stream(const Linear& s, long o) {
  const float* weight = s.weight + o * s.in;
  vec total[M];
  for (int i = 0; i < M; i++) total[i] = s.bias ? load(s.bias + o) : vec{};
  for (long k = 0; k < s.in; k += DEPTH) {
    vec sums[M] = {};
    for (long at = k; at < std::min(s.in, k + DEPTH); at += LANES) {
      vec square[LANES];
      fetch(weight + at, s.in, LANES * s.in, square);
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++)
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) sums[i] += all(s.x[i * s.step + at + j]) * square[j];
    }
    for (int i = 0; i < M; i++) total[i] += sums[i];
  }
  for (int i = 0; i < M; i++) give(s, s.y + i * s.width + o, total[i]);
}

// Whether rows are few.
constexpr bool few(long rows) { return rows <= LANES || (rows > HALF && rows <= FEW); }

// Lanes that rows are laid across, where they are.
constexpr long across(long rows) {
  if (rows <= TURNED || !few(rows)) return 0;
  return rows <= LANES / 2 ? LANES / 2 : (rows + LANES - 1) / LANES * LANES;
}

// x at 16 inputs from `k` on, turned: what no row fills is 0.
inline void lay_across(const Linear& s, long k, float* to) {
  const long lanes = across(s.rows);
  for (long r = 0; r < lanes; r += LANES) {
    vec square[LANES];
    for (long i = 0; i < LANES; i++) square[i] = r + i < s.rows ? load(s.x + (r + i) * s.step + k) : vec{};
    turned(square);
    for (long i = 0; i < LANES; i++)
      std::memcpy(to + (k + i) * lanes + r, &square[i], std::min<long>(lanes, LANES) * sizeof(float));
  }
}

inline void fill(vec& v, float x) { v = all(x); }
inline void fill(half& v, float x) { v = half{x, x, x, x, x, x, x, x}; }

// y of 8 outputs from `o` on as (8, lanes): rows lie in N vectors.
template <class V, int N>
inline void strip(const Linear& s, long o, V (&total)[STRIP][N]) {
  const float* weight = s.weight + o * s.in;
  constexpr long W = sizeof(V) / sizeof(float);
  for (long i = 0; i < STRIP; i++)
    for (int n = 0; n < N; n++) fill(total[i][n], s.bias ? s.bias[o + i] : 0.0f);
  for (long k = 0; k < s.in; k += DEPTH) {
    V sums[STRIP][N] = {};
    for (long at = k; at < std::min(s.in, k + DEPTH); at += LANES) {
#pragma GCC unroll 8
      for (long i = 0; i < STRIP; i++) __builtin_prefetch(weight + (STRIP + i) * s.in + at, 0, 2);
#pragma GCC unroll 16
      for (long j = 0; j < LANES; j++) {
        V row[N];
        std::memcpy(row, s.across + (at + j) * N * W, sizeof row);
#pragma GCC unroll 8
        for (long i = 0; i < STRIP; i++) {
          V held;
          fill(held, weight[i * s.in + at + j]);
#pragma GCC unroll 2
          for (int n = 0; n < N; n++) sums[i][n] += held * row[n];
        }
      }
    }
    for (long i = 0; i < STRIP; i++)
      for (int n = 0; n < N; n++) total[i][n] += sums[i][n];
  }
}

// y (rows x 16) of 16 outputs from `o` on: two strips, turned back.
template <class V, int N>
void cross(const Linear& s, long o) {
  V made[LANES / STRIP][STRIP][N];
  for (long i = 0; i < LANES / STRIP; i++) strip<V, N>(s, o + i * STRIP, made[i]);
  for (int n = 0; n < N; n++) {
    vec square[LANES] = {};
    for (long i = 0; i < LANES; i++) std::memcpy(&square[i], &made[i / STRIP][i % STRIP][n], sizeof(V));
    turned(square);
    for (long r = n * LANES; r < std::min<long>(s.rows, (n + 1) * LANES); r++)
      give(s, s.y + r * s.width + o, square[r - n * LANES]);
  }
}

}  // namespace llmkit
