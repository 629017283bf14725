// What each instruction does to the registers of a warp: 32 lanes at a time.
#pragma once
#include "wgmma.hpp"

// Lanes do not depend on each other: a result may take the place of an operand, lane by lane.
#if defined(__clang__)
#define EACH_LANE _Pragma("clang loop vectorize(assume_safety)") for (int l = 0; l < LANES; l++)
#else
#define EACH_LANE _Pragma("GCC ivdep") for (int l = 0; l < LANES; l++)
#endif

template <typename T>
T* at(u32* file, s32 place) {
  return reinterpret_cast<T*>(file + place);
}

template <typename D, typename A, typename F>
void unary(u32* file, const s32* o, F f) {
  D* d = at<D>(file, o[0]);
  const A* a = at<A>(file, o[1]);
  EACH_LANE d[l] = f(a[l]);
}
template <typename D, typename A, typename B, typename F>
void binary(u32* file, const s32* o, F f) {
  D* d = at<D>(file, o[0]);
  const A* a = at<A>(file, o[1]);
  const B* b = at<B>(file, o[2]);
  EACH_LANE d[l] = f(a[l], b[l]);
}
template <typename D, typename A, typename C, typename F>
void ternary(u32* file, const s32* o, F f) {
  D* d = at<D>(file, o[0]);
  const A *a = at<A>(file, o[1]), *b = at<A>(file, o[2]);
  const C* c = at<C>(file, o[3]);
  EACH_LANE d[l] = f(a[l], b[l], c[l]);
}
template <typename A, typename F>
void compare(u32* file, const s32* o, F f) {
  const A *a = at<A>(file, o[1]), *b = at<A>(file, o[2]);
  u32 mask = 0;
  for (int l = 0; l < LANES; l++) mask |= (u32)f(a[l], b[l]) << l;
  file[o[0]] = mask;
}
template <typename F>
void pairs(u32* file, const s32* o, int count, F f) {  // f32x2
  float* d = at<float>(file, o[0]);
  const float *a = at<float>(file, o[1]), *b = at<float>(file, o[2]),
              *c = at<float>(file, o[count - 1]);
  for (int i = 0; i < 2 * LANES; i++) d[i] = f(a[i], b[i], c[i]);
}

