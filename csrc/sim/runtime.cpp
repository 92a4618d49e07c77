// The simulator, as one translation unit: compiled once, without the instrumentation that kernels may be compiled with.
#define API extern "C" __attribute__((visibility("default")))

#include "block.cpp"
#include "fiber.cpp"
#include "memory.cpp"
#include "race.cpp"
#include "report.cpp"
#include "warp.cpp"
