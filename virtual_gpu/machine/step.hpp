// A warp's next instructions: jumps, memory, barriers and matrices; the rest is in
// instructions.hpp.
#pragma once
#include "instructions.hpp"

inline void Block::step(Warp& warp, u64 budget) {
  u32* file = warp.file.data();
  warp_now = warp.id;
  while (budget-- && !warp.is_done && !warp.waits) {
    now = warp.at++;
    lane_now = -1;
    executed++;
    const Instruction& instruction = program.code[now];
    const s32* o = program.operands.data() + instruction.first;
    if (warp.under_way) meet(warp, instruction, o);
    if (has_products && watched)
      each_register(instruction, o, [&](s32 at, bool is_written) {
        if (is_written) warp.touched[at / 16] = 1 + warp.register_fences;
      });
    if (instruction.operation < FIRST_OTHER) {
      calculate(warp, instruction, o, file);
      continue;
    }
    u32 mask = ~0u;
    if (instruction.guard > 0) mask = file[instruction.guard - 1];
    else if (instruction.guard < 0) mask = ~file[-instruction.guard - 1];
    other(warp, instruction, o, file, mask);
  }
}

inline void Block::other(Warp& warp, const Instruction& instruction, const s32* o, u32* file,
                         u32 mask) {
  auto fill32 = [&](u32 value) { std::fill_n(file + o[0], LANES, value); };
  auto fill64 = [&](u64 value) { std::fill_n(at<u64>(file, o[0]), LANES, value); };
  s32 parameter32 = 0;
  if (instruction.operation == LDP32 || instruction.operation == LDP64_S32 ||
      instruction.operation == LDP64_U32)
    memcpy(&parameter32, arguments + o[1], 4);
  switch (instruction.operation) {
    case SREG:
      for (int l = 0; l < LANES; l++) {
        u32 values[] = {
            (u32)(warp.id * LANES + l), place[0], place[1], place[2], grid[0], grid[1], grid[2],
            (u32)program.threads,       (u32)l};
        file[o[0] + l] = values[o[1]];
      }
      break;
    case LDP32: fill32((u32)parameter32); break;
    case LDP64: {
      u64 value;
      memcpy(&value, arguments + o[1], 8);
      fill64(value);
      break;
    }
    case LDP64_S32: fill64((u64)(s64)parameter32); break;
    case LDP64_U32: fill64((u32)parameter32); break;
    case BRA:
      if (mask == ~0u) warp.at = o[0];
      else if (mask) throw Fault(text("the warp diverges: lanes %#x jump", mask));
      break;
    case RET: leave(warp); break;
    case BAR: warp.waits = true; break;
    case LDG:
    case LDS: load(warp, instruction.operation == LDG, o, mask); break;
    case STG:
    case STS: store(warp, instruction.operation == STG, o, mask); break;
    case CPASYNC:  // to, offset, from, offset, size, bytes or -1
      for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        lane_now = l;
        uintptr_t from = at<u64>(file, o[2])[l] + (s64)o[3];
        copy(warp, file[o[0] + l] + (u32)o[1], from, o[4], o[5] < 0 ? o[4] : (s32)file[o[5] + l]);
      }
      break;
    case CPCOMMIT:
      warp.copy_groups.push_back(std::move(warp.copies));
      warp.copies.clear();
      break;
    case CPWAIT: wait_copies(warp, o[0]); break;
    case LDMATRIX: load_matrix(warp, o); break;
    case STMATRIX: store_matrix(warp, o); break;
    case MMA: mma(file, o); break;
    case WGMMA: issue(warp, now); break;
    case WGFENCE: warp.register_fences++; break;
    case WGCOMMIT:
      warp.product_groups.push_back(std::move(warp.products));
      warp.products.clear();
      break;
    case WGWAIT: wait_products(warp, o[0]); break;
    case FENCEASYNC:
      warp.fences++;
      warp.fence_epoch = warp.epoch;
      break;
    default: throw Fault(text("operation %d is not known", instruction.operation));
  }
}

inline void Block::leave(Warp& warp) {
  bool copies = !warp.copies.empty();
  for (auto& group : warp.copy_groups) copies |= !group.empty();
  if (copies) find(COPY_LEFT);
  if (warp.under_way) find(PRODUCT_LEFT);
  warp.is_done = true;
}

// Operands: size, count, address, offset, registers..
inline void Block::load(Warp& warp, bool is_global, const s32* o, u32 mask) {
  u32* file = warp.file.data();
  int size = o[0], count = o[1];
  uintptr_t addresses[LANES];  // a register of the address may be one of the results
  for (int l = 0; l < LANES; l++)
    addresses[l] = is_global ? at<u64>(file, o[2])[l] + (s64)o[3] : file[o[2] + l] + (u32)o[3];
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    lane_now = l;
    const u8* from = is_global ? global.at(addresses[l], size * count, false, number, watched)
                               : read_shared(warp, (u32)addresses[l], size * count, false);
    for (int i = 0; i < count; i++, from += size) {
      if (size == 8) memcpy(at<u64>(file, o[4 + i]) + l, from, 8);
      else {
        u32 value = 0;
        memcpy(&value, from, size);
        file[o[4 + i] + l] = value;
      }
    }
  }
}

inline void Block::store(Warp& warp, bool is_global, const s32* o, u32 mask) {
  u32* file = warp.file.data();
  int size = o[0], count = o[1];
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    lane_now = l;
    u8 data[32];
    for (int i = 0; i < count; i++)
      memcpy(data + size * i,
             size == 8 ? (void*)(at<u64>(file, o[4 + i]) + l) : file + o[4 + i] + l, size);
    if (is_global)
      memcpy(global.at(at<u64>(file, o[2])[l] + (s64)o[3], size * count, true, number, watched),
             data, size * count);
    else write_shared(warp, file[o[2] + l] + (u32)o[3], size * count, data);
  }
}

// Operands: count, transposed, address, offset, registers.. Each matrix is 8 rows of 16 bytes,
// whose addresses 8 lanes give.
inline void Block::load_matrix(Warp& warp, const s32* o) {
  u32 *file = warp.file.data(), out[4][LANES];
  for (int m = 0; m < o[0]; m++) {
    uint16_t tile[8][8];
    for (int row = 0; row < 8; row++) {
      lane_now = 8 * m + row;
      memcpy(tile[row], read_shared(warp, file[o[2] + lane_now] + (u32)o[3], 16, true), 16);
    }
    for (int l = 0; l < LANES; l++) {
      int row = l >> 2, column = 2 * (l & 3);
      out[m][l] = o[1] ? tile[column][row] | (u32)tile[column + 1][row] << 16
                       : tile[row][column] | (u32)tile[row][column + 1] << 16;
    }
  }
  for (int m = 0; m < o[0]; m++) memcpy(file + o[4 + m], out[m], sizeof out[m]);
}

inline void Block::store_matrix(Warp& warp, const s32* o) {
  const u32* file = warp.file.data();
  for (int m = 0; m < o[0]; m++) {
    uint16_t tile[8][8];
    for (int l = 0; l < LANES; l++) {
      int row = l >> 2, column = 2 * (l & 3);
      u32 pair = file[o[4 + m] + l];
      (o[1] ? tile[column][row] : tile[row][column]) = (uint16_t)pair;
      (o[1] ? tile[column + 1][row] : tile[row][column + 1]) = (uint16_t)(pair >> 16);
    }
    for (int row = 0; row < 8; row++) {
      lane_now = 8 * m + row;
      write_shared(warp, file[o[2] + lane_now] + (u32)o[3], 16, tile[row]);
    }
  }
}
