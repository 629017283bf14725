// What the decoder (virtual_gpu/decode.py) hands over: instructions, and how to run them.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numbers.hpp"

// Operations that touch registers alone come first: see FIRST_OTHER.
#define OPERATIONS(X) \
  X(MOV32) X(MOV64) X(PACK16) X(UNPACK16) X(PACK32) X(UNPACK32) \
  X(ADD_F32) X(SUB_F32) X(MUL_F32) X(DIV_F32) X(FMA_F32) X(NEG_F32) X(ABS_F32) \
  X(MAX_F32) X(MIN_F32) X(MAXNAN_F32) X(MINNAN_F32) \
  X(EX2_F32) X(EX2FTZ_F32) X(RSQRTFTZ_F32) X(SQRTFTZ_F32) X(SQRT_F32) \
  X(ADD_F32X2) X(SUB_F32X2) X(MUL_F32X2) X(FMA_F32X2) X(ABS_BF16) X(MAX_BF16) \
  X(ADD_32) X(SUB_32) X(MULLO_32) X(MADLO_32) X(MULHI_S32) X(MULHI_U32) \
  X(DIV_S32) X(REM_S32) X(DIV_U32) X(REM_U32) X(MIN_S32) X(MAX_S32) X(MIN_U32) X(MAX_U32) \
  X(AND_32) X(OR_32) X(XOR_32) X(NOT_32) X(NEG_32) X(SHL_32) X(SHR_U32) X(SHR_S32) X(SHL_16) \
  X(BFE_U32) X(BFE_S32) X(PRMT) \
  X(ADD_64) X(SUB_64) X(MULLO_64) X(MADLO_64) X(AND_64) X(OR_64) X(XOR_64) \
  X(SHL_64) X(SHR_U64) X(SHR_S64) X(MULW_S32) X(MULW_U32) X(MADW_S32) X(MADW_U32) \
  X(CVT_S64_S32) X(CVT_U64_U32) X(CVT_U32_U64) X(CVT_U16_U32) X(CVT_U32_U16) X(CVT_S32_S16) \
  X(CVT_F32_S32) X(CVT_F32_U32) X(CVT_S32_F32) X(CVT_F32_BF16) X(CVT_F32_F16) \
  X(CVT_BF16_F32) X(CVT_F16_F32) X(CVT_F16_F32_RZ) X(CVT_BF16X2_F32) X(CVT_F16X2_F32) \
  X(CVT_E4M3X2_F32) X(CVT_E4M3X2_F16X2) \
  X(SETP_EQ_S32) X(SETP_NE_S32) X(SETP_LT_S32) X(SETP_LE_S32) X(SETP_GT_S32) X(SETP_GE_S32) \
  X(SETP_LT_U32) X(SETP_LE_U32) X(SETP_GT_U32) X(SETP_GE_U32) \
  X(SETP_EQ_S64) X(SETP_NE_S64) X(SETP_LT_S64) X(SETP_LE_S64) X(SETP_GT_S64) X(SETP_GE_S64) \
  X(SETP_LT_U64) X(SETP_LE_U64) X(SETP_GT_U64) X(SETP_GE_U64) \
  X(SETP_EQ_F32) X(SETP_NE_F32) X(SETP_LT_F32) X(SETP_LE_F32) X(SETP_GT_F32) X(SETP_GE_F32) \
  X(SETP_EQU_F32) X(SETP_NEU_F32) X(SETP_LTU_F32) X(SETP_LEU_F32) X(SETP_GTU_F32) \
  X(SETP_GEU_F32) X(SETP_NAN_F32) X(SETP_NUM_F32) \
  X(SELP32) X(SELP64) X(PMOV) X(PAND) X(POR) X(PXOR) X(PNOT) \
  X(REDUX_MAX_S32) X(SHFL_BFLY) X(SHFL_IDX) \
  X(SREG) X(LDP32) X(LDP64) X(LDP64_S32) X(LDP64_U32) X(BRA) X(RET) X(BAR) \
  X(LDG) X(STG) X(LDS) X(STS) X(CPASYNC) X(CPCOMMIT) X(CPWAIT) X(LDMATRIX) X(STMATRIX) \
  X(MMA) X(WGMMA) X(WGFENCE) X(WGCOMMIT) X(WGWAIT) X(FENCEASYNC)