inline u32 extracted(u32 x, u32 position, u32 length, bool is_signed) {
  position &= 255;
  length &= 255;
  u32 sign = is_signed && length ? x >> std::min(position + length - 1, 31u) & 1 : 0, out = 0;
  for (u32 i = 0; i < 32; i++)
    out |= (i < length && position + i < 32 ? x >> (position + i) & 1 : sign) << i;
  return out;
}
inline u32 permuted(u32 a, u32 b, u32 selectors) {
  u64 both = a | (u64)b << 32;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> (4 * i) & 15, byte = (u32)(both >> (8 * (selector & 7))) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
inline s32 to_s32(float x) {
  return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : (s32)x;
}

#define UNARY(name, D, A, value) \
  case name: unary<D, A>(file, o, [](A x) -> D { return value; }); break;
#define BINARY(name, D, A, value) \
  case name: binary<D, A, A>(file, o, [](A x, A y) -> D { return value; }); break;
#define SHIFT(name, D, A, value) \
  case name: binary<D, A, u32>(file, o, [](A x, u32 y) -> D { return value; }); break;
#define TERNARY(name, D, A, C, value) \
  case name: ternary<D, A, C>(file, o, [](A x, A y, C z) -> D { return value; }); break;
#define COMPARE(name, A, value) \
  case name: compare<A>(file, o, [](A x, A y) { return value; }); break;
#define PAIRS(name, count, value) \
  case name: \
    pairs(file, o, count, [](float x, float y, float z) { \
      (void)z; \
      return value; \
    }); \
    break;

inline void Block::calculate(Warp&, const Instruction& instruction, const s32* o, u32* file) {
  switch (instruction.operation) {
    UNARY(MOV32, u32, u32, x)
    UNARY(MOV64, u64, u64, x)
    BINARY(PACK16, u32, u32, (x & 0xFFFF) | y << 16)
    BINARY(PACK32, u64, u32, x | (u64)y << 32)
    case UNPACK16: {
      u32 whole[LANES];
      memcpy(whole, file + o[2], sizeof whole);
      if (o[0] >= 0) EACH_LANE file[o[0] + l] = whole[l] & 0xFFFF;
      if (o[1] >= 0) EACH_LANE file[o[1] + l] = whole[l] >> 16;
      break;
    }
    case UNPACK32: {
      const u64* whole = at<u64>(file, o[2]);
      if (o[0] >= 0) EACH_LANE file[o[0] + l] = (u32)whole[l];
      if (o[1] >= 0) EACH_LANE file[o[1] + l] = (u32)(whole[l] >> 32);
      break;
    }
      BINARY(ADD_F32, float, float, x + y)
      BINARY(SUB_F32, float, float, x - y)
      BINARY(MUL_F32, float, float, x* y)
      BINARY(DIV_F32, float, float, x / y)
      TERNARY(FMA_F32, float, float, float, __builtin_fmaf(x, y, z))
      UNARY(NEG_F32, float, float, -x)
      UNARY(ABS_F32, float, float, std::fabs(x))
      BINARY(MAX_F32, float, float, larger(x, y))
      BINARY(MIN_F32, float, float, smaller(x, y))
      BINARY(MAXNAN_F32, float, float, x != x || y != y ? NAN : larger(x, y))
      BINARY(MINNAN_F32, float, float, x != x || y != y ? NAN : smaller(x, y))
      UNARY(EX2_F32, float, float, std::exp2(x))
      UNARY(EX2FTZ_F32, float, float, flushed(std::exp2(flushed(x))))
      UNARY(RSQRTFTZ_F32, float, float, (float)(1 / std::sqrt((double)flushed(x))))
      UNARY(SQRTFTZ_F32, float, float, std::sqrt(flushed(x)))
      UNARY(SQRT_F32, float, float, std::sqrt(x))
      PAIRS(ADD_F32X2, 3, x + y)
      PAIRS(SUB_F32X2, 3, x - y)
      PAIRS(MUL_F32X2, 3, x * y)
      PAIRS(FMA_F32X2, 4, __builtin_fmaf(x, y, z))
      UNARY(ABS_BF16, u32, u32, x & 0x7FFF)
      BINARY(MAX_BF16, u32, u32, as_bits(larger(as_float(x << 16), as_float(y << 16))) >> 16)
      BINARY(ADD_32, u32, u32, x + y)
      BINARY(SUB_32, u32, u32, x - y)
      BINARY(MULLO_32, u32, u32, x * y)
      TERNARY(MADLO_32, u32, u32, u32, x * y + z)
      BINARY(MULHI_S32, s32, s32, (s32)((s64)x * y >> 32))
      BINARY(MULHI_U32, u32, u32, (u32)((u64)x * y >> 32))
      BINARY(DIV_S32, s32, s32, y == 0 ? -1 : y == -1 ? (s32)(0 - (u32)x) : x / y)
      BINARY(REM_S32, s32, s32, y == 0 ? x : y == -1 ? 0 : x % y)
      BINARY(DIV_U32, u32, u32, y == 0 ? ~0u : x / y)
      BINARY(REM_U32, u32, u32, y == 0 ? x : x % y)
      BINARY(MIN_S32, s32, s32, x < y ? x : y)
      BINARY(MAX_S32, s32, s32, x > y ? x : y)
      BINARY(MIN_U32, u32, u32, x < y ? x : y)
      BINARY(MAX_U32, u32, u32, x > y ? x : y)
      BINARY(AND_32, u32, u32, x & y)
      BINARY(OR_32, u32, u32, x | y)
      BINARY(XOR_32, u32, u32, x ^ y)
      UNARY(NOT_32, u32, u32, ~x)
      UNARY(NEG_32, u32, u32, 0 - x)
      BINARY(SHL_32, u32, u32, y > 31 ? 0 : x << y)
      BINARY(SHR_U32, u32, u32, y > 31 ? 0 : x >> y)
      BINARY(SHR_S32, u32, u32, (u32)((s32)x >> (y > 31 ? 31 : y)))
      BINARY(SHL_16, u32, u32, y > 15 ? 0 : (x << y) & 0xFFFF)
      TERNARY(BFE_U32, u32, u32, u32, extracted(x, y, z, false))
      TERNARY(BFE_S32, u32, u32, u32, extracted(x, y, z, true))
      TERNARY(PRMT, u32, u32, u32, permuted(x, y, z))
      BINARY(ADD_64, u64, u64, x + y)
      BINARY(SUB_64, u64, u64, x - y)
      BINARY(MULLO_64, u64, u64, x * y)
      TERNARY(MADLO_64, u64, u64, u64, x * y + z)
      BINARY(AND_64, u64, u64, x & y)
      BINARY(OR_64, u64, u64, x | y)
      BINARY(XOR_64, u64, u64, x ^ y)
      SHIFT(SHL_64, u64, u64, y > 63 ? 0 : x << y)
      SHIFT(SHR_U64, u64, u64, y > 63 ? 0 : x >> y)
      SHIFT(SHR_S64, u64, u64, (u64)((s64)x >> (y > 63 ? 63 : y)))
      BINARY(MULW_S32, s64, s32, (s64)x * y)
      BINARY(MULW_U32, u64, u32, (u64)x * y)
      TERNARY(MADW_S32, u64, s32, u64, (u64)((s64)x * y) + z)
      TERNARY(MADW_U32, u64, u32, u64, (u64)x * y + z)
      UNARY(CVT_S64_S32, s64, s32, x)
      UNARY(CVT_U64_U32, u64, u32, x)
      UNARY(CVT_U32_U64, u32, u64, (u32)x)
      UNARY(CVT_U16_U32, u32, u32, x & 0xFFFF)
      UNARY(CVT_U32_U16, u32, u32, x & 0xFFFF)
      UNARY(CVT_S32_S16, s32, u32, (s32)(int16_t)x)
      UNARY(CVT_F32_S32, float, s32, (float)x)
      UNARY(CVT_F32_U32, float, u32, (float)x)
      UNARY(CVT_S32_F32, s32, float, to_s32(x))
      UNARY(CVT_F32_BF16, u32, u32, x << 16)
      UNARY(CVT_F32_F16, float, u32, from_half(x & 0xFFFF))
      UNARY(CVT_BF16_F32, u32, float, to_brain(x))
      UNARY(CVT_F16_F32, u32, float, to_half(x))
      UNARY(CVT_F16_F32_RZ, u32, float, to_half_toward_zero(x))
      BINARY(CVT_BF16X2_F32, u32, float, to_brain(x) << 16 | to_brain(y))
      BINARY(CVT_F16X2_F32, u32, float, to_half(x) << 16 | to_half(y))
      BINARY(CVT_E4M3X2_F32, u32, float, to_e4m3(x) << 8 | to_e4m3(y))
      UNARY(CVT_E4M3X2_F16X2, u32, u32,
            to_e4m3(from_half(x >> 16)) << 8 | to_e4m3(from_half(x & 0xFFFF)))
      COMPARE(SETP_EQ_S32, s32, x == y)
      COMPARE(SETP_NE_S32, s32, x != y)
      COMPARE(SETP_LT_S32, s32, x < y)
      COMPARE(SETP_LE_S32, s32, x <= y)
      COMPARE(SETP_GT_S32, s32, x > y)
      COMPARE(SETP_GE_S32, s32, x >= y)
      COMPARE(SETP_LT_U32, u32, x < y)
      COMPARE(SETP_LE_U32, u32, x <= y)
      COMPARE(SETP_GT_U32, u32, x > y)
      COMPARE(SETP_GE_U32, u32, x >= y)
      COMPARE(SETP_EQ_S64, s64, x == y)
      COMPARE(SETP_NE_S64, s64, x != y)
      COMPARE(SETP_LT_S64, s64, x < y)
      COMPARE(SETP_LE_S64, s64, x <= y)
      COMPARE(SETP_GT_S64, s64, x > y)
      COMPARE(SETP_GE_S64, s64, x >= y)
      COMPARE(SETP_LT_U64, u64, x < y)
      COMPARE(SETP_LE_U64, u64, x <= y)
      COMPARE(SETP_GT_U64, u64, x > y)
      COMPARE(SETP_GE_U64, u64, x >= y)
      COMPARE(SETP_EQ_F32, float, x == y)
      COMPARE(SETP_NE_F32, float, x<y || x> y)
      COMPARE(SETP_LT_F32, float, x < y)
      COMPARE(SETP_LE_F32, float, x <= y)
      COMPARE(SETP_GT_F32, float, x > y)
      COMPARE(SETP_GE_F32, float, x >= y)
      COMPARE(SETP_EQU_F32, float, !(x < y || x > y))
      COMPARE(SETP_NEU_F32, float, x != y)
      COMPARE(SETP_LTU_F32, float, !(x >= y))
      COMPARE(SETP_LEU_F32, float, !(x > y))
      COMPARE(SETP_GTU_F32, float, !(x <= y))
      COMPARE(SETP_GEU_F32, float, !(x < y))
      COMPARE(SETP_NAN_F32, float, x != x || y != y)
      COMPARE(SETP_NUM_F32, float, x == x && y == y)
    case SELP32: {
      const u32 *x = file + o[1], *y = file + o[2], chosen = file[o[3]];
      u32* d = file + o[0];
      EACH_LANE d[l] = chosen >> l & 1 ? x[l] : y[l];
      break;
    }
    case SELP64: {
      const u64 *x = at<u64>(file, o[1]), *y = at<u64>(file, o[2]);
      u64* d = at<u64>(file, o[0]);
      u32 chosen = file[o[3]];
      EACH_LANE d[l] = chosen >> l & 1 ? x[l] : y[l];
      break;
    }
    case PMOV: file[o[0]] = file[o[1]]; break;
    case PAND: file[o[0]] = file[o[1]] & file[o[2]]; break;
    case POR: file[o[0]] = file[o[1]] | file[o[2]]; break;
    case PXOR: file[o[0]] = file[o[1]] ^ file[o[2]]; break;
    case PNOT: file[o[0]] = ~file[o[1]]; break;
    case REDUX_MAX_S32: {
      s32 most = INT32_MIN;
      for (int l = 0; l < LANES; l++) {
        if (file[o[2] + l] != ~0u) throw Fault("redux by a part of a warp");
        most = std::max(most, (s32)file[o[1] + l]);
      }
      EACH_LANE file[o[0] + l] = (u32)most;
      break;
    }
    case SHFL_BFLY:
    case SHFL_IDX: {
      u32 out[LANES];
      for (u32 l = 0; l < LANES; l++) {
        if (file[o[4] + l] != ~0u) throw Fault("shfl by a part of a warp");
        u32 lane = file[o[2] + l] & 31, clamp = file[o[3] + l] & 31,
            segment = file[o[3] + l] >> 8 & 31;
        u32 most = (l & segment) | (clamp & ~segment);
        u32 from =
            instruction.operation == SHFL_BFLY ? l ^ lane : (l & segment) | (lane & ~segment);
        out[l] = file[o[1] + (from > most ? l : from)];
      }
      memcpy(file + o[0], out, sizeof out);
      break;
    }
    default: throw Fault(text("operation %d is not known", instruction.operation));
  }
}
