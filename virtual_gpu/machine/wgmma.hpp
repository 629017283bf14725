// wgmma: issued by a warp, done when it is waited for (or at once), and what must not be touched.
#pragma once
#include "block.hpp"

// Calls `use(place, is_written)` for each register of an instruction that is no wgmma.
template <typename Use>
void each_register(const Instruction& instruction, const s32* o, Use&& use) {
  int count = instruction.count;
  auto range = [&](int first, int end, bool is_written) {
    for (int i = first; i < end; i++)
      if (o[i] >= 0) use(o[i], is_written);
  };
  switch (instruction.operation) {
    case SREG:
    case LDP32:
    case LDP64:
    case LDP64_S32:
    case LDP64_U32: range(0, 1, true); break;
    case LDG:
    case LDS:
    case LDMATRIX:
      range(2, 3, false);
      range(4, count, true);
      break;
    case STG:
    case STS:
    case STMATRIX:
      range(2, 3, false);
      range(4, count, false);
      break;
    case CPASYNC:
      range(0, 1, false);
      range(2, 3, false);
      range(5, 6, false);
      break;
    case MMA: {
      int sums = o[1] == SUM_F16 ? 2 : 4;
      range(4, 4 + sums, true);
      range(4 + sums, 4 + sums + 6 + sums, false);
      break;
    }
    default:
      if (instruction.operation >= FIRST_OTHER) break;
      int written = instruction.operation == UNPACK16 || instruction.operation == UNPACK32 ? 2 : 1;
      range(0, written, true);
      range(written, count, false);
  }
}

inline void Block::load_rows(const Tile& tile, int first, int rows, Row* to) {
  tile.each(first, rows, [&](u32 address, int row, int k) {
    const u8* from = shared.bytes.data() + shared.offset(address, 16, "wgmma's read");
    if (!tile.is_mn) memcpy(to[row] + 16 * k, from, 16);
    else
      for (int i = 0; i < 8; i++) memcpy(to[row + i] + 2 * k, from + 2 * i, 2);
  });
}

inline void Block::watch_rows(Warp& warp, const Tile& tile, int first, int rows, int change) {
  tile.each(first, rows, [&](u32 address, int, int) {
    u32 offset = shared.offset(address, 16, "wgmma's read");
    for (u32 c = shared.first(offset); c < shared.end(offset, 16); c++) {
      Cell& cell = shared.cells[c];
      if (change > 0) {
        u32 fences = cell.write_warp < 0 ? 0 : warps[cell.write_warp].fences;
        find(shared.read(c, toucher(warp), true, true, fences, warp.fence_epoch));
      } else shared.mark_read(cell, toucher(warp));
      cell.products += change;
    }
  });
}

inline void Block::watch(Warp& warp, const Product& product, int change) {
  Wgmma w = form(product);
  if (!w.in_registers)
    watch_rows(warp, Tile(product.a, w.a_by_rows), 16 * (warp.id % 4), 16, change);
  watch_rows(warp, Tile(product.b, w.b_by_rows), 0, w.n, change);
}

inline void Block::hold(Warp& warp, const Product& product, bool is_held) {
  Wgmma w = form(product);
  if (w.in_registers)
    for (int i = 0; i < 4; i++) warp.busy[w.a[i] / 16] = is_held ? Warp::OPERAND : Warp::FREE;
  for (int i = 0; i < w.n / 2; i++)
    warp.busy[w.d[i] / 16] = is_held ? Warp::ACCUMULATOR : Warp::FREE;
}

inline void Block::issue(Warp& warp, int instruction) {
  Product product{instruction, 0, 0, false};
  Wgmma w = form(product);
  if (warps.size() % 4) throw Fault("wgmma needs whole warpgroups");
  const u32* file = warp.file.data();
  product.b = descriptor(warp, *w.b);
  if (!w.in_registers) product.a = descriptor(warp, *w.a);
  u32 adds = file[*w.adds];
  if (adds != 0 && adds != ~0u) throw Fault("scale-d differs between lanes");
  product.adds = adds;
  warp.issued.push_back((u64)instruction * 0x9E3779B97F4A7C15ull ^ product.a ^ product.b << 1);
  if (watched) {
    watch(warp, product, 1);
    // the accumulators of an earlier wgmma need no fence, all else that was touched does
    auto check = [&](s32 at) {
      if (!warp.busy[at / 16] && warp.touched[at / 16] == 1 + warp.register_fences)
        find(UNFENCED_REGISTER);
    };
    if (w.in_registers)
      for (int i = 0; i < 4; i++) check(w.a[i]);
    for (int i = 0; i < w.n / 2; i++) check(w.d[i]);
    if (!warp.register_fences) find(UNFENCED_REGISTER);
  }
  if (!(mode.flags & LATE_PRODUCTS)) execute(warp, product);
  warp.products.push_back(product);
  hold(warp, product, true);
  warp.under_way++;
}

inline void Block::execute(Warp& warp, const Product& product) {
  Wgmma w = form(product);
  u32* file = warp.file.data();
  alignas(64) Row a[16], b[256];
  if (w.in_registers) gather(file, w.a, a, true);
  else load_rows(Tile(product.a, w.a_by_rows), 16 * (warp.id % 4), 16, a);
  load_rows(Tile(product.b, w.b_by_rows), 0, w.n, b);
  multiply(w.kind, a, b, w.n, [&](int row, int column, double sum) {
    u32& cell = file[w.d[place_of(row, column)] + lane_of(row, column)];
    if (w.sum == SUM_S32) cell = sum_s32(product.adds ? cell : 0, sum, false);
    else cell = as_bits((float)((product.adds ? as_float(cell) : 0) + sum));
  });
}

inline void Block::wait_products(Warp& warp, size_t allowed) {
  for (; warp.product_groups.size() > allowed; warp.product_groups.pop_front())
    for (const Product& product : warp.product_groups.front()) {
      if (mode.flags & LATE_PRODUCTS) execute(warp, product);
      if (watched) watch(warp, product, -1);
      hold(warp, product, false);
      warp.under_way--;
    }
  // an accumulator may be that of several
  for (auto& group : warp.product_groups)
    for (const Product& product : group) hold(warp, product, true);
  for (const Product& product : warp.products) hold(warp, product, true);
}

// Another instruction meets a register of a wgmma that is under way: PTX does not say what happens.
// It is done as ptxas does it, which waits.
inline void Block::meet(Warp& warp, const Instruction& instruction, const s32* o) {
  int found = -1;
  each_register(instruction, o, [&](s32 at, bool is_written) {
    u8 busy = warp.busy[at / 16];
    if (busy == Warp::ACCUMULATOR) found = EARLY_ACCUMULATOR;
    else if (busy == Warp::OPERAND && is_written && found < 0) found = EARLY_FRAGMENT;
  });
  if (found < 0) return;
  find(found);
  warp.product_groups.push_back(std::move(warp.products));
  warp.products.clear();
  wait_products(warp, 0);
}
