// Four neighbours at once, at a multiple of 16 bytes: one access of float, two of double.
#pragma once

#include "launch.h"

DEVICE void load4(const float* p, float (&v)[4]) {
    const float4 a = load128(p);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
DEVICE void load4(const double* p, double (&v)[4]) {
    const double2 a = load128<double2>(p), b = load128<double2>(p + 2);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}
DEVICE void lds4(const float* p, float* v) {
    const float4 a = lds128(p);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
DEVICE void lds4(const double* p, double* v) {
    const double2 a = lds128<double2>(p), b = lds128<double2>(p + 2);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}
DEVICE void sts4(float* p, const float (&v)[4]) { sts128(p, make_float4(v[0], v[1], v[2], v[3])); }
DEVICE void sts4(double* p, const double (&v)[4]) {
    sts128(p, make_double2(v[0], v[1]));
    sts128(p + 2, make_double2(v[2], v[3]));
}
DEVICE void store4(float* p, const float (&v)[4]) { store128(p, make_float4(v[0], v[1], v[2], v[3])); }
DEVICE void store4(double* p, const double (&v)[4]) {
    store128(p, make_double2(v[0], v[1]));
    store128(p + 2, make_double2(v[2], v[3]));
}
