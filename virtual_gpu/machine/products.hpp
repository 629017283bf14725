// Matrix products: fragments in registers, tiles in shared memory, and their sums.
// Sources: PTX ISA 9.7.14 and 9.7.15; layouts of tiles as CUTLASS's make_gmma_desc builds them.
#pragma once
#include "program.hpp"

enum Kind { S8, F8, BF16 };  // of both operands
enum Sum { SUM_S32, SUM_F32, SUM_F16 };

typedef u8 Row[32];  // the bytes of k that one instruction multiplies

// Sums of 16 rows of A with n rows of B (columns of the product). `use(row, column, sum)` is given
// FP64, in which sums of INT8 and of E4M3 are exact.
template <typename Use>
void multiply(int kind, const Row* a, const Row* b, int n, Use&& use) {
  if (kind == S8) {
    alignas(64) int16_t left[16][32], right[32];
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 32; k++) left[r][k] = (int8_t)a[r][k];
    for (int column = 0; column < n; column++) {
      for (int k = 0; k < 32; k++) right[k] = (int8_t)b[column][k];
      for (int r = 0; r < 16; r++) {
        s32 sum = 0;
        for (int k = 0; k < 32; k++) sum += (s32)left[r][k] * right[k];
        use(r, column, (double)sum);
      }
    }
    return;
  }
  auto brain = [](const u8* pair) { return as_float((u32)(pair[0] | pair[1] << 8) << 16); };
  int depth = kind == F8 ? 32 : 16;
  alignas(64) double left[32][16];
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < depth; k++)
      left[k][r] = kind == F8 ? E4M3.of[a[r][k]] : brain(a[r] + 2 * k);
  for (int column = 0; column < n; column++) {
    alignas(64) double sums[16] = {};
    for (int k = 0; k < depth; k++) {
      double right = kind == F8 ? E4M3.of[b[column][k]] : brain(b[column] + 2 * k);
      for (int r = 0; r < 16; r++) sums[r] += left[k][r] * right;
    }
    for (int r = 0; r < 16; r++) use(r, column, sums[r]);
  }
}

// Fragments of A (4 registers) and of B (2) become rows.
inline void gather(const u32* file, const s32* places, Row* rows, bool is_a) {
  for (int lane = 0; lane < LANES; lane++) {
    int group = lane >> 2, byte = 4 * (lane & 3);
    const u32* at = file + lane;
    memcpy(rows[group] + byte, at + places[0], 4);
    if (is_a) {
      memcpy(rows[group + 8] + byte, at + places[1], 4);
      memcpy(rows[group] + 16 + byte, at + places[2], 4);
      memcpy(rows[group + 8] + 16 + byte, at + places[3], 4);
    } else memcpy(rows[group] + 16 + byte, at + places[1], 4);
  }
}

inline u32 sum_s32(u32 before, double sum, bool saturates) {
  s64 total = (s64)(s32)before + (s64)sum;
  if (saturates) total = total > INT32_MAX ? INT32_MAX : total < INT32_MIN ? INT32_MIN : total;
  return (u32)total;
}

// Where lane and place of an accumulator of 16 rows and 8 columns hold (row, column).
inline int lane_of(int row, int column) { return (row & 7) * 4 + (column & 7) / 2; }
inline int place_of(int row, int column) { return column / 8 * 4 + (row >> 3) * 2 + (column & 1); }

// mma.sync. Operands: kind, sum, saturates, scaled, d.., a.., b.., c..; and where scaled, for A and
// for B the place of the scales, which byte of it, and which thread of a group gives it.
inline void mma(u32* file, const s32* o) {
  int kind = o[0], form = o[1], registers = form == SUM_F16 ? 2 : 4;
  bool saturates = o[2], scaled = o[3];
  const s32 *d = o + 4, *a = d + registers, *b = a + 4, *c = b + 2, *scales = c + registers;
  alignas(64) Row left[16], right[8];
  gather(file, a, left, true);
  gather(file, b, right, false);
  auto power = [&](const s32* scale, int lane) {
    u32 exponent = file[scale[0] + lane] >> (8 * scale[1]) & 255;
    return exponent == 255 ? NAN : std::ldexp(1.0, (int)exponent - 127);
  };
  u32 out[4][LANES];
  multiply(kind, left, right, 8, [&](int row, int column, double sum) {
    int lane = lane_of(row, column), place = place_of(row, column);
    if (scaled)
      sum *= power(scales, (row & 7) * 4 + (row >> 3) + 2 * scales[2]) *
             power(scales + 3, 4 * column + scales[5]);
    if (form == SUM_S32) out[place][lane] = sum_s32(file[c[place] + lane], sum, saturates);
    else if (form == SUM_F32)
      out[place][lane] = as_bits((float)(as_float(file[c[place] + lane]) + sum));
    else
      out[place][lane] =
          to_half(from_half(file[c[row >> 3] + lane] >> (column & 1 ? 16 : 0) & 0xFFFF) + sum);
  });
  for (int r = 0; r < registers; r++)
    for (int lane = 0; lane < LANES; lane++)
      file[d[r] + lane] =
          form == SUM_F16 ? out[2 * r][lane] | out[2 * r + 1][lane] << 16 : out[r][lane];
}

// A matrix in shared memory, as a descriptor of wgmma tells: rows of 32 bytes of k.
struct Tile {
  u32 start, leading, stride;
  int width;   // bytes of a swizzled row, 16 where nothing is swizzled
  bool is_mn;  // rows lie side by side, and k below one another

  Tile(u64 descriptor, bool mn)
      : start((u32)(descriptor & 0x3FFF) << 4),
        leading((u32)(descriptor >> 16 & 0x3FFF) << 4),
        stride((u32)(descriptor >> 32 & 0x3FFF) << 4),
        is_mn(mn) {
    static const int WIDTHS[] = {16, 128, 64, 32};
    width = WIDTHS[descriptor >> 62];
  }
  u32 swizzled(u32 address) const { return address ^ (address >> 7 & (u32)(width / 16 - 1)) << 4; }
  // The address of 16 bytes of k of one row.
  u32 along_k(int row, int chunk) const {
    if (width == 16) return start + row % 8 * 16 + row / 8 * stride + chunk * leading;
    return swizzled(start + row % 8 * width + row / 8 * stride + chunk * 16);
  }
  // The address of 8 rows of one k, 2 bytes each.
  u32 along_rows(int row, int k) const {
    if (width == 16) return start + row / 8 * stride + k % 8 * 16 + k / 8 * leading;
    int side = width / 2;
    return swizzled(start + row % side / 8 * 16 + row / side * leading + k % 8 * width +
                    k / 8 * stride);
  }
  // `use(address, row, k or chunk)` for each 16 bytes of some rows.
  template <typename Use>
  void each(int first, int rows, Use&& use) const {
    if (is_mn)
      for (int k = 0; k < 16; k++)
        for (int r = 0; r < rows; r += 8) use(along_rows(first + r, k), r, k);
    else
      for (int r = 0; r < rows; r++)
        for (int chunk = 0; chunk < 2; chunk++) use(along_k(first + r, chunk), r, chunk);
  }
};
