// Measures the CPU kernels without PyTorch: nanoseconds of thread time an ordered pair, loss and gradient.
// Arguments: an instruction set, repetitions, then cases BxAxSxD_txD_s. Prints one line a case: the fastest and the
// median repetition. Thread time, since other processes may run beside.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "driver.h"

namespace cpu = minilm::cpu;

static double thread_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

int main(int count, char** arguments) {
  const char* instruction_set = arguments[1];
  int repetitions = std::atoi(arguments[2]);
  for (int k = 3; k < count; ++k) {
    long B, A, S, D_t, D_s;
    if (std::sscanf(arguments[k], "%ldx%ldx%ldx%ldx%ld", &B, &A, &S, &D_t, &D_s) != 5) return 2;
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    auto draw = [&](long width) {
      std::vector<float> x(B * S * A * width);
      for (float& value : x) value = normal(generator);
      return x;
    };
    std::vector<float> x_t = draw(D_t), x_s = draw(D_s), grad(x_s.size());
    auto operands = [&](const std::vector<float>& x, long width) {
      minilm::TensorView view{
          x.data(), S * A * width, A * width, width, 1, static_cast<int32_t>(width), minilm::DType::float32};
      return minilm::ModelOperands{view, view, 1 / std::sqrt(static_cast<float>(width))};
    };
    minilm::Relation relation{operands(x_t, D_t), operands(x_s, D_s), grad.data(), grad.data(), 0, true};
    std::vector<int64_t> tokens, starts{0};
    for (long b = 0; b < B; ++b) {
      for (long i = 0; i < S; ++i) tokens.push_back(i);
      starts.push_back(static_cast<int64_t>(tokens.size()));
    }
    std::vector<float> weights(B, 1.0f / static_cast<float>(B * A * S));
    float value = 0;
    minilm::Call call{};
    call.num_relations = 1;
    call.num_sequences = B;
    call.num_heads = A;
    call.positions = call.max_length = S;
    call.gradient = true;
    call.tokens = tokens.data();
    call.starts = starts.data();
    call.weights = weights.data();
    call.values = &value;
    cpu::ThreadPool one{1, [](int64_t n, void (*body)(void*, int64_t), void* context) {
                          for (int64_t i = 0; i < n; ++i) body(context, i);
                        }};
    std::vector<double> times;
    for (int i = 0; i < repetitions; ++i) {
      double begin = thread_seconds();
      if (const char* error = cpu::run(call, &relation, one, instruction_set)) {
        std::fprintf(stderr, "%s\n", error);
        return 1;
      }
      times.push_back(thread_seconds() - begin);
    }
    std::sort(times.begin(), times.end());
    double scale = 1e9 / (static_cast<double>(B) * A * S * S);
    std::printf("%s %.6f %.6f %.9g\n", arguments[k], times[0] * scale, times[times.size() / 2] * scale, value);
  }
}
