// Answers what torch asks CUDA of a device, so that a CUDA build of torch believes in one where none is: its tensors then go through
// CUDA's own dispatch, casts and choice of kernels, as tensors without values (torch's FakeTensorMode) that no kernel computes.
// Memory is the host's, streams and events are nothing, and the device has an H100's properties.
// Loaded before torch (LD_PRELOAD), it stands in the place of the CUDA runtime's functions and of the driver, libcuda.so.1.
#include <stdlib.h>
#include <string.h>
#include <driver_types.h>

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
const char *cudaGetErrorName(int error) { return "cudaErrorNoSuchThing"; }
const char *cudaGetErrorString(int error) { return "the stand-in for a GPU cannot do this"; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return 0; }
int cudaDeviceSynchronize(void) { return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "no GPU (a stand-in for an H100)");
  of->major = 9, of->minor = 0, of->multiProcessorCount = 132, of->warpSize = 32;
  of->totalGlobalMem = (size_t)80 << 30, of->l2CacheSize = 50 << 20;
  of->maxThreadsPerBlock = 1024, of->maxThreadsPerMultiProcessor = 2048, of->regsPerMultiprocessor = 65536;
  of->sharedMemPerBlock = 49152, of->sharedMemPerBlockOptin = 232448, of->sharedMemPerMultiprocessor = 233472;
  return 0;
}

int cudaMalloc(void **memory, size_t size) { *memory = malloc(size); return 0; }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { *memory = malloc(size); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemGetInfo(size_t *left, size_t *whole) { *left = *whole = (size_t)80 << 30; return 0; }
int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) { memset(memory, value, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { memcpy(to, from, size); return 0; }

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = malloc(8); return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = malloc(8); return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventDestroy(void *event) { free(event); return 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
