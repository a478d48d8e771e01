// The instructions of emulated_ptx_sm90.h, executed by the emulated GPU.
#include <array>
#include <cstring>
#include <span>
#include <string>

#include "machine.h"
#include "mma.h"
#include "sm90/ptx.cuh"

namespace jvp_attn {

using namespace emulator;

namespace {

void order_accesses_of_warp(std::span<void* const> threads) {
    VectorClocks all;
    for (void* thread : threads) machine.order.release(*static_cast<int*>(thread), all);
    for (void* thread : threads) machine.order.acquire(*static_cast<int*>(thread), all);
}

struct RequestRegisters {
    Actor actor;
    int registers;
    bool more;
};

void request_registers_of_warp(std::span<void* const> arguments) {
    const auto& x = of_thread<RequestRegisters>(arguments, 0);
    machine.registers.request(x.actor, x.registers, x.more);
}

struct ArriveAtBarrier {
    Actor actor;
    int barrier;
    int threads;
    uint32_t generation;  // at which it arrives
};

void arrive_at_barrier_of_warp(std::span<void* const> arguments) {
    const auto& first = of_thread<ArriveAtBarrier>(arguments, 0);
    NamedBarrier& barrier = machine.named_barriers.at(first.actor, first.barrier);
    for (void* argument : arguments) {
        auto& x = *static_cast<ArriveAtBarrier*>(argument);
        if (x.barrier != first.barrier || x.threads != first.threads)
            fail(x.actor,
                 "must be the same for all of the warp, but it differs from that of "
                 "thread " +
                     std::to_string(first.actor.thread));
        x.generation = barrier.generation();
    }
    if (barrier.arrive(first.actor, first.threads, machine.order)) machine.wake(barrier);
}

struct UniformAddress {
    Actor actor;
    SharedAddress address;
};

void check_uniform_address_of_warp(std::span<void* const> arguments) {
    const auto& first = of_thread<UniformAddress>(arguments, 0);
    for (void* argument : arguments)
        if (const auto& x = *static_cast<UniformAddress*>(argument); x.address != first.address)
            fail(x.actor,
                 "the address must be the same for all of the warp, but it differs from "
                 "that of thread " +
                     std::to_string(first.actor.thread));
}

struct StoreMatrices {
    std::byte* row;  // lane 8i + j: row j of matrix i, 8 elements
    const Words4* x;
};

void store_matrices_of_warp(std::span<void* const> arguments) {
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            std::byte* row = of_thread<StoreMatrices>(arguments, 8 * matrix + lane / 4).row;
            std::memcpy(row + lane % 4 * 4,
                        &of_thread<StoreMatrices>(arguments, lane).x->word[matrix], 4);
        }
}

void start_wgmma_of_warp(std::span<void* const> arguments) {
    std::array<const WgmmaArguments*, kWarpThreads> lanes;
    for (int lane = 0; lane < kWarpThreads; ++lane)
        lanes[lane] = &of_thread<WgmmaArguments>(arguments, lane);
    Warpgroup& warpgroup = machine.warpgroup_of(lanes[0]->actor.thread);
    if (warpgroup.start(lanes, machine.order, machine.shared)) machine.wake(warpgroup);
}

void commit_wgmma_of_warp(std::span<void* const> threads) {
    const int thread = of_thread<int>(threads, 0);
    machine.warpgroup_of(thread).commit(thread / kWarpThreads % Warpgroup::kWarps);
}

constexpr Collective kElectOne = {"elect_one", false, do_nothing};
constexpr Collective kWarpBarrier = {"warp_barrier", false, order_accesses_of_warp};
constexpr Collective kRegAlloc = {"warpgroup_reg_alloc", false, request_registers_of_warp};
constexpr Collective kRegDealloc = {"warpgroup_reg_dealloc", false, request_registers_of_warp};
constexpr Collective kBarrierSync = {"named_barrier_sync", false, arrive_at_barrier_of_warp};
constexpr Collective kBarrierArrive = {"named_barrier_arrive", false, arrive_at_barrier_of_warp};
constexpr Collective kWarpUniform = {"warp_uniform", false, check_uniform_address_of_warp};
constexpr Collective kStoreMatrices = {"store_matrices", false, store_matrices_of_warp};
constexpr Collective kWgmma = {"wgmma", false, start_wgmma_of_warp};
constexpr Collective kWgmmaFence = {"wgmma_fence", false, do_nothing};
constexpr Collective kWgmmaCommit = {"wgmma_commit", false, commit_wgmma_of_warp};
constexpr Collective kWgmmaWait = {"wgmma_wait", false, do_nothing};

constexpr int kMatrixRowBytes = 16;

void add(const char* instruction, float* address, std::span<const float> x, const Place& where) {
    const Actor actor = self(instruction, where);
    machine.count_step(actor);
    for (const float& number : x) check_not_in_flight(number, instruction, where);
    machine.global.check_add(actor, address, x.size_bytes());
    for (std::size_t i = 0; i < x.size(); ++i) address[i] += x[i];
}

void arrive(const Actor& actor, SharedAddress address, int bytes) {
    Mbarrier& barrier = machine.mbarriers.at(actor, address, machine.shared);
    if (barrier.arrive(actor, bytes, machine.order)) machine.wake(barrier);
}

}  // namespace

