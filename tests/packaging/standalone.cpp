// Tests the CPU kernels without PyTorch and Python, for other compilers, processors and emulators.
//
// Runs every instruction set of the processor with every mask, self relations and cross relations, and every dtype, on
// one thread and on three. The reference is the definition, computed in double. The tolerance is twice the error of the
// definition computed in float, plus one rounding. The optional argument is the longest sequence to test. The last line
// of the output has the instruction sets, the number of cases and the number of failures. The exit status is 1 if there
// are failures.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"

namespace {

using namespace minilm;
using namespace minilm::cpu;

const float kNaN = std::numeric_limits<float>::quiet_NaN();

// Conversion of finite numbers to and from float16, subnormal numbers included.
uint16_t to_half(float x) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  int exponent;
  float mantissa = std::frexp(std::fabs(x), &exponent);  // [0.5, 1)
  if (x == 0 || exponent < -24) return sign;
  int bits = exponent > -14 ? 11 : exponent + 25;
  auto digits = static_cast<uint16_t>(std::ldexp(mantissa, bits));
  return exponent > -14 ? sign | static_cast<uint16_t>((exponent + 14) << 10 | (digits & 0x3ff)) : sign | digits;
}

float from_half(uint16_t h) {
  int exponent = h >> 10 & 31;
  if (exponent == 31) return kNaN;
  int digits = h & 0x3ff;
  float x = exponent ? std::ldexp(static_cast<float>(digits | 0x400), exponent - 25)
                     : std::ldexp(static_cast<float>(digits), -24);
  return h & 0x8000 ? -x : x;
}

// A tensor (N, S, A, D): its exact values, and the view for the kernels.
struct Numbers {
  std::vector<float> exact;
  std::vector<uint16_t> half;
  TensorView view;

  Numbers(std::vector<float> x, int64_t positions, int64_t heads, int64_t width, DType dtype) : exact(std::move(x)) {
    for (float& v : exact) {
      if (dtype == DType::float16) {
        half.push_back(to_half(v));
        v = from_half(half.back());
      } else if (dtype == DType::bfloat16) {
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        half.push_back(static_cast<uint16_t>(bits >> 16));
        bits &= 0xffff0000;
        std::memcpy(&v, &bits, 4);
      }
    }
    view = {dtype == DType::float32 ? static_cast<const void*>(exact.data()) : half.data(),
            positions * heads * width,
            heads * width,
            width,
            1,
            static_cast<int32_t>(width),
            dtype};
  }
};

struct Case {
  std::string name;
  int64_t sequences, positions, heads, width_t, width_s;
  bool causal, prefix, holes, cross;
  DType dtype;
};

template <class T>
struct Result {
  T value = 0;
  std::vector<T> rows, query_grad, key_grad;
};

struct Inputs {
  std::vector<int64_t> tokens, starts{0}, prefixes;
  std::vector<float> weights;
  Numbers query_t, key_t, query_s, key_s;
  float scale_t, scale_s;
};

