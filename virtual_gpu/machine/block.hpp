// One block: its warps, the copies and products they have under way, and the order in which they
// run.
#pragma once
#include <algorithm>
#include <deque>

#include "memory.hpp"
#include "products.hpp"

struct Copy {  // one lane's part of a cp.async
  u32 to;      // offset
  uintptr_t from;
  s32 size, bytes, lane;  // the rest of `size` becomes zero
};

struct Product {  // a wgmma
  s32 instruction;
  u64 a, b;   // descriptors
  bool adds;  // scale-d
};

struct Warp {
  std::vector<u32> file;
  int id = 0, at = 0, epoch = 0;
  bool is_done = false, waits = false;
  std::vector<Copy> copies;                   // not yet committed
  std::deque<std::vector<Copy>> copy_groups;  // oldest first
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  u32 fences = 0;  // fence.proxy.async
  int fence_epoch = -1;
  enum : u8 { FREE, ACCUMULATOR, OPERAND };
  std::vector<u8> busy;  // by register, while a wgmma has it
  int under_way = 0;
  u32 register_fences = 0;  // wgmma.fence
  std::vector<u32>
      touched;  // by register: 1 + register_fences at its last use by another instruction
  std::vector<u64> issued;  // wgmma since the last barrier, as hashes
};

class Block {
 public:
  Block(Program& program, const u8* arguments, const u32* grid, GlobalMemory& global,
        const Mode& mode, u64& executed)
      : program(program), arguments(arguments), global(global), mode(mode), executed(executed) {
    memcpy(this->grid, grid, sizeof this->grid);
    watched = mode.flags & RACES;
    state = mode.seed * 0x9E3779B97F4A7C15ull + 1;
    for (const Instruction& i : program.code) {
      const s32* o = program.operands.data() + i.first;
      if (i.operation == LDS || i.operation == STS)
        shared.grain = std::min(shared.grain, (u32)(o[0] * o[1]));
      has_products |= i.operation == WGMMA;
    }
  }
  void run(u32 number);
  u32 draw(u32 n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (u32)((state >> 33) % n);
  }

 private:
  Program& program;
  const u8* arguments;
  GlobalMemory& global;
  const Mode& mode;
  u64& executed;
  SharedMemory shared;
  std::vector<Warp> warps;
  u32 grid[3], place[3] = {}, number = 0;
  bool watched, has_products = false;
  u64 state;
  int now = 0, warp_now = -1, lane_now = -1;  // for errors

  void begin();
  bool release();
  void step(Warp& warp, u64 budget);
  void calculate(Warp& warp, const Instruction& instruction, const s32* o, u32* file);
  void other(Warp& warp, const Instruction& instruction, const s32* o, u32* file, u32 mask);
  void load(Warp& warp, bool is_global, const s32* o, u32 mask);
  void store(Warp& warp, bool is_global, const s32* o, u32 mask);
  void load_matrix(Warp& warp, const s32* o);
  void store_matrix(Warp& warp, const s32* o);
  void leave(Warp& warp);

  void find(int finding) {
    if (finding < 0) return;
    auto& counts = program.findings[finding];
    if (counts.empty()) counts.assign(program.code.size(), 0);
    counts[now]++;
  }
  Toucher toucher(const Warp& warp) const { return {warp.id, warp.epoch, lane_now, warp.fences}; }

  // --- shared memory
  u8* read_shared(Warp& warp, u32 address, int size, bool converges) {
    u32 offset = shared.offset(address, size, "read");
    if (watched)
      for (u32 c = shared.first(offset); c < shared.end(offset, size); c++)
        find(shared.read(c, toucher(warp), false, converges, 0, 0));
    return shared.bytes.data() + offset;
  }
  void write_shared(Warp& warp, u32 address, int size, const void* data) {
    u32 offset = shared.offset(address, size, "write"), grain = shared.grain;
    u8* to = shared.bytes.data() + offset;
    if (watched)
      for (u32 c = shared.first(offset), i = 0; c < shared.end(offset, size); c++, i += grain) {
        find(shared.may_write(c, toucher(warp), !memcmp(to + i, (const u8*)data + i, grain)));
        shared.wrote(c, toucher(warp), false);
      }
    memcpy(to, data, size);
  }

  // --- cp.async: what is there is poison until the wait, or the copy is made at once
  void copy(Warp& warp, u32 address, uintptr_t from, s32 size, s32 bytes) {
    if (bytes < 0 || bytes > size) throw Fault(text("cp.async of %d bytes", bytes));
    u32 offset = shared.offset(address, size, "cp.async");
    Copy made{offset, from, size, bytes, lane_now};
    if (bytes) global.at(from, size, false, number, watched);
    if (watched)
      for (u32 c = shared.first(offset); c < shared.end(offset, size); c++) {
        find(shared.may_write(c, toucher(warp), false));
        shared.cells[c].copies++;
      }
    if (mode.flags & LATE_COPIES)
      for (int i = 0; i < size; i += 4) memcpy(shared.bytes.data() + offset + i, &mode.poison, 4);
    else perform(made);
    warp.copies.push_back(made);
  }
  void perform(const Copy& copy) {
    u8* to = shared.bytes.data() + copy.to;
    if (copy.bytes) memcpy(to, (const void*)copy.from, copy.bytes);
    memset(to + copy.bytes, 0, copy.size - copy.bytes);
  }
  void wait_copies(Warp& warp, size_t allowed) {
    for (; warp.copy_groups.size() > allowed; warp.copy_groups.pop_front())
      for (const Copy& copy : warp.copy_groups.front()) {
        if (mode.flags & LATE_COPIES) perform(copy);
        lane_now = copy.lane;
        if (watched)
          for (u32 c = shared.first(copy.to); c < shared.end(copy.to, copy.size); c++) {
            shared.cells[c].copies--;
            shared.wrote(c, toucher(warp), true);
          }
      }
  }

