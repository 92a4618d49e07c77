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
// `before`, of y's shape or null, gets what the activation is applied to, which its gradient needs.
// Weight gradient: the sum over pixels is cut into `split` parts (0: chosen), which does not depend on the GPU.
enum Version { kDirect, kSmallC, kIgemmSimt, kIgemmSimt64, kIgemmAsync, kIgemmAsync64, kIgemmTC, kIgemmTC64, kWinoF2 };
enum Direction { kForward, kInputGrad, kWeightGrad };

API int conv2d(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw, int p, int q,
               int sh, int sw, int top, int left, int split, int bias_per_sample, int activation, const void* bias,
               const void* residual, void* before, void* x, void* weight, void* y, void* workspace, uintptr_t stream);
API int64_t conv2d_workspace(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw,
                             int p, int q, int sh, int sw, int top, int left, int split);

// Normalisations: float32 or float64; weight and bias, and their gradients, may be null. mean and rstd are computed forward and
// read backward. eps is added to the variance.
// y = activation(group_norm(x)), x (n, pixels, channels), mean and rstd (n, groups).
API int group_norm(int precision, int n, int pixels, int channels, int groups, double eps, int activation, const void* x,
                   const void* weight, const void* bias, void* y, void* mean, void* rstd, void* workspace, uintptr_t stream);
API int group_norm_backward(int precision, int n, int pixels, int channels, int groups, int activation, const void* gy,
                            const void* x, const void* weight, const void* bias, const void* mean, const void* rstd, void* gx,
                            void* gweight, void* gbias, void* workspace, uintptr_t stream);
API int64_t group_norm_workspace(int precision, int n, int pixels, int channels, int groups);
// x (rows, size), mean and rstd (rows); the workspace is for the backward pass.
API int layer_norm(int precision, int rows, int size, double eps, const void* x, const void* weight, const void* bias, void* y,
                   void* mean, void* rstd, uintptr_t stream);
API int layer_norm_backward(int precision, int rows, int size, const void* gy, const void* x, const void* weight,
                            const void* mean, const void* rstd, void* gx, void* gweight, void* gbias, void* workspace,
                            uintptr_t stream);
API int64_t layer_norm_workspace(int precision, int rows, int size);

// Softmax over the rows of x (rows, size), or its logarithm; backward from the result y. float32 or float64.
API int softmax(int precision, int rows, int size, int logarithmic, const void* x, void* y, uintptr_t stream);
API int softmax_backward(int precision, int rows, int size, int logarithmic, const void* gy, const void* y, void* gx,
                         uintptr_t stream);

// Attention: out = softmax(scale q kᵀ) v for each head; q (n, queries, heads, size), k (n, keys, heads, size), v (n, keys, heads,
// value_size), out as q with value_size; float32 with sizes up to 128, float64 up to 64. mask, or null, has a byte for each query
// and key, not 0 where the one sees the other, with the strides given; if causal, query i sees keys 0 ... i only.
// logsumexp (n, heads, queries) is computed forward and read backward.
API int attention(int precision, int n, int heads, int queries, int keys, int size, int value_size, int causal, int mask_sample,
                  int mask_head, int mask_query, int mask_key, double scale, const void* q, const void* k, const void* v,
                  const void* mask, void* out, void* logsumexp, uintptr_t stream);
API int attention_backward(int precision, int n, int heads, int queries, int keys, int size, int value_size, int causal,
                           int mask_sample, int mask_head, int mask_query, int mask_key, double scale, const void* g,
                           const void* q, const void* k, const void* v, const void* mask, const void* out,
                           const void* logsumexp, void* gq, void* gk, void* gv, void* workspace, uintptr_t stream);
API int64_t attention_workspace(int precision, int n, int heads, int queries);

// One step of AdamW and of the moving averages, float32, in place. `changes`, in the host's memory, has for each parameter the
// addresses of parameter, gradient, m, v and average (or 0), and the size; beta1_power is beta1 to the number of the step.
API int adamw(int count, const int64_t* changes, double lr, double beta1, double beta2, double eps, double weight_decay,
              double beta1_power, double beta2_power, double ema_decay, uintptr_t stream);
