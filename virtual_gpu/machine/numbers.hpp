// Number formats: how FP32 becomes fewer bits and back. Every conversion rounds once, as PTX says.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;
typedef int64_t s64;

inline float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline u32 as_bits(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}

constexpr u32 HALF_NAN = 0x7FFF, BRAIN_NAN = 0x7FFF, E4M3_NAN = 0x7F;  // what PTX calls canonical

inline float from_half(u32 h) {
  u32 bits = (h & 0x7FFF) << 13, exponent = bits & 0x0F800000;
  float x;
  if (exponent == 0x0F800000) x = as_float(bits + (112u << 23) + (112u << 23));  // infinity, NaN
  else if (exponent == 0) x = as_float(bits + (113u << 23)) - as_float(113u << 23);  // subnormal
  else x = as_float(bits + (112u << 23));
  return h & 0x8000 ? -x : x;
}

// To nearest, ties to even, from as exact a number as there is.
inline u32 to_half(double x) {
  u32 sign = std::signbit(x) ? 0x8000 : 0;
  double size = std::fabs(x);
  if (size != size) return HALF_NAN;
  if (size >= 65520.0) return sign | 0x7C00;
  if (size < 0x1p-14) return sign | (u32)std::nearbyint(size * 0x1p24);
  u64 bits;
  memcpy(&bits, &size, 8);
  bits += (1ull << 41) - 1 + (bits >> 42 & 1);
  return sign | (u32)((bits >> 42) - ((1023 - 15) << 10));
}

// Toward zero: a finite value never becomes infinite.
inline u32 to_half_toward_zero(float x) {
  if (x != x) return HALF_NAN;
  u32 half = to_half(x);
  if ((half & 0x7FFF) == 0x7C00 && !std::isinf(x)) return (half & 0x8000) | 0x7BFF;
  return !std::isinf(x) && std::fabs(from_half(half)) > std::fabs(x) ? half - 1 : half;
}

inline u32 to_brain(float x) {
  u32 bits = as_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return BRAIN_NAN;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// To nearest even; what is too large becomes 448, and NaN stays NaN.
inline u32 to_e4m3(float x) {
  u32 sign = (as_bits(x) >> 31) << 7;
  float size = std::fabs(x);
  if (size != size) return E4M3_NAN;
  if (size >= 448.0f) return sign | 0x7E;
  if (size < 0x1p-6f) return sign | (u32)std::nearbyint(size * 512.0f);  // steps of 2^-9
  u32 bits = as_bits(size);
  bits += 0x7FFFF + (bits >> 20 & 1);
  u32 code = (bits >> 20) - ((127 - 7) << 3);
  return sign | (code > 0x7E ? 0x7E : code);
}

struct E4m3Table {
  float of[256];
  E4m3Table() {
    for (int code = 0; code < 256; code++) {
      int exponent = code >> 3 & 15, fraction = code & 7;
      double x = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
      if ((code & 127) == 127) x = NAN;
      of[code] = (float)(code & 128 ? -x : x);
    }
  }
};
inline const E4m3Table E4M3;

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Of a number and NaN the number; of zeros that with the sign that fits.
inline float larger(float x, float y) {
  return x != x ? y : y != y ? x : x > y ? x : y > x ? y : as_float(as_bits(x) & as_bits(y));
}
inline float smaller(float x, float y) {
  return x != x ? y : y != y ? x : x < y ? x : y < x ? y : as_float(as_bits(x) | as_bits(y));
}