  // --- wgmma. Operands: kind, sum, n, A in registers, A and B by rows, scale-d, A (4 or 1), B, d..
  struct Wgmma {
    int kind, sum, n;
    bool in_registers, a_by_rows, b_by_rows;
    const s32 *adds, *a, *b, *d;
    explicit Wgmma(const s32* o)
        : kind(o[0]),
          sum(o[1]),
          n(o[2]),
          in_registers(o[3]),
          a_by_rows(o[4]),
          b_by_rows(o[5]),
          adds(o + 6),
          a(o + 7),
          b(a + (in_registers ? 4 : 1)),
          d(b + 1) {}
  };
  Wgmma form(const Product& p) const {
    return Wgmma(program.operands.data() + program.code[p.instruction].first);
  }
  void issue(Warp& warp, int instruction);
  void execute(Warp& warp, const Product& product);
  void load_rows(const Tile& tile, int first, int rows, Row* to);
  void watch_rows(Warp& warp, const Tile& tile, int first, int rows, int change);
  void watch(Warp& warp, const Product& product, int change);
  void hold(Warp& warp, const Product& product, bool is_held);
  void wait_products(Warp& warp, size_t allowed);
  void meet(Warp& warp, const Instruction& instruction, const s32* o);
  u64 descriptor(const Warp& warp, s32 at) const {
    u64 all[LANES];
    memcpy(all, warp.file.data() + at, sizeof all);
    for (u64 one : all)
      if (one != all[0]) throw Fault("a descriptor of wgmma differs between lanes");
    if (all[0] >> 49 & 7) throw Fault("a descriptor of wgmma has a base offset");
    return all[0];
  }
};

inline void Block::begin() {
  int count = program.threads / LANES;
  shared.begin(program.shared_bytes, mode.poison, watched);
  warps.resize(count);
  for (int n = 0; n < count; n++) {
    std::vector<u32> file = std::move(warps[n].file);
    file.assign(program.words, mode.poison);
    for (auto& [at, bits] : program.constants32) std::fill_n(file.begin() + at, LANES, bits);
    for (auto& [at, bits] : program.constants64)
      for (int l = 0; l < LANES; l++) memcpy(&file[at + 2 * l], &bits, 8);
    warps[n] = Warp();
    warps[n].file = std::move(file);
    warps[n].id = n;
    if (has_products) {
      warps[n].busy.assign(program.words / 16, Warp::FREE);
      warps[n].touched.assign(program.words / 16, 0);
    }
  }
}

// Lets the warps go on if all are at the barrier. Returns false when all have ended.
inline bool Block::release() {
  size_t live = 0, waiting = 0;
  for (Warp& warp : warps) {
    live += !warp.is_done;
    waiting += warp.waits;
  }
  if (waiting < live) return true;
  warp_now = lane_now = -1;
  if (live && live < warps.size())
    throw Fault("some warps have ended, and others wait for them at a barrier");
  for (size_t n = 0; n < warps.size(); n++) {
    if (warps[n].issued != warps[n / 4 * 4].issued) {
      warp_now = (int)n;
      throw Fault("the warps of a warpgroup issue different wgmma");
    }
    warps[n].waits = false;
    warps[n].epoch++;
  }
  for (Warp& warp : warps) warp.issued.clear();
  return live > 0;
}

inline void Block::run(u32 block) {
  number = block;
  place[0] = block % grid[0];
  place[1] = block / grid[0] % grid[1];
  place[2] = block / grid[0] / grid[1];
  begin();
  std::vector<int> order(warps.size());
  try {
    while (release()) {
      for (size_t n = 0; n < order.size(); n++)
        order[n] = (int)(mode.warps == DESCENDING ? order.size() - 1 - n : n);
      if (mode.warps == DRAWN)
        for (size_t n = order.size() - 1; n > 0; n--) std::swap(order[n], order[draw((u32)n + 1)]);
      for (int n : order)
        if (!warps[n].is_done && !warps[n].waits)
          step(warps[n], mode.warps == DRAWN ? 1 + draw(40) : ~0ull);
    }
  } catch (const Fault& fault) {
    throw Fault(
        text("%s, block (%u, %u, %u), warp %d, lane %d, PTX line %d: ", program.name.c_str(),
             place[0], place[1], place[2], warp_now, lane_now, program.code[now].line) +
        fault.what());
  }
}
