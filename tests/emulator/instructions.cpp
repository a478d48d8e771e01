// The instructions of emulated_ptx.h, executed by the emulated GPU.
#include <cstring>
#include <string>
#include <utility>

#include "common/ptx.cuh"
#include "machine.h"
#include "mma.h"

namespace jvp_attn {

using namespace emulator;

namespace {

void any(std::span<void* const> conditions) {
    bool any = false;
    for (void* condition : conditions) any |= *static_cast<bool*>(condition);
    for (void* condition : conditions) *static_cast<bool*>(condition) = any;
}

struct ShuffleXor {
    float value;
    int mask;
    float result;
};

void shuffle_xor_of_warp(std::span<void* const> arguments) {
    for (std::size_t lane = 0; lane < arguments.size(); ++lane) {
        auto& x = of_thread<ShuffleXor>(arguments, lane);
        x.result = of_thread<ShuffleXor>(arguments, lane ^ x.mask).value;
    }
}

constexpr Collective kBlockBarrier = {"block_barrier", true, do_nothing};
constexpr Collective kBlockAny = {"block_any", true, any};
constexpr Collective kWarpAny = {"warp_any", false, any};
constexpr Collective kShuffleXor = {"shuffle_xor", false, shuffle_xor_of_warp};
constexpr Collective kLoadMatrices = {"load_matrices", false, load_matrices_of_warp};
constexpr Collective kLoadMatricesTransposed = {"load_matrices_transposed", false,
                                                load_matrices_transposed_of_warp};
constexpr Collective kMultiplyAddBf16 = {"multiply_add<Bf16>", false, multiply_add_bf16_of_warp};
constexpr Collective kMultiplyAddFp16 = {"multiply_add<Fp16>", false, multiply_add_fp16_of_warp};

constexpr int kMatrixRowBytes = 16;

Words4 load_matrices_with(const Collective& collective, SharedAddress row, const Place& where) {
    const Actor actor = self(collective.name, where);
    LoadMatrices x = {machine.shared.read(actor, row, kMatrixRowBytes), {}};
    machine.execute(collective, &x, where);
    return x.result;
}

template <class Value>
Value shared_load(const char* instruction, SharedAddress address, const Place& where) {
    const Actor actor = self(instruction, where);
    machine.count_step(actor);
    Value value;
    std::memcpy(&value, machine.shared.read(actor, address, sizeof value), sizeof value);
    return value;
}

template <class Value>
void shared_store(const char* instruction, SharedAddress address, const Value& value,
                  const Place& where) {
    std::memcpy(machine.shared.write(self(instruction, where), address, sizeof value), &value,
                sizeof value);
}

}  // namespace

void block_barrier(Place where) { machine.execute(kBlockBarrier, nullptr, where); }

bool block_any(bool condition, Place where) {
    machine.execute(kBlockAny, &condition, where);
    return condition;
}

bool warp_any(bool condition, Place where) {
    machine.execute(kWarpAny, &condition, where);
    return condition;
}

float shuffle_xor(float value, int mask, Place where) {
    check_not_in_flight(value, "shuffle_xor", where);
    if (mask < 0 || mask >= kWarpThreads)
        fail(self("shuffle_xor", where), "mask " + std::to_string(mask) + "; it can be 0 to 31");
    ShuffleXor x = {value, mask, 0};
    machine.execute(kShuffleXor, &x, where);
    return x.result;
}

SharedAddress shared_memory() { return SharedMemory::kStart; }

float shared_load_float(SharedAddress address, Place where) {
    return shared_load<float>("shared_load_float", address, where);
}

void shared_store_float(SharedAddress address, float value, Place where) {
    check_not_in_flight(value, "shared_store_float", where);
    shared_store("shared_store_float", address, value, where);
}

Words4 shared_load_words4(SharedAddress address, Place where) {
    return shared_load<Words4>("shared_load_words4", address, where);
}

void shared_store_words4(SharedAddress address, const Words4& x, Place where) {
    shared_store("shared_store_words4", address, x, where);
}

void copy_async(SharedAddress target, const void* source, int bytes, Place where) {
    machine.copies().issue(self("copy_async", where), target, source, bytes, machine.shared,
                           machine.global);
}

void copy_async_commit() { machine.copies().commit(); }

Words4 load_matrices(SharedAddress row, Place where) {
    return load_matrices_with(kLoadMatrices, row, where);
}

Words4 load_matrices_transposed(SharedAddress row, Place where) {
    return load_matrices_with(kLoadMatricesTransposed, row, where);
}

namespace emulator {

void check_global_read(const void* address, std::size_t bytes, const Place& where) {
    const Actor actor = self("global_load", where);
    machine.count_step(actor);
    machine.global.check_read(actor, address, bytes, bytes);
}

void check_global_write(const void* address, std::size_t bytes, const Place& where) {
    machine.global.check_write(self("global_store", where), address, bytes);
}

void copy_async_wait(int pending) { machine.copies().wait(pending, machine.shared); }

void multiply_add_bf16(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                       const Place& where) {
    MultiplyAdd x = {accumulator, &a, b0, b1};
    machine.execute(kMultiplyAddBf16, &x, where);
}

void multiply_add_fp16(float (&accumulator)[4], const Words4& a, uint32_t b0, uint32_t b1,
                       const Place& where) {
    MultiplyAdd x = {accumulator, &a, b0, b1};
    machine.execute(kMultiplyAddFp16, &x, where);
}

std::string run(int blocks, int threads, std::size_t shared_bytes, int capability,
                std::function<void()> kernel) {
    return machine.run({blocks, threads, shared_bytes, capability, std::move(kernel)});
}

}  // namespace emulator

}  // namespace jvp_attn