// Computes the rows by the definition, with all sums and exponentials in T.
template <class T>
Result<T> define(const Case& c, const Inputs& in) {
  Result<T> out;
  out.rows.assign(c.sequences * c.heads * c.positions, 0);
  out.query_grad.assign(in.query_s.exact.size(), 0);
  out.key_grad.assign(in.key_s.exact.size(), 0);
  std::vector<T>& key_grad = c.cross ? out.key_grad : out.query_grad;
  for (int64_t n = 0; n < c.sequences; ++n)
    for (int64_t a = 0; a < c.heads; ++a) {
      const int64_t* tokens = in.tokens.data() + in.starts[n];
      int64_t length = in.starts[n + 1] - in.starts[n];
      auto at = [&](int64_t i, int64_t width) { return ((n * c.positions + tokens[i]) * c.heads + a) * width; };
      auto log_softmax = [&](const Numbers& query, const Numbers& key, int64_t width, float scale, int64_t i,
                             std::vector<T>& s) {
        T most = -std::numeric_limits<T>::infinity(), sum = 0;
        for (int64_t j = 0; j < length; ++j) {
          T dot = 0;
          for (int64_t k = 0; k < width; ++k)
            dot += static_cast<T>(query.exact[at(i, width) + k]) * static_cast<T>(key.exact[at(j, width) + k]);
          bool visible = (!c.causal && !c.prefix) || j <= i || (c.prefix && j < in.prefixes[n]);
          s[j] = visible ? static_cast<T>(scale) * dot : -std::numeric_limits<T>::infinity();
          most = std::max(most, s[j]);
        }
        for (int64_t j = 0; j < length; ++j) sum += std::exp(s[j] - most);
        for (int64_t j = 0; j < length; ++j) s[j] -= most + std::log(sum);
      };
      std::vector<T> t(length), s(length);
      for (int64_t i = 0; i < length; ++i) {
        log_softmax(in.query_t, in.key_t, c.width_t, in.scale_t, i, t);
        log_softmax(in.query_s, in.key_s, c.width_s, in.scale_s, i, s);
        T kl = 0;
        for (int64_t j = 0; j < length; ++j) {
          if (std::isinf(t[j])) continue;
          T p = std::exp(t[j]), q = std::exp(s[j]);
          kl += p * (t[j] - s[j]);
          T g = static_cast<T>(in.weights[n]) * static_cast<T>(in.scale_s) * (q - p);
          for (int64_t k = 0; k < c.width_s; ++k) {
            out.query_grad[at(i, c.width_s) + k] += g * static_cast<T>(in.key_s.exact[at(j, c.width_s) + k]);
            key_grad[at(j, c.width_s) + k] += g * static_cast<T>(in.query_s.exact[at(i, c.width_s) + k]);
          }
        }
        out.rows[(n * c.heads + a) * c.positions + tokens[i]] = kl;
        out.value += static_cast<T>(in.weights[n]) * kl;
      }
    }
  return out;
}

Result<float> compute(const Case& c, const Inputs& in, const char* instruction_set, int64_t threads) {
  Result<float> out;
  out.rows.assign(c.sequences * c.heads * c.positions, 0);
  out.query_grad.assign(in.query_s.exact.size(), 0);
  out.key_grad.assign(in.key_s.exact.size(), 0);
  Relation relation{{in.query_t.view, in.key_t.view, in.scale_t, 1},
                    {in.query_s.view, in.key_s.view, in.scale_s, 1},
                    out.query_grad.data(),
                    c.cross ? out.key_grad.data() : out.query_grad.data(),
                    0,
                    !c.cross};
  Call call{};
  call.num_relations = 1;
  call.num_sequences = c.sequences;
  call.num_heads = c.heads;
  call.positions = call.max_length = c.positions;
  call.tokens = in.tokens.data();
  call.starts = in.starts.data();
  call.prefixes = c.prefix ? in.prefixes.data() : nullptr;
  call.causal = c.causal || c.prefix;
  call.weights = in.weights.data();
  call.values = &out.value;
  call.gradient = true;
  ThreadPool pool{threads, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                    std::vector<std::thread> others;
                    for (int64_t i = 1; i < count; ++i) others.emplace_back(body, context, i);
                    if (count) body(context, 0);
                    for (std::thread& other : others) other.join();
                  }};
  const char* error = run(call, &relation, pool, instruction_set);
  if (!error) {  // the KL divergence of single rows, without gradient
    relation.query_grad = relation.key_grad = nullptr;
    call.weights = nullptr;
    call.values = nullptr;
    call.row_values = out.rows.data();
    call.gradient = false;
    error = run(call, &relation, pool, instruction_set);
  }
  if (error) std::printf("%s: %s\n", instruction_set, error);
  return out;
}

