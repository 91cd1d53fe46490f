// What paged attention multiplies: queries with keys that lie turned in blocks, and weights with values.
#pragma once
#include <type_traits>

#include "../stored.h"

namespace llmkit {

constexpr long CHUNK = 256;       // lanes of a chunk: 16 blocks of 16 keys
constexpr long STRIPS = CHUNK / LANES;
constexpr long DRAFTS = 64;       // tokens of a tree
constexpr long PIECES = DRAFTS + 1;  // strips of their keys and pieces of a path's values, with what is before them in a block

struct Shape {
  long heads, groups, size, value, block, queries, window;  // `queries` of a task
  float scale, cap;
  long held() const { return heads / groups; }
  long wide() const { return (block + LANES - 1) / LANES * LANES; }          // lanes of a block
  long columns() const { return (value + LANES - 1) / LANES * LANES; }       // of a value, as it lies in a block
  long blocks() const { return std::max(1L, CHUNK / wide()); }               // of a chunk
  long pitch() const { return blocks() * wide() + LANES; }                   // rows apart by no power of two
  long first(long place) const { return window ? std::max(0L, place - window + 1) : 0; }
};

// ---- scores: M queries by N strips of 16 keys

template <int M, int N, class T>
void meet(const float* q, const T* const* strips, const Shape& s, long pitch, float* out) {
  vec acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) acc[i][j] = vec{};
  const T* at[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) at[j] = strips[j];
  for (long d = 0; d < s.size; d++) {
    vec keys[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) { keys[j] = wide(at[j]); at[j] += s.wide(); }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const vec x = all(q[i * s.size + d]);
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) acc[i][j] += x * keys[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) store(out + i * pitch + j * LANES, acc[i][j]);
}

// ---- values: M queries by N vectors of a value's columns, over the blocks of a chunk; `more`: after what is in `out`

struct Reach { long block, from, to; };  // rows [from, to) of a block of the chunk

template <int M, int N, class T>
void weigh(const float* weights, const T* const* blocks, const Reach* reach, long count, const Shape& s, bool more,
           float* out) {
  const long columns = s.columns(), pitch = s.pitch();
  vec acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) acc[i][j] = more ? load(out + i * columns + j * LANES) : vec{};
  for (long b = 0; b < count; b++) {
    const T* row = blocks[b] + reach[b].from * columns;
    const float* by = weights + reach[b].block * s.wide() + reach[b].from;
    for (long k = reach[b].from; k < reach[b].to; k++, row += columns, by++) {
      vec value[N];
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) value[j] = wide(row + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const vec x = all(by[i * pitch]);
#pragma GCC unroll 16
        for (int j = 0; j < N; j++) acc[i][j] += x * value[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) store(out + i * columns + j * LANES, acc[i][j]);
}

// Calls `run` for 6, 4, 3, 2 or 1 rows at a time: an element has the same sum in each.
template <class F>
void by_rows(long rows, F run) {
  long i = 0;
  for (; i + 6 <= rows; i += 6) run(std::integral_constant<int, 6>{}, i);
  for (; i + 4 <= rows; i += 4) run(std::integral_constant<int, 4>{}, i);
  for (; i + 3 <= rows; i += 3) run(std::integral_constant<int, 3>{}, i);
  for (; i + 2 <= rows; i += 2) run(std::integral_constant<int, 2>{}, i);
  for (; i < rows; i++) run(std::integral_constant<int, 1>{}, i);
}

template <class T>
void all_scores(long rows, const float* q, const T* const* strips, long count, const Shape& s, long pitch, float* out) {
  long j = 0;
  for (; j + 4 <= count; j += 4)
    by_rows(rows, [&](auto m, long i) {
      meet<m.value, 4>(q + i * s.size, strips + j, s, pitch, out + i * pitch + j * LANES);
    });
  for (; j < count; j++)
    by_rows(rows, [&](auto m, long i) {
      meet<m.value, 1>(q + i * s.size, strips + j, s, pitch, out + i * pitch + j * LANES);
    });
}

template <class T>
void all_values(long rows, const float* weights, const T* const* blocks, const Reach* reach, long count, const Shape& s,
                bool more, float* out) {
  const T* moved[PIECES];
  for (long b = 0; b < count; b++) moved[b] = blocks[b];
  const auto on = [&](long by) { for (long b = 0; b < count; b++) moved[b] += by * LANES; };
  long j = 0;
  for (; j + 4 * LANES <= s.columns(); j += 4 * LANES, on(4))
    by_rows(rows, [&](auto m, long i) {
      weigh<m.value, 4>(weights + i * s.pitch(), moved, reach, count, s, more, out + i * s.columns() + j);
    });
  for (; j < s.columns(); j += LANES, on(1))
    by_rows(rows, [&](auto m, long i) {
      weigh<m.value, 1>(weights + i * s.pitch(), moved, reach, count, s, more, out + i * s.columns() + j);
    });
}

}  // namespace llmkit
