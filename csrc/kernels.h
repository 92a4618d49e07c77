// What the kernels offer: plain C functions that launch on a stream and return 0, an error code for launch_message(), or
// kUnsupported where the version asked for can't do that problem (choose another).
//
// Arrays are C-contiguous and in device memory. A `_workspace` function says how many bytes of scratch memory a call needs.
#pragma once

#include <cstdint>

#define API extern "C" __attribute__((visibility("default")))

constexpr int kUnsupported = -1;

enum Precision { kFloat32, kFloat64, kTF32, kBF16 };  // TF32 and BF16: float32 arrays, rounded inputs, sums in float32
enum Activation { kNone, kSilu, kRelu };

// Convolutions: y (n, p, q, o) of x (n, h, w, c) and weight (kh, kw, c, o), strides sh and sw, `top` rows and `left` columns
// of zeros in front of the image; how many lie behind follows from p and q. `direction` says which of x, weight, y is written.
// Forward: y = activation(conv + bias + residual), bias (o), or (n, o) if bias_per_sample, residual of y's shape; or null.
// Weight gradient: the sum over pixels is cut into `split` parts (0: chosen), which does not depend on the GPU.
enum Version { kDirect, kSmallC, kIgemmSimt, kIgemmSimt64, kIgemmAsync, kIgemmAsync64, kIgemmTC, kIgemmTC64, kWinoF2 };
enum Direction { kForward, kInputGrad, kWeightGrad };

API int conv2d(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw, int p, int q,
               int sh, int sw, int top, int left, int split, int bias_per_sample, int activation, const void* bias,
               const void* residual, void* x, void* weight, void* y, void* workspace, uintptr_t stream);
API int64_t conv2d_workspace(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw,
                             int p, int q, int sh, int sw, int top, int left, int split);
