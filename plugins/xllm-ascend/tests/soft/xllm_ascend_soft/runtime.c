/* The runtime of Ascend devices (libascendcl) as far as torch_npu asks for it, on host memory. Copies that need not wait do wait, until somebody does:
 * who writes to their source too early, or reads their target too early, sees it.
 *
 * Two devices of 1 GiB. Fresh memory is filled with ones, which are NaN in every float: what no kernel wrote shows itself.
 * Written for these tests from the names, and the arguments, that torch_npu calls; nothing of CANN is in here.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { NUM_DEVICES = 2, OK = 0, BAD_ARGUMENT = 107000, BAD_DEVICE = 107001, NO_MEMORY = 207001 };
static const size_t TOTAL_BYTES = (size_t)1 << 30;
static const size_t ALIGNMENT = 512;

static __thread int32_t current;
static size_t used_bytes[NUM_DEVICES];
static char contexts[NUM_DEVICES];

typedef struct { size_t bytes; int32_t device; } Header; /* lies in the 512 bytes before each allocation */

/* Devices */
int aclInit(const char *path) { return OK; }
int aclFinalize(void) { return OK; }
int aclrtGetDeviceCount(uint32_t *count) { *count = NUM_DEVICES; return OK; }
int aclrtGetDevice(int32_t *device) { *device = current; return OK; }
int aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= NUM_DEVICES) return BAD_DEVICE;
    current = device;
    return OK;
}
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
int aclrtGetCurrentContext(void **context) { *context = &contexts[current]; return OK; }
int aclrtSetCurrentContext(void *context)
{
    if (context) current = (int32_t)((char *)context - contexts);
    return OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = device != peer; return OK; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 24; return OK; }
int aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) { *value = 24; return OK; }
const char *aclGetRecentErrMsg(void) { return ""; }

/* Copies that were asked for and not waited for, in order */
typedef struct { void *to; const void *from; size_t bytes; } Copy;
enum { MAX_PENDING = 256 };
static Copy pending[MAX_PENDING];
static int num_pending;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void flush_locked(void)
{
    for (int i = 0; i < num_pending; i++) memmove(pending[i].to, pending[i].from, pending[i].bytes);
    num_pending = 0;
}
int soft_flush(void)
{
    pthread_mutex_lock(&lock);
    flush_locked();
    pthread_mutex_unlock(&lock);
    return OK;
}
int aclrtSynchronizeStream(void *stream) { return soft_flush(); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout_ms) { return soft_flush(); }
int aclrtSynchronizeDevice(void) { return soft_flush(); }
int aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) { return soft_flush(); }
int aclrtSynchronizeEvent(void *event) { return soft_flush(); }
int aclrtSynchronizeEventWithTimeout(void *event, int32_t timeout_ms) { return soft_flush(); }

/* Memory */
int aclrtMalloc(void **address, size_t bytes, int policy)
{
    char *place;
    *address = NULL;
    if (bytes > TOTAL_BYTES - used_bytes[current]) return NO_MEMORY;
    if (posix_memalign((void **)&place, ALIGNMENT, bytes + ALIGNMENT)) return NO_MEMORY;
    *(Header *)place = (Header){bytes, current};
    memset(place + ALIGNMENT, 0xFF, bytes);
    __atomic_add_fetch(&used_bytes[current], bytes, __ATOMIC_SEQ_CST);
    *address = place + ALIGNMENT;
    return OK;
}
int aclrtMallocAlign32(void **address, size_t bytes, int policy) { return aclrtMalloc(address, bytes, policy); }
int aclrtFree(void *address)
{
    soft_flush();
    char *place = (char *)address - ALIGNMENT;
    Header *header = (Header *)place;
    __atomic_sub_fetch(&used_bytes[header->device], header->bytes, __ATOMIC_SEQ_CST);
    free(place);
    return OK;
}
int aclrtMallocHost(void **address, size_t bytes) { return posix_memalign(address, ALIGNMENT, bytes ? bytes : 1) ? NO_MEMORY : OK; }
int aclrtFreeHost(void *address) { soft_flush(); free(address); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind)
{
    if (bytes > room) return BAD_ARGUMENT;
    soft_flush();
    memmove(to, from, bytes);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    if (bytes > room) return BAD_ARGUMENT;
    pthread_mutex_lock(&lock);
    if (num_pending == MAX_PENDING) flush_locked();
    pending[num_pending++] = (Copy){to, from, bytes};
    pthread_mutex_unlock(&lock);
    return OK;
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) { soft_flush(); memset(to, value, bytes); return OK; }
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) { return aclrtMemset(to, room, value, bytes); }
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes)
{
    *total_bytes = TOTAL_BYTES;
    *free_bytes = TOTAL_BYTES - used_bytes[current];
    return OK;
}

/* Streams and events: a handle, and the time at which it was recorded */
static int make(void **handle) { *handle = calloc(1, 64); return *handle ? OK : NO_MEMORY; }
static int unmake(void *handle) { free(handle); return OK; }
int aclrtCreateStream(void **stream) { return make(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return make(stream); }
int aclrtDestroyStream(void *stream) { return unmake(stream); }
int aclrtDestroyStreamForce(void *stream) { return unmake(stream); }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return soft_flush(); }
int aclrtGetStreamId(void *stream, int32_t *id) { *id = (int32_t)(intptr_t)stream; return OK; }
int aclrtCreateEvent(void **event) { return make(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return make(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return make(event); }
int aclrtDestroyEvent(void *event) { return unmake(event); }
int aclrtRecordEvent(void *event, void *stream)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(double *)event = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return OK;
}
int aclrtEventElapsedTime(float *ms, void *from, void *to) { *ms = (float)(*(double *)to - *(double *)from); return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return soft_flush(); }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }

/* Options: each is off but for how operators are compiled, which torch_npu reads back as a text */
size_t aclGetCompileoptSize(int option) { return 8; }
static char options[64][8];
int aclSetCompileopt(int option, const char *value)
{
    if (option >= 0 && option < 64) strncpy(options[option], value, 7);
    return OK;
}
int aclGetCompileopt(int option, char *value, size_t room)
{
    if (option >= 0 && option < 64 && options[option][0]) strncpy(value, options[option], room);
    else strncpy(value, "1", room);
    return OK;
}
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtPeekAtLastError(int level) { return OK; }
int aclrtGetLastError(int level) { return OK; }
int aclrtResetDevice(int32_t device) { return OK; }
