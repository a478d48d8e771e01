// Headers that all instruction sets share. isa_*.cpp include them before they select an instruction
// set: otherwise the compiler would use that set for inline functions, which the linker may then
// share with code for machines that lack it.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/aligned_buffer.h"
#include "cpu/dispatch.h"
#include "cpu/params.h"
#include "cpu/threads.h"
