// Compares the kernels of every instruction set that this machine has with the naive formulas, and
// their results in one thread with those in four.
//
//     attention          all comparisons
//     attention races    only one thread with four, in float32: ThreadSanitizer is slow
#include <cstdint>
#include <cstdio>
#include <string>

#include "cpu/dispatch.h"
#include "kernel_test.h"

namespace {

const Problem kProblems[] = {
    {"one query, one key", {1}, {1}, 1, 1, 1, 1},
    {"no key", {3}, {0}, 2, 1, 4, 4},
    {"less than a tile", {5, 5}, {7, 7}, 4, 2, 3, 6},
    {"one tile", {96}, {128}, 1, 1, 8, 8},
    {"partial last tile", {200}, {300}, 2, 1, 20, 17},
    {"largest head dim", {7}, {9}, 1, 1, 256, 255},
    {"bottom right", {150}, {260}, 2, 2, 16, 8, {.causal = Causal::bottom_right}},
    {"fully masked rows", {150}, {40}, 2, 1, 16, 8, {.causal = Causal::bottom_right}},
    {"top left", {130}, {260}, 2, 1, 16, 8, {.causal = Causal::top_left}},
    {"several tiles of queries", {500}, {310}, 2, 1, 10, 9},
    {"several tiles, causal", {500}, {420}, 2, 2, 10, 9, {.causal = Causal::bottom_right}},
    {"packed",
     {97, 0, 5, 130},
     {140, 3, 0, 200},
     2,
     1,
     9,
     5,
     {.causal = Causal::bottom_right, .packed = true}},
    {"masked", {101, 101}, {135, 135}, 2, 1, 12, 10, {.masked = true}},
    {"masked and causal",
     {101},
     {135},
     2,
     2,
     12,
     10,
     {.causal = Causal::bottom_right, .masked = true}},
    {"only queries have tangents", {100}, {130}, 2, 1, 16, 16, {.only_tq = true}},
    {"split keys", {3}, {5000}, 2, 1, 4, 4},
    {"split keys, causal", {300}, {4400}, 1, 1, 4, 4, {.causal = Causal::bottom_right}},
    {"padded keys",
     {101, 101, 101, 101},
     {300, 300, 300, 300},
     2,
     1,
     12,
     10,
     {.seqused_k = {300, 270, 7, 0}}},
    {"padded keys, masked and bottom right",
     {60, 60, 60},
     {150, 150, 150},
     2,
     1,
     8,
     6,
     {.causal = Causal::bottom_right, .masked = true, .seqused_k = {129, 40, 0}}},
    {"padded keys, masked and top left",
     {101, 101},
     {150, 150},
     2,
     2,
     8,
     6,
     {.causal = Causal::top_left, .masked = true, .seqused_k = {90, 128}}},
    {"padded keys, packed",
     {97, 5, 30},
     {140, 8, 200},
     2,
     1,
     9,
     5,
     {.causal = Causal::bottom_right, .packed = true, .seqused_k = {99, 8, 0}}},
    {"padded keys, split", {3, 3}, {5000, 5000}, 2, 1, 4, 4, {.seqused_k = {4200, 1}}},
};

template <class Value>
void test_kernels(const Kernels& kernels, double tolerance) {
    constexpr int kThreads = 4;
    for (const Problem& problem : kProblems) {
        const std::string what = std::string(kernels.instruction_set) + ", " +
                                 std::to_string(8 * sizeof(Value)) + " bits, " + problem.name;
        KernelTest<Value> parallel(problem), serial(problem);
        parallel.run(kernels, kThreads);
        if (tolerance < kInfinity) parallel.check(what, tolerance);
        serial.run(kernels, 1);
        if (serial.equals(parallel)) continue;
        ++failures;
        std::printf("%s: results depend on the number of threads\n", what.c_str());
    }
}

}  // namespace

int main(int count, char** arguments) {
    const bool races = count > 1 && std::string(arguments[1]) == "races";
    for (const Kernels* kernels : supported_kernels()) {
        std::printf("%s\n", kernels->instruction_set);
        test_kernels<float>(*kernels, races ? kInfinity : 1e-5);
        if (races) continue;
        test_kernels<double>(*kernels, 1e-12);
        test_kernels<uint16_t>(*kernels, 1e-2);
    }
    return failures != 0;
}
