// The launchers of kernels.h as Python functions, with pybind11: once as _cuda, beside kernels compiled by nvcc, once as
// _cudasim, beside the same kernels compiled by g++. Pointers and streams are passed as integers; Python's lock is not held
// while a launcher runs. What is passed was checked in tinydiff/kernels/cuda.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

API const char* error_message(int error);

namespace py = pybind11;

template <class T>
using Number = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T argument(Number<T> value) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(value);
    else return value;
}

template <class Result, class... Arguments>
void expose(py::module_& module, const char* name, Result (*launcher)(Arguments...)) {
    auto call = [launcher](Number<Arguments>... values) { return launcher(argument<Arguments>(values)...); };
    module.def(name, call, py::call_guard<py::gil_scoped_release>());
}

PYBIND11_MODULE(MODULE, module) {
#define EXPOSE(launcher) expose(module, #launcher, launcher)
    EXPOSE(conv2d);
    EXPOSE(conv2d_workspace);
    EXPOSE(group_norm);
    EXPOSE(group_norm_backward);
    EXPOSE(group_norm_workspace);
    EXPOSE(layer_norm);
    EXPOSE(layer_norm_backward);
    EXPOSE(layer_norm_workspace);
    EXPOSE(softmax);
    EXPOSE(softmax_backward);
    EXPOSE(attention);
    EXPOSE(attention_backward);
    EXPOSE(attention_workspace);
    EXPOSE(adamw);
    module.def("error_message", &error_message);
    module.attr("UNSUPPORTED") = kUnsupported;
}
