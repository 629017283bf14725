/* A CUDA driver, and its NVML, that start nothing and write down every call: for tests of
   kernels/launch.py, engine/machine/gpu.py and engine/machine/kernel_choice.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char log_text[1 << 16];
static const char *failing = "";
static int failing_code;
static int parameter_bytes[64], parameters;
static uintptr_t handles = 0x1000;
static int is_in_context;
static const char *refused;  /* code that begins so is not loaded */

struct gpu { const char *name; int major, minor, version, count; size_t bytes, free_bytes; };
static const struct gpu ADA = {"NVIDIA GeForce RTX 4090", 8, 9, 12070, 1, 25386352640u, 25000000000u};
static struct gpu gpu = {"NVIDIA GeForce RTX 4090", 8, 9, 12070, 1, 25386352640u, 25000000000u};
static const unsigned char UUID[16] = {0x1f, 0x2e, 0x3d, 0x4c, 0x5b, 0x6a, 0x79, 0x88,
                                       0x97, 0xa6, 0xb5, 0xc4, 0xd3, 0xe2, 0xf1, 0x00};
static const char *uuid_text = "GPU-1f2e3d4c-5b6a-7988-97a6-b5c4d3e2f100";

#define NOTE(...) \
    snprintf(log_text + strlen(log_text), sizeof log_text - strlen(log_text), __VA_ARGS__)
#define BEGIN(name) \
    do { if (!strcmp(failing, name)) { NOTE("%s fails\n", name); return failing_code; } } while (0)

const char *fake_log(void) { return log_text; }

void fake_reset(void) {
    log_text[0] = 0;
    failing = "";
    parameters = 0;
    refused = NULL;
    gpu = ADA;
}

void fake_fail(const char *name, int code) { failing = strdup(name); failing_code = code; }

void fake_refuse(const char *code) { refused = strdup(code); }

void fake_gpu(const char *name, int major, int minor, int version, int count) {
    gpu = (struct gpu){strdup(name), major, minor, version, count, ADA.bytes, ADA.free_bytes};
}

/* A driver knows the widths of a kernel's parameters from its code; this one is told. */
void fake_parameters(const int *bytes, int count) {
    memcpy(parameter_bytes, bytes, count * sizeof *bytes);
    parameters = count;
}

int cuInit(unsigned flags) { BEGIN("cuInit"); NOTE("cuInit %u\n", flags); return 0; }

int cuDriverGetVersion(int *version) { BEGIN("cuDriverGetVersion"); *version = gpu.version; return 0; }

int cuGetErrorName(int code, const char **name) {
    *name = code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : NULL;
    return code == 209 ? 0 : 1;
}

int cuDeviceGet(int *device, int ordinal) {
    BEGIN("cuDeviceGet");
    NOTE("cuDeviceGet %d\n", ordinal);
    *device = 70 + ordinal;
    return 0;
}

int cuDeviceGetCount(int *count) { BEGIN("cuDeviceGetCount");
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible && !*visible ? 0 : gpu.count;
    return 0;
}

int cuDeviceGetName(char *name, int length, int device) {
    BEGIN("cuDeviceGetName");
    snprintf(name, length, "%s", gpu.name);
    return device == 70 ? 0 : 101;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN("cuDeviceGetAttribute");
    *value = attribute == 75 ? gpu.major : attribute == 76 ? gpu.minor : -1;
    return device == 70 ? 0 : 101;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    BEGIN("cuDeviceTotalMem_v2");
    *bytes = gpu.bytes;
    return device == 70 ? 0 : 101;
}

int cuDeviceGetUuid(unsigned char *uuid, int device) {
    BEGIN("cuDeviceGetUuid");
    memcpy(uuid, UUID, sizeof UUID);
    return device == 70 ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    BEGIN("cuDevicePrimaryCtxRetain");
    NOTE("retain %d\n", device);
    *context = (void *)0xC0;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { NOTE("release %d\n", device); return 0; }

int cuCtxPushCurrent_v2(void *context) {
    is_in_context = context == (void *)0xC0;
    return is_in_context ? 0 : 201;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = (void *)0xC0;
    is_in_context = 0;
    return 0;
}

int cuMemHostRegister_v2(void *memory, size_t bytes, unsigned flags) {
    BEGIN("cuMemHostRegister_v2");
    NOTE("register %zu %u\n", bytes, flags);
    return 0;
}

int cuMemHostUnregister(void *memory) { NOTE("unregister\n"); return 0; }

int cuModuleLoadData(void **module, const void *image) {
    BEGIN("cuModuleLoadData");
    if (!is_in_context) return 201;
    if (refused && !strncmp((const char *)image, refused, strlen(refused))) return 209;
    *module = (void *)(handles += 0x10);
    NOTE("load %.8s -> %p\n", (const char *)image, *module);
    return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    BEGIN("cuModuleGetFunction");
    *function = (void *)((uintptr_t)module + 1);
    NOTE("function %s of %p\n", name, module);
    return 0;
}

int cuModuleUnload(void *module) {
    if (!is_in_context) return 201;
    NOTE("unload %p\n", module);
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    BEGIN("cuFuncSetAttribute");
    NOTE("attribute %d of %p = %d\n", attribute, function, value);
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **values, void **extra) {
    BEGIN("cuLaunchKernel");
    NOTE("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p values", function,
         gx, gy, gz, bx, by, bz, shared, stream, (void *)extra);
    for (int at = 0; at < parameters; at++) {
        NOTE(" ");
        for (int byte = 0; byte < parameter_bytes[at]; byte++)
            NOTE("%02x", ((const unsigned char *)values[at])[byte]);
    }
    NOTE("\n");
    return 0;
}

/* NVML */

struct memory { unsigned long long total, free, used; };

int nvmlInit_v2(void) { BEGIN("nvmlInit_v2"); NOTE("nvml begins\n"); return 0; }

int nvmlShutdown(void) { NOTE("nvml ends\n"); return 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    BEGIN("nvmlSystemGetDriverVersion");
    snprintf(text, length, "565.57.01");
    return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    BEGIN("nvmlDeviceGetHandleByUUID");
    *device = (void *)0xDE7;
    return strcmp(uuid, uuid_text) ? 6 : 0;
}

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    BEGIN("nvmlDeviceGetMemoryInfo");
    *memory = (struct memory){gpu.bytes, gpu.free_bytes, gpu.bytes - gpu.free_bytes};
    return device == (void *)0xDE7 ? 0 : 2;
}
