// error_message: what the code that a launcher returned means, in words.
#include "kernels.h"
#include "launch.h"

API const char* error_message(int error) {
    return error == kUnsupported ? "this version of the kernel can't do that problem" : launch_message(error);
}
