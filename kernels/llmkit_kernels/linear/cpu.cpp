// Linears whose sums have one order, fp32: what a row gives depends on that row alone.
//
// An output is a chain of fused multiply-adds over 128 inputs at a time; the sums of these blocks are added in order.
// Lanes run along outputs, so that nothing is added across lanes: squares of the weight are turned in registers and meet
// some rows at once. How rows are grouped, and which thread has which outputs, moves no sum.
#include <utility>

#include "../gate.h"

using namespace llmkit;

namespace {

constexpr long DEPTH = 128, VECTORS = 4, WIDE = VECTORS * LANES;
constexpr long FEW = 16;     // rows up to which a weight goes from memory to the sums without a stop in the cache
constexpr long TILE = 6;     // rows that meet a panel at once: their sums fill the registers
constexpr long SHARE = 96;   // rows for which it is worth a thread's while to turn a panel

// x (rows, in), rows `step` apart; weight (out, in); bias (out) or null; y (rows, out), rows `width` apart.
struct Linear {
  const float *x, *weight, *bias;
  float* y;
  long rows, in, out, step, width;
};

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
  for (int i = 0; i < M; i++) store(s.y + i * s.width + o, total[i]);
}

// 16 outputs at 16 inputs at a border of the weight.
void turn_border(const float* weight, long step, long outputs, long depth, float* panel) {
  for (long k = 0; k < std::min<long>(LANES, depth); k++)
    for (long i = 0; i < LANES; i++) panel[k * WIDE + i] = i < outputs ? weight[i * step + k] : 0.0f;
}

// weight (outputs x depth, rows `step` apart) -> panel (depth x 64), filled with zeros.
void turn(const float* weight, long step, long ahead, long outputs, long depth, float* panel) {
  for (long o = 0; o < WIDE; o += LANES)
    for (long k = 0; k < depth; k += LANES) {
      const float* from = weight + o * step + k;
      if (o + LANES > outputs || k + LANES > depth) {
        turn_border(from, step, outputs - o, depth - k, panel + k * WIDE + o);
        continue;
      }
      vec square[LANES];
      fetch(from, step, ahead, square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(panel + (k + i) * WIDE + o, square[i]);
    }
}

// Rows of outputs: where a block's sums go, and what they are added to.
struct Out {
  float* y;
  const float* before;  // y itself, or at the first block the bias, whose rows are 0 apart
  long y_step, before_step, outputs;
};

// y (M x 64) = before + sums, or its first `outputs`, where a panel is not full.
template <int M>
inline void add(const vec (&sums)[M][VECTORS], const Out& out) {
  if (out.outputs == WIDE) {
#pragma GCC unroll 6
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++)
        store(out.y + i * out.y_step + j * LANES, load(out.before + i * out.before_step + j * LANES) + sums[i][j]);
    return;
  }
  for (int i = 0; i < M; i++)
    for (long o = 0; o < out.outputs; o++)
      out.y[i * out.y_step + o] = out.before[i * out.before_step + o] + sums[i][o / LANES][o % LANES];
}

// y (M x outputs) = before + x (M x depth) times the panel.
template <int M>
void meet(const float* x, long x_step, const float* panel, long depth, const Out& out) {
  vec sums[M][VECTORS] = {};
  for (long k = 0; k < depth; k++) {
    if (k % LANES == 0)
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) __builtin_prefetch(x + (M + i) * x_step + k, 0, 3);
    vec row[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) row[j] = load(panel + k * WIDE + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
      const vec held = all(x[i * x_step + k]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sums[i][j] += held * row[j];
    }
  }
  add<M>(sums, out);
}

template <int... I>
void streamed(std::integer_sequence<int, I...>, const Linear& s, long o) {
  constexpr void (*of[])(const Linear&, long) = {stream<I + 1>...};
  of[s.rows - 1](s, o);
}

template <int... I>
void met(std::integer_sequence<int, I...>, long rows, const float* x, long x_step, const float* panel, long depth,
         const Out& out) {
  constexpr void (*of[])(const float*, long, const float*, long, const Out&) = {meet<I + 1>...};
  of[rows - 1](x, x_step, panel, depth, out);
}

