// Linears whose sums have one order, fp32: what a row gives depends on that row alone.
//
// An output is a chain of fused multiply-adds over 128 inputs at a time; the sums of these blocks are added in order.
// Nothing is added across lanes. Of a row or four, and of many, lanes run along outputs: squares of the weight are turned
// in registers and meet some rows at once. Of a few rows they run along these, which are turned once, and a weight is read
// as it lies. How rows are grouped, and which thread has which outputs, moves no sum.
#include <utility>

#include "few.h"

using namespace llmkit;

namespace {

constexpr long VECTORS = 4, WIDE = VECTORS * LANES;
constexpr long TILE = 6;    // rows that meet a panel at once: their sums fill the registers
constexpr long SHARE = 96;  // rows for which it is worth a thread's while to turn a panel

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
void block(const Linear& s, long from, long to, long o, long outputs) {
  alignas(64) float panel[DEPTH * WIDE], bias[WIDE] = {};
  if (s.bias) std::copy_n(s.bias + o, outputs, bias);
  for (long k = 0; k < s.in; k += DEPTH) {
    const long depth = std::min(DEPTH, s.in - k);
    const long ahead = k + DEPTH < s.in ? DEPTH : WIDE * s.in - k;  // the next block, or the first of the next panel
    turn(s.weight + o * s.in + k, s.in, ahead, outputs, depth, panel);
    for (long r = from; r < to; r += TILE) {
      float* y = s.y + r * s.width + o;
      const bool there = k || s.more;
      const Out out{y, there ? y : bias, s.width, there ? s.width : 0, outputs};
      met(std::make_integer_sequence<int, TILE>(), std::min(TILE, to - r), s.x + r * s.step + k, s.step, panel, depth,
          out);
    }
  }
}

// Outputs that are made 16 at a time: of few rows.
long at_16(const Linear& s) { return few(s.rows) && s.in % LANES == 0 ? s.out / LANES * LANES : 0; }

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

void part(const Linear& s, long from, long to, long o, long outputs) {
  if (outputs != LANES || o >= at_16(s)) return block(s, from, to, o, outputs);
  switch (across(s.rows)) {
    case 0: return streamed(std::make_integer_sequence<int, TURNED>(), s, o);
    case LANES / 2: return cross<half, 1>(s, o);
    case LANES: return cross<vec, 1>(s, o);
    default: return cross<vec, 2>(s, o);
  }
}

// All threads lay x across lanes, before any of them needs it.
void laid(const Linear& s, float* to) {
  if (s.in % LANES || !across(s.rows)) return;
#pragma omp for schedule(static)
  for (long k = 0; k < s.in; k += LANES) lay_across(s, k, to);
}

// What a LoRA (arXiv 2106.09685) adds to a linear: scale (x down') up', down (rank, in), up (out, rank). Where there is none
// its rank is 0.
struct Low {
  const float *down, *up;
  int64_t rank;
  float scale;
};

// All threads make scale (x down') of some LoRAs side by side in `room`, (rows, all ranks), and lay it across behind that,
// before any of them needs it. Gives the product with `up` of each, of linears whose y stand side by side too.
struct Lows {
  const Low* of;
  long count, width = 0;
  float* room;

  Lows(const Low* lows, long n, float* where) : of(lows), count(lows ? n : 0), room(where) {
    for (long w = 0; w < count; w++) width += of[w].rank;
  }

  void make(const Linear& x, int threads) const {
    for (long w = 0, at = 0; w < count; at += of[w++].rank) {
      const Linear s{x.x, of[w].down, nullptr, x.across, room + at, x.rows, x.in, of[w].rank, x.step, width};
      shared(s, threads, [&](long from, long to, long o, long outputs) {
        part(s, from, to, o, outputs);
        for (long r = from; r < to; r++)
          for (long i = o; i < o + outputs; i++) s.y[r * width + i] *= of[w].scale;
      });
    }
    if (!width) return;
#pragma omp barrier
    for (long w = 0, at = 0; w < count; at += of[w++].rank) laid(up(w, at, nullptr, x.rows, 0, 0), across_of(x.rows, at));
  }

  float* across_of(long rows, long at) const { return room + rows * width + at * across(rows); }

  Linear up(long w, long at, float* y, long rows, long out, long step) const {
    return {room + at, of[w].up, nullptr, across_of(rows, at), y, rows, of[w].rank, out, width, step, true};
  }

  // What the w-th adds to the rows [from, to) of a linear's y at some outputs.
  void add(long w, const Linear& s, long from, long to, long o, long outputs) const {
    if (w >= count || !of[w].rank) return;
    long at = 0;
    for (long before = 0; before < w; before++) at += of[before].rank;
    part(up(w, at, s.y, s.rows, s.out, s.width), from, to, o, outputs);
  }
};

}  // namespace

extern "C" {

// Floats of room for each input, that the two below work in with so many rows.
int64_t linear_room(int64_t rows) { return across(rows); }

// Several weights meet x at once: their outputs stand side by side in y (rows, width). A bias may be null. `lows`: what is
// added to each, or null, and for them room of all ranks together, for each row and for what `linear_room` says.
void linear_forward(const float* x, const float* const* weights, const float* const* biases, const int64_t* outs,
                    int64_t count, float* y, float* room, const Low* lows, float* low_room, int64_t rows, int64_t in,
                    int64_t width, int64_t step, int threads) {
  if (!rows) return;
  const Lows added(lows, count, low_room);
#pragma omp parallel num_threads(threads)
  {
    const Linear whole{x, nullptr, nullptr, room, nullptr, rows, in, width, step, width};
    laid(whole, room);
    added.make(whole, threads);
    for (int64_t w = 0, at = 0; w < count; at += outs[w++]) {
      const Linear s{x, weights[w], biases[w], room, y + at, rows, in, outs[w], step, width};
      shared(s, threads, [&](long from, long to, long o, long outputs) {
        part(s, from, to, o, outputs);
        added.add(w, s, from, to, o, outputs);
      });
    }
  }
}

// silu(gate) * up: y (rows, out), and `other`, which is of its size and worked in. `lows`: of gate and up, as above.
void linear_gated(const float* x, const float* gate, const float* gate_bias, const float* up, const float* up_bias,
                  float* y, float* other, float* room, const Low* lows, float* low_room, int64_t rows, int64_t in,
                  int64_t out, int64_t step, int threads) {
  if (!rows) return;
  const Linear first{x, gate, gate_bias, room, y, rows, in, out, step, out};
  const Linear second{x, up, up_bias, room, other, rows, in, out, step, out};
  const Lows added(lows, 2, low_room);
#pragma omp parallel num_threads(threads)
  {
    laid(first, room);
    added.make(first, threads);
    shared(first, threads, [&](long from, long to, long o, long outputs) {
      part(first, from, to, o, outputs);
      part(second, from, to, o, outputs);
      added.add(0, first, from, to, o, outputs);
      added.add(1, second, from, to, o, outputs);
      for (long r = from; r < to; r++)
        for (long at = r * out + o, end = at + outputs, n; at < end; at += n) {
          n = std::min<long>(LANES, end - at);
          put(y + at, silu(some(y + at, n)) * some(other + at, n), n);
        }
    });
  }
}
}