template <class T>
double error(const std::vector<T>& x, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - expected[i]) * (x[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  if (difference == 0) return 0;
  return norm > 0 ? std::sqrt(difference / norm) : std::numeric_limits<double>::infinity();
}

Inputs draw(const Case& c) {
  std::mt19937 bits(static_cast<unsigned>(c.positions * 131 + c.width_s));
  std::normal_distribution<float> normal;
  Inputs in{{},
            {0},
            {},
            {},
            {{}, 0, 0, 1, c.dtype},
            {{}, 0, 0, 1, c.dtype},
            {{}, 0, 0, 1, c.dtype},
            {{}, 0, 0, 1, c.dtype},
            1 / std::sqrt(static_cast<float>(c.width_t)),
            1 / std::sqrt(static_cast<float>(c.width_s))};
  std::vector<bool> valid;
  for (int64_t n = 0; n < c.sequences; ++n) {
    for (int64_t i = 0; i < c.positions; ++i) {
      valid.push_back(!c.holes || bits() % 4 != 0);
      if (valid.back()) in.tokens.push_back(i);
    }
    in.starts.push_back(static_cast<int64_t>(in.tokens.size()));
    in.prefixes.push_back((in.starts[n + 1] - in.starts[n]) / (n + 2));
    in.weights.push_back(1.0f / static_cast<float>(n + 1));
  }
  auto numbers = [&](int64_t width) {
    std::vector<float> x(c.sequences * c.positions * c.heads * width);
    for (size_t i = 0; i < x.size(); ++i) x[i] = valid[i / (c.heads * width)] ? normal(bits) : kNaN;
    return Numbers(std::move(x), c.positions, c.heads, width, c.dtype);
  };
  // The views stay valid if the vectors are moved.
  in.query_t = numbers(c.width_t);
  in.key_t = c.cross ? numbers(c.width_t) : Numbers(in.query_t.exact, c.positions, c.heads, c.width_t, c.dtype);
  in.query_s = numbers(c.width_s);
  in.key_s = c.cross ? numbers(c.width_s) : Numbers(in.query_s.exact, c.positions, c.heads, c.width_s, c.dtype);
  return in;
}

int check(const Case& c, const char* instruction_set) {
  Inputs in = draw(c);
  Result<double> expected = define<double>(c, in);
  Result<float> got = compute(c, in, instruction_set, 1), again = compute(c, in, instruction_set, 3);
  // The tolerance comes from an unmasked case with enough rows, since a few rows may be exact by chance.
  Case full = c;
  full.causal = full.prefix = full.holes = false;
  full.positions = std::max<int64_t>(c.positions, 37);
  Inputs full_in = draw(full);
  Result<double> full_expected = define<double>(full, full_in);
  Result<float> plain = define<float>(full, full_in);
  const double rounding = 1.2e-7;
  const double rows = 2 * error(plain.rows, full_expected.rows) + rounding;
  const double query_grad = 2 * error(plain.query_grad, full_expected.query_grad) + rounding;
  const double key_grad = 2 * error(plain.key_grad, full_expected.key_grad) + rounding;
  int failures = 0;
  auto require = [&](const char* what, double found, double allowed) {
    if (found <= allowed) return;
    std::printf("%s, %s: %s: error %.2g, allowed %.2g\n", instruction_set, c.name.c_str(), what, found, allowed);
    ++failures;
  };
  require("value", error(std::vector<float>{got.value}, {expected.value}), rows);
  require("rows", error(got.rows, expected.rows), rows);
  require("gradient of queries", error(got.query_grad, expected.query_grad), query_grad);
  require("gradient of keys", error(got.key_grad, expected.key_grad), key_grad);
  bool same = got.value == again.value && got.rows == again.rows && got.query_grad == again.query_grad &&
              got.key_grad == again.key_grad;
  require("one thread and three differ", same ? 0 : 1, 0);
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  int64_t longest = argc > 1 ? std::atol(argv[1]) : 520;
  std::vector<Case> cases;
  for (int64_t positions : {1, 2, 37, 131, 300})
    for (bool cross : {false, true})
      for (int mask = 0; mask < 4; ++mask) {
        const char* const masks[] = {"no mask", "causal", "prefix", "holes"};
        Case c{"", 2, positions, 2, 6, 31, mask == 1, mask == 2, mask == 3, cross, DType::float32};
        if (positions == 131) c.width_t = 16, c.width_s = 8;
        if (positions == 300) c.sequences = c.heads = 1;
        c.dtype = positions == 37 ? DType::float16 : positions == 2 ? DType::bfloat16 : DType::float32;
        c.name = std::to_string(positions) + (cross ? " cross, " : " self, ") + masks[mask];
        cases.push_back(c);
      }
  // Few tasks with many tokens: the slices of one task run in parallel.
  cases.push_back({"520 self, causal", 1, 520, 1, 8, 4, true, false, false, false, DType::float32});
  int failures = 0, count = 0;
  for (const char* const* name = instruction_sets(); *name; ++name) {
    for (const Case& c : cases) {
      if (c.positions > longest) continue;
      failures += check(c, *name);
      ++count;
    }
    std::printf("%s, ", *name);
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures != 0;
}
