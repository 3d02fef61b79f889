// 2^x for a vector of floats.
#pragma once

namespace {

// 2^x with a relative error of 2e-8 before rounding.
MINILM_INLINE F exp2_accurate(F x) {
  Split s = split(x);
  F p = fma(set1(kExp2C6), s.fraction, set1(kExp2C5));
  p = fma(p, s.fraction, set1(kExp2C4));
  p = fma(p, s.fraction, set1(kExp2C3));
  p = fma(p, s.fraction, set1(kExp2C2));
  p = fma(p, s.fraction, set1(kExp2C1));
  p = fma(p, s.fraction, set1(1.0f));
  return scale_by_power(p, s, x);
}

// 2^x by a polynomial of one degree less, with a relative error of 1.1e-7 before rounding.
MINILM_INLINE F exp2_fast(F x) {
  Split s = split(x);
  F p = fma(set1(1.32647272e-3f), s.fraction, set1(9.67151264e-3f));
  p = fma(p, s.fraction, set1(5.55073374e-2f));
  p = fma(p, s.fraction, set1(2.40222421e-1f));
  p = fma(p, s.fraction, set1(6.93146978e-1f));
  p = fma(p, s.fraction, set1(1.0f));
  return scale_by_power(p, s, x);
}

}  // namespace
