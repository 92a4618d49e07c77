#pragma once
#include <cstdint>
extern "C" {
int window_sums(const float* x, float* y, int n, int radius, std::uintptr_t stream);
}
