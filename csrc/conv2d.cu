// conv2d: one function for all versions of the convolution.
#include "conv.h"

struct Entry {
    int (*launch)(const ConvCall&);
    int64_t (*workspace)(const ConvCall&);
};
constexpr Entry kVersions[] = {  // in the order of enum Version
    {conv_direct, conv_direct_workspace},
    {conv_small_c, conv_small_c_workspace},
    {conv_igemm_simt, conv_igemm_simt_workspace},
    {conv_igemm_simt_64, conv_igemm_simt_64_workspace},
    {conv_igemm_async, conv_igemm_async_workspace},
    {conv_igemm_async_64, conv_igemm_async_64_workspace},
    {conv_igemm_tc, conv_igemm_tc_workspace},
    {conv_igemm_tc_64, conv_igemm_tc_64_workspace},
    {conv_wino_f2, conv_wino_f2_workspace},
};
constexpr int kCount = sizeof kVersions / sizeof *kVersions;

int conv2d(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw, int p, int q, int sh,
           int sw, int top, int left, int split, int bias_per_sample, int activation, const void* bias, const void* residual,
           void* before, void* x, void* weight, void* y, void* workspace, uintptr_t stream) {
    if (version < 0 || version >= kCount) return kUnsupported;
    const ConvSize size{n, h, w, c, o, kh, kw, p, q, sh, sw, top, left};
    return kVersions[version].launch(
        {direction, precision, size, split, bias_per_sample, activation, bias, residual, before, x, weight, y, workspace,
         stream});
}

int64_t conv2d_workspace(int version, int direction, int precision, int n, int h, int w, int c, int o, int kh, int kw, int p,
                         int q, int sh, int sw, int top, int left, int split) {
    if (version < 0 || version >= kCount) return 0;
    const ConvSize size{n, h, w, c, o, kh, kw, p, q, sh, sw, top, left};
    return kVersions[version].workspace(
        {direction, precision, size, split, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0});
}