enum Operation {
#define X(name) name,
  OPERATIONS(X)
#undef X
  OPERATION_COUNT
};
inline const char *const OPERATION_NAMES[] = {
#define X(name) #name,
    OPERATIONS(X)
#undef X
};
constexpr int FIRST_OTHER = SREG;

constexpr int LANES = 32;
constexpr u32 SHARED_BASE = 1024;  // not 0, lest offsets pass for addresses

// Findings that do not stop a launch. virtual_gpu/machine.py says which of them are mistakes.
#define FINDINGS(X) \
  X(UNWRITTEN, "reads shared memory that nobody wrote") \
  X(SAME_WRITTEN, \
    "writes what another warp wrote or read with no barrier between: the value that is there") \
  X(OTHER_LANE, "a lane reads what another lane of its warp wrote, with no barrier between") \
  X(COPY_UNFENCED, "wgmma reads what cp.async wrote, with no fence.proxy.async between") \
  X(STORE_UNFENCED, "wgmma reads what st.shared wrote, with no fence.proxy.async between") \
  X(EARLY_ACCUMULATOR, "touches the accumulator of a wgmma that was not waited for") \
  X(EARLY_FRAGMENT, "overwrites an operand of a wgmma that was not waited for") \
  X(UNFENCED_REGISTER, "wgmma takes a register that was written after the last wgmma.fence") \
  X(COPY_LEFT, "ends while cp.async is under way") \
  X(PRODUCT_LEFT, "ends while wgmma is under way")

enum Finding {
#define X(name, text) name,
  FINDINGS(X)
#undef X
  FINDING_COUNT
};
inline const char *const FINDING_NAMES[] = {
#define X(name, text) #name,
    FINDINGS(X)
#undef X
};
inline const char *const FINDING_TEXTS[] = {
#define X(name, text) text,
    FINDINGS(X)
#undef X
};

// A place in the register file is an index of 32-bit words; a register has one a lane, or two.
struct Instruction {
  s32 operation;
  s32 guard;  // 0, or 1 + the place of a predicate, negative where it is negated
  s32 first;  // of its operands
  s32 count;
  s32 line;  // of the PTX text
};

struct Program {
  std::string name;
  std::vector<u8> image;  // the machine code that it stands for
  std::vector<Instruction> code;
  std::vector<s32> operands;
  std::vector<std::pair<s32, u32>> constants32;  // place, bits
  std::vector<std::pair<s32, u64>> constants64;
  std::vector<std::pair<s32, s32>> parameters;  // offset, bytes
  s32 parameter_bytes = 0, words = 0, threads = 0;
  s32 shared_bytes = 0, most_shared_bytes = 48 * 1024;
  std::vector<u64> findings[FINDING_COUNT];  // how often, by instruction
};

enum Order { ASCENDING, DESCENDING, DRAWN };
enum Flag { LATE_COPIES = 1, LATE_PRODUCTS = 2, RACES = 4 };

struct Mode {
  int flags = LATE_COPIES | LATE_PRODUCTS | RACES;
  int warps = ASCENDING;  // DRAWN: another warp after 1 to 40 instructions
  int blocks = ASCENDING;
  u32 poison = 0xFFFFFFFFu;  // what is in everything that nobody wrote
  u64 seed = 1;
};

struct Fault : std::runtime_error { using runtime_error::runtime_error; };

inline std::string text(const char *form, ...) {
  char buffer[600];
  va_list list;
  va_start(list, form);
  vsnprintf(buffer, sizeof buffer, form, list);
  va_end(list);
  return buffer;
}
