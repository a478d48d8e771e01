// The probe kernels for compute capability 9.0.
#pragma once

#include <vector>

#include "kernel.h"

namespace jvp_attn::sm90 {

std::vector<Kernel> faulty_kernels();

}  // namespace jvp_attn::sm90