bool elect_one(Place where) {
    machine.execute(kElectOne, nullptr, where);
    return current.thread % kWarpThreads == machine.elected_lane();
}

void warp_barrier(Place where) {
    int thread = current.thread;
    machine.execute(kWarpBarrier, &thread, where);
}

void named_barrier_sync(int number, int threads, Place where) {
    ArriveAtBarrier x = {self("named_barrier_sync", where), number, threads, 0};
    machine.execute(kBarrierSync, &x, where);
    NamedBarrier& barrier = machine.named_barriers.at(x.actor, number);
    while (barrier.generation() == x.generation) machine.wait_for(barrier, x.actor);
    machine.order.acquire(current.thread, barrier.released());
}

void named_barrier_arrive(int number, int threads, Place where) {
    ArriveAtBarrier x = {self("named_barrier_arrive", where), number, threads, 0};
    machine.execute(kBarrierArrive, &x, where);
}

void mbarrier_init(SharedAddress barrier, int arrivals, Place where) {
    machine.mbarriers.init(self("mbarrier_init", where), barrier, arrivals, machine.shared,
                           machine.order);
}

void fence_mbarrier_init() { machine.mbarriers.make_visible(current.thread); }

void mbarrier_arrive(SharedAddress barrier, Place where) {
    arrive(self("mbarrier_arrive", where), barrier, 0);
}

void mbarrier_arrive_expect(SharedAddress barrier, int bytes, Place where) {
    arrive(self("mbarrier_arrive_expect", where), barrier, bytes);
}

void mbarrier_wait(SharedAddress address, int phase, Place where) {
    const Actor actor = self("mbarrier_wait", where);
    machine.count_step(actor);
    if (phase != 0 && phase != 1)
        fail(actor, "phase " + std::to_string(phase) + "; it can be 0 or 1");
    Mbarrier& barrier = machine.mbarriers.at(actor, address, machine.shared);
    while (!barrier.has_ended(phase)) machine.wait_for(barrier, actor);
    barrier.note_wait();
    machine.order.acquire(current.thread, barrier.released());
}

void global_add(float* address, float x, Place where) {
    add("global_add", address, {&x, 1}, where);
}

void global_add4(float* address, const float (&x)[4], Place where) {
    add("global_add4", address, x, where);
}

void fence_proxy_async() { machine.order.fence(current.thread); }

void tma_load_4d(SharedAddress target, const TensorMap& map, SharedAddress address, int column,
                 int row, int head, int batch, Place where) {
    const Actor actor = self("tma_load_4d", where);
    machine.count_step(actor);
    Mbarrier& barrier = machine.mbarriers.at_for_tma(actor, address, machine.shared);
    machine.tma_loads.issue(actor, target, map, barrier, {column, row, head, batch}, machine.order,
                            machine.shared, machine.global);
}

void store_matrices(SharedAddress row, const Words4& x, Place where) {
    StoreMatrices argument = {
        machine.shared.write(self("store_matrices", where), row, kMatrixRowBytes), &x};
    machine.execute(kStoreMatrices, &argument, where);
}

void wgmma_fence(Place where) {
    machine.execute(kWgmmaFence, nullptr, where);
    machine.warpgroup_of(current.thread).registers(current.thread).fence();
}

void wgmma_commit(Place where) {
    int thread = current.thread;
    machine.execute(kWgmmaCommit, &thread, where);
}

SharedAddress warp_uniform(SharedAddress address, Place where) {
    UniformAddress x = {self("warp_uniform", where), address};
    machine.execute(kWarpUniform, &x, where);
    return address;
}

std::string current_device(DeviceFacts& facts) {
    facts = {machine.capability(), machine.multiprocessors()};
    return "";
}

namespace emulator {

void request_registers(const char* instruction, int registers, bool more, const Place& where) {
    RequestRegisters x = {self(instruction, where), registers, more};
    machine.execute(more ? kRegAlloc : kRegDealloc, &x, where);
    const int warp = current.thread / kWarpThreads;
    while (!machine.registers.try_acquire(warp)) machine.wait_for(machine.registers, x.actor);
    machine.wake(machine.registers);
}

void wgmma(std::span<float> accumulator, float (*widen)(uint16_t), const uint32_t* a_registers,
           Major major_a, Major major_b, uint64_t a, uint64_t b, bool accumulate,
           const Place& where) {
    WgmmaArguments x = {self("wgmma", where),
                        {static_cast<int>(2 * accumulator.size()), widen, a_registers != nullptr,
                         major_a, major_b, a, b, accumulate},
                        accumulator,
                        a_registers};
    machine.execute(kWgmma, &x, where);
}

void wgmma_wait(int pending, const Place& where) {
    machine.execute(kWgmmaWait, nullptr, where);
    Warpgroup& warpgroup = machine.warpgroup_of(current.thread);
    const int warp = current.thread / kWarpThreads % Warpgroup::kWarps;
    const uint32_t products = warpgroup.wgmmas_before(warp, pending);
    while (!warpgroup.have_started(products))
        machine.wait_for(warpgroup, self("wgmma_wait", where));
    warpgroup.finish(current.thread, products, machine.order, machine.shared);
}

void check_idle(const void* registers, const Place& where) {
    machine.warpgroup_of(current.thread)
        .registers(current.thread)
        .check_idle(self("warpgroup_fence_operand", where), registers);
}

}  // namespace emulator

}  // namespace jvp_attn