// y of the rows [from, to) at up to 64 outputs from `o` on.
void block(const Linear& s, long from, long to, long o) {
  alignas(64) float panel[DEPTH * WIDE], bias[WIDE] = {};
  const long outputs = std::min(WIDE, s.out - o);
  if (s.bias) std::copy_n(s.bias + o, outputs, bias);
  for (long k = 0; k < s.in; k += DEPTH) {
    const long depth = std::min(DEPTH, s.in - k);
    const long ahead = k + DEPTH < s.in ? DEPTH : WIDE * s.in - k;  // the next block, or the first of the next panel
    turn(s.weight + o * s.in + k, s.in, ahead, outputs, depth, panel);
    for (long r = from; r < to; r += TILE) {
      float* y = s.y + r * s.width + o;
      const Out out{y, k ? y : bias, s.width, k ? s.width : 0, outputs};
      met(std::make_integer_sequence<int, TILE>(), std::min(TILE, to - r), s.x + r * s.step + k, s.step, panel, depth,
          out);
    }
  }
}

// Outputs that are made 16 at a time: of few rows.
long at_16(const Linear& s) { return s.rows <= FEW && s.in % LANES == 0 ? s.out / LANES * LANES : 0; }

// What threads share of a linear: few rows at 16 outputs at a time, and all else, or many rows, by panels; `run` is given
// rows [from, to), a first output and how many there are. Whoever is done goes on.
template <class Run>
void shared(const Linear& s, int threads, Run run) {
  const long begin = at_16(s);
  const long panels = (s.out - begin + WIDE - 1) / WIDE;
  const long shares = panels % threads ? std::max(1L, std::min<long>(threads, s.rows / SHARE)) : 1;
#pragma omp for schedule(static) nowait
  for (long o = 0; o < begin; o += LANES) run(0, s.rows, o, LANES);
#pragma omp for schedule(static) nowait
  for (long task = 0; task < panels * shares; task++) {
    const long share = task % shares, o = begin + task / shares * WIDE;
    run(s.rows * share / shares, s.rows * (share + 1) / shares, o, std::min(WIDE, s.out - o));
  }
}

void part(const Linear& s, long from, long to, long o) {
  if (o < at_16(s))
    streamed(std::make_integer_sequence<int, FEW>(), s, o);
  else
    block(s, from, to, o);
}

}  // namespace

extern "C" {

// Several weights meet x at once: their outputs stand side by side in y (rows, width). A bias may be null.
void linear_forward(const float* x, const float* const* weights, const float* const* biases, const int64_t* outs,
                    int64_t count, float* y, int64_t rows, int64_t in, int64_t width, int64_t step, int threads) {
  if (!rows) return;
#pragma omp parallel num_threads(threads)
  for (int64_t w = 0, at = 0; w < count; at += outs[w++]) {
    const Linear s{x, weights[w], biases[w], y + at, rows, in, outs[w], step, width};
    shared(s, threads, [&](long from, long to, long o, long) { part(s, from, to, o); });
  }
}

// silu(gate) * up: y (rows, out), and `other`, which is of its size and worked in.
void linear_gated(const float* x, const float* gate, const float* gate_bias, const float* up, const float* up_bias,
                  float* y, float* other, int64_t rows, int64_t in, int64_t out, int64_t step, int threads) {
  if (!rows) return;
  const Linear first{x, gate, gate_bias, y, rows, in, out, step, out};
  const Linear second{x, up, up_bias, other, rows, in, out, step, out};
#pragma omp parallel num_threads(threads)
  shared(first, threads, [&](long from, long to, long o, long outputs) {
    part(first, from, to, o);
    part(second, from, to, o);
    for (long r = from; r < to; r++)
      for (long at = r * out + o, end = at + outputs, n; at < end; at += n) {
        n = std::min<long>(LANES, end - at);
        put(y + at, silu(some(y + at, n)) * some(other + at, n), n);
      }
  });
}
}
