// Memory as a block sees it, and who touched which bytes of it since the last barrier.
#pragma once
#include <vector>

#include "program.hpp"

// A tensor that a launch was given. Where races are looked for, who touched each byte is kept:
// 0 nobody, n + 1 block n, and of readers MANY.
struct Range {
  uintptr_t begin, end;
  std::vector<u32> writer, reader;
};
constexpr u32 MANY = ~0u;

struct GlobalMemory {
  std::vector<Range> ranges;
  size_t last = 0;

  Range& range(uintptr_t address, int size, bool is_write) {
    auto holds = [&](const Range& r) { return address >= r.begin && address + size <= r.end; };
    if (last < ranges.size() && holds(ranges[last])) return ranges[last];
    for (last = 0; last < ranges.size(); last++)
      if (holds(ranges[last])) return ranges[last];
    std::string near;
    for (Range& r : ranges)
      if (address + 65536 >= r.begin && address < r.end + 65536)
        near += text(" [offset %lld of a tensor of %zu bytes]", (long long)(address - r.begin),
                     (size_t)(r.end - r.begin));
    throw Fault(text("%s of %d bytes at global %#zx, outside of the arguments",
                     is_write ? "write" : "read", size, (size_t)address) +
                near);
  }
  u8* at(uintptr_t address, int size, bool is_write, u32 block, bool watched) {
    if (address % size)
      throw Fault(text("global address %#zx is not a multiple of %d", (size_t)address, size));
    Range& r = range(address, size, is_write);
    if (watched) touch(r, address - r.begin, size, is_write, block + 1);
    return (u8*)address;
  }
  void touch(Range& r, size_t offset, int size, bool is_write, u32 me) {
    if (r.writer.empty()) {
      r.writer.assign(r.end - r.begin, 0);
      r.reader.assign(r.end - r.begin, 0);
    }
    for (size_t byte = offset; byte < offset + size; byte++) {
      u32 &writer = r.writer[byte], &reader = r.reader[byte];
      if (writer && writer != me) race(r, byte, is_write, text("block %u wrote it", writer - 1));
      if (!is_write) reader = reader && reader != me ? MANY : me;
      else if (reader && reader != me)
        race(r, byte, is_write,
             reader == MANY ? "several blocks read it" : text("block %u read it", reader - 1));
      else writer = me;
    }
  }
  [[noreturn]] void race(const Range& r, size_t byte, bool is_write, const std::string& other) {
    throw Fault(text("race between blocks: byte %zu of a tensor of %zu is %s, and ", byte,
                     (size_t)(r.end - r.begin), is_write ? "written" : "read") +
                other);
  }
};

// Who is about to touch shared memory. The epoch is the number of barriers that the warp has
// passed.
struct Toucher {
  int warp, epoch, lane;
  u32 fences;  // how many fence.proxy.async the warp has issued
};

struct Cell {  // what is known of a few bytes of shared memory
  s32 write_epoch = -1, read_epoch = -1;
  u32 read_warps = 0, write_fences = 0;
  int16_t write_warp = -1, copies = 0,
          products = 0;  // cp.async that may write it, wgmma that may read
  int8_t write_lane = -1;
  enum : u8 { NOBODY, STORE, COPY } written_by = NOBODY;
};

struct SharedMemory {
  std::vector<u8> bytes;
  std::vector<Cell> cells;
  u32 grain = 4;  // bytes that a cell is about

  void begin(size_t size, u32 poison, bool watched) {
    bytes.assign((size + 3) / 4 * 4, 0);
    for (size_t i = 0; i < bytes.size(); i += 4) memcpy(bytes.data() + i, &poison, 4);
    bytes.resize(size);
    if (watched) cells.assign(size / grain + 1, Cell());
  }
  u32 offset(u32 address, int size, const char* what) const {
    if (address % size)
      throw Fault(
          text("shared offset %d is not a multiple of %d", (s32)(address - SHARED_BASE), size));
    if (address < SHARED_BASE || (u64)address + size > SHARED_BASE + bytes.size())
      throw Fault(text("%s of %d bytes at shared offset %d, of %zu", what, size,
                       (s32)(address - SHARED_BASE), bytes.size()));
    return address - SHARED_BASE;
  }
  u32 first(u32 offset) const { return offset / grain; }
  u32 end(u32 offset, int size) const { return (offset + size) / grain; }

  // Each returns the finding there is, or -1. `is_async`: by wgmma, in the other proxy.
  int read(u32 at, const Toucher& who, bool is_async, bool converges, u32 fences_of_writer,
           int fence_epoch) {
    Cell& cell = cells[at];
    int found = -1;
    if (cell.copies)
      throw Fault(
          text("race: shared offset %u is read while cp.async may be writing it", at * grain));
    if (cell.write_epoch == who.epoch && cell.write_warp != who.warp)
      throw Fault(text("race: shared offset %u was written by warp %d, with no barrier between",
                       at * grain, cell.write_warp));
    if (cell.write_epoch < 0) found = UNWRITTEN;
    else if (is_async) {
      // fenced by the writer after it wrote, or by the reader after the barrier
      if (cell.written_by && fences_of_writer == cell.write_fences &&
          fence_epoch <= cell.write_epoch)
        found = cell.written_by == Cell::COPY ? COPY_UNFENCED : STORE_UNFENCED;
    } else if (!converges && cell.write_epoch == who.epoch && cell.write_lane != who.lane)
      found = OTHER_LANE;
    mark_read(cell, who);
    return found;
  }
  void mark_read(Cell& cell, const Toucher& who) {
    if (cell.read_epoch != who.epoch) {
      cell.read_epoch = who.epoch;
      cell.read_warps = 0;
    }
    cell.read_warps |= 1u << who.warp;
  }
  int may_write(u32 at, const Toucher& who, bool is_same) {
    Cell& cell = cells[at];
    if (cell.copies)
      throw Fault(
          text("race: shared offset %u is written while cp.async may be writing it", at * grain));
    if (cell.products)
      throw Fault(
          text("race: shared offset %u is written while wgmma may be reading it", at * grain));
    u32 others = cell.read_epoch == who.epoch ? cell.read_warps & ~(1u << who.warp) : 0;
    bool overwrites = cell.write_epoch == who.epoch && cell.write_warp != who.warp;
    if (!overwrites && !others) return -1;
    if (is_same) return SAME_WRITTEN;
    if (overwrites)
      throw Fault(text("race: shared offset %u was written by warp %d too, with no barrier between",
                       at * grain, cell.write_warp));
    throw Fault(
        text("race: shared offset %u is written, and warps %#x read it with no barrier between",
             at * grain, others));
  }
  void wrote(u32 at, const Toucher& who, bool by_copy) {
    Cell& cell = cells[at];
    cell.write_epoch = who.epoch;
    cell.write_warp = who.warp;
    cell.write_lane = who.lane;
    cell.write_fences = who.fences;
    cell.written_by = by_copy ? Cell::COPY : Cell::STORE;
  }
};
