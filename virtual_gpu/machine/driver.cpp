// The functions of libcuda that kernels/launch.py calls, and those by which virtual_gpu/machine.py
// gives programs, orders and ranges of memory. One thread at a time.
#include <memory>

#include "step.hpp"

static std::vector<std::unique_ptr<Program>> programs;
static GlobalMemory global_memory;
static Mode mode;
static std::vector<u32> only;  // the blocks to run, by number; all if empty
static std::string message;
static u64 executed = 0;

static void launch(Program& program, const u32* grid, u32 threads, u32 shared_bytes, void** given) {
  if ((s32)threads != program.threads)
    throw Fault(text("%s is launched with %u threads and has %d", program.name.c_str(), threads,
                     program.threads));
  if ((s32)shared_bytes > program.most_shared_bytes)
    throw Fault(text("%s is launched with %u bytes of shared memory, %d are allowed",
                     program.name.c_str(), shared_bytes, program.most_shared_bytes));
  program.shared_bytes = (s32)shared_bytes;
  std::vector<u8> arguments(program.parameter_bytes);
  for (size_t i = 0; i < program.parameters.size(); i++)
    memcpy(arguments.data() + program.parameters[i].first, given[i], program.parameters[i].second);
  Block block(program, arguments.data(), grid, global_memory, mode, executed);
  std::vector<u32> order(only);
  if (only.empty())
    for (u64 n = 0; n < (u64)grid[0] * grid[1] * grid[2]; n++) order.push_back((u32)n);
  if (mode.blocks == DESCENDING) std::reverse(order.begin(), order.end());
  if (mode.blocks == DRAWN)
    for (size_t n = order.size() - 1; n > 0; n--)
      std::swap(order[n], order[block.draw((u32)n + 1)]);
  for (u32 number : order) block.run(number);
}

extern "C" {
enum Result { OK = 0, NO_BINARY = 209, ILLEGAL_ADDRESS = 700 };

const char* vgpu_error() { return message.c_str(); }
u64 vgpu_executed() { return executed; }
int vgpu_operation(const char* name) {
  for (int i = 0; i < OPERATION_COUNT; i++)
    if (!strcmp(OPERATION_NAMES[i], name)) return i;
  return -1;
}
void vgpu_mode(int flags, int warps, int blocks, u32 poison, u64 seed) {
  mode = {flags, warps, blocks, poison, seed};
}
void vgpu_only(const u32* blocks, int count) { only.assign(blocks, blocks + count); }
void vgpu_ranges(const u64* begins, const u64* sizes, int count) {
  global_memory = {};
  for (int i = 0; i < count; i++)
    global_memory.ranges.push_back(
        {(uintptr_t)begins[i], (uintptr_t)(begins[i] + sizes[i]), {}, {}});
}
void vgpu_program(const char* name, const u8* image, u64 image_bytes, const s32* code,
                  int instructions, const s32* operands, int operand_count, const s32* places32,
                  const u32* bits32, int count32, const s32* places64, const u64* bits64,
                  int count64, const s32* parameters, int parameter_count, int words, int threads) {
  auto program = std::make_unique<Program>();
  program->name = name;
  program->image.assign(image, image + image_bytes);
  for (int i = 0; i < instructions; i++, code += 5)
    program->code.push_back({code[0], code[1], code[2], code[3], code[4]});
  program->operands.assign(operands, operands + operand_count);
  for (int i = 0; i < count32; i++) program->constants32.push_back({places32[i], bits32[i]});
  for (int i = 0; i < count64; i++) program->constants64.push_back({places64[i], bits64[i]});
  for (int i = 0; i < parameter_count; i++, parameters += 2) {
    program->parameters.push_back({parameters[0], parameters[1]});
    program->parameter_bytes = std::max(program->parameter_bytes, parameters[0] + parameters[1]);
  }
  program->words = words;
  program->threads = threads;
  programs.push_back(std::move(program));
}
// Lines of: kernel, tab, finding, tab, how often, tab, at how many instructions, tab, line of the
// first.
u64 vgpu_findings(char* to, u64 size) {
  std::string all;
  for (auto& program : programs)
    for (int finding = 0; finding < FINDING_COUNT; finding++) {
      auto& counts = program->findings[finding];
      u64 total = 0, places = 0;
      int line = 0;
      for (size_t i = 0; i < counts.size(); i++)
        if (counts[i]) {
          total += counts[i];
          if (!places++) line = program->code[i].line;
        }
      if (total)
        all += text("%s\t%s\t%llu\t%llu\t%d\t%s\n", program->name.c_str(), FINDING_NAMES[finding],
                    (unsigned long long)total, (unsigned long long)places, line,
                    FINDING_TEXTS[finding]);
    }
  if (size) snprintf(to, size, "%s", all.c_str());
  return all.size() + 1;
}
void vgpu_forget_findings() {
  for (auto& program : programs)
    for (auto& counts : program->findings) counts.clear();
}
// single conversions, for tests
u32 vgpu_convert(int operation, float x) {
  return operation == CVT_E4M3X2_F32   ? to_e4m3(x)
         : operation == CVT_F16_F32    ? to_half(x)
         : operation == CVT_F16_F32_RZ ? to_half_toward_zero(x)
                                       : to_brain(x);
}

Result cuInit(unsigned) { return OK; }
Result cuGetErrorName(int code, const char** name) {
  *name = code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == NO_BINARY     ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
                                  : "CUDA_ERROR_UNKNOWN";
  return OK;
}
Result cuDriverGetVersion(int* version) {
  *version = 12080;
  return OK;
}
Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return OK;
}
Result cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &programs;
  return OK;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxPushCurrent_v2(void*) { return OK; }
Result cuCtxPopCurrent_v2(void** context) {
  *context = &programs;
  return OK;
}
Result cuModuleLoadData(void** module, const void* image) {
  for (auto& program : programs)
    if (!memcmp(program->image.data(), image, 64) &&
        !memcmp(program->image.data(), image, program->image.size())) {
      *module = program.get();
      return OK;
    }
  return NO_BINARY;
}
Result cuModuleGetFunction(void** function, void* module, const char*) {
  *function = module;
  return OK;
}
Result cuModuleUnload(void*) { return OK; }
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == 8) ((Program*)function)->most_shared_bytes = value;
  return OK;
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                      unsigned, unsigned, unsigned shared_bytes, void*, void** given, void**) {
  u32 grid[3] = {x, y, z};
  try {
    launch(*(Program*)function, grid, threads, shared_bytes, given);
    return OK;
  } catch (const Fault& fault) {
    message = fault.what();
    return ILLEGAL_ADDRESS;
  }
}
}
