/* A CUDA driver that starts nothing and writes down every call, for tests of kernels/launch.py. */

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char log_text[1 << 16];
static const char *failing = "";
static int failing_code;
static int parameter_bytes[64], parameters;
static uintptr_t handles = 0x1000;
static int is_in_context;

#define NOTE(...) \
    snprintf(log_text + strlen(log_text), sizeof log_text - strlen(log_text), __VA_ARGS__)
#define BEGIN(name) \
    do { if (!strcmp(failing, name)) { NOTE("%s fails\n", name); return failing_code; } } while (0)

const char *fake_log(void) { return log_text; }

void fake_reset(void) { log_text[0] = 0; failing = ""; parameters = 0; }

void fake_fail(const char *name, int code) { failing = strdup(name); failing_code = code; }

/* A driver knows the widths of a kernel's parameters from its code; this one is told. */
void fake_parameters(const int *bytes, int count) {
    memcpy(parameter_bytes, bytes, count * sizeof *bytes);
    parameters = count;
}

int cuInit(unsigned flags) { BEGIN("cuInit"); NOTE("cuInit %u\n", flags); return 0; }

int cuDriverGetVersion(int *version) { BEGIN("cuDriverGetVersion"); *version = 12070; return 0; }

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

int cuModuleLoadData(void **module, const void *image) {
    BEGIN("cuModuleLoadData");
    if (!is_in_context) return 201;
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
