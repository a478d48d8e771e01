// What the attention maps need and what is shared by all instruction sets: to be included before
// one is chosen, or these functions would be compiled for it and then run everywhere.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/map.h"
#include "cpu/params.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
