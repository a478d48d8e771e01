// Four warps that multiply together: their products (wgmma) in the background.
//
// A product is performed when the first thread waits for it: of all moments the one that shows
// factors that change meanwhile.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "order.h"
#include "product_registers.h"
#include "products.h"
#include "report.h"
#include "shared_memory.h"
#include "waiting.h"

namespace jvp_attn::emulator {

// What a thread brings to a product.
struct StartProduct {
    Actor actor;
    Product product;
    std::span<float> accumulator;
    const uint32_t* a;  // null if A is in shared memory
};

class Warpgroup : public Awaited {
public:
    static constexpr int kWarps = 4;
    static constexpr int kThreads = 32 * kWarps;

    void start_block(int first_thread, int agent);
    ProductRegisters& registers(int thread) { return registers_[thread % kThreads]; }

    // All lanes of a warp come to a product. Returns whether all four warps have.
    bool start(std::span<const StartProduct* const> lanes, const Order& order,
               SharedMemory& shared);
    void commit(int warp);

    // How many products a warp has to wait for if at most `pending` groups may be under way.
    uint32_t products_before(int warp, int pending) const;
    bool have_started(uint32_t products) const;
    // A thread has waited for so many products, all of which have been started.
    void finish(int thread, uint32_t products, Order& order, const SharedMemory& shared);

    std::string state() const override;

private:
    struct Started {
        Actor actor = {};
        Product product = {};
        int warps = 0;        // that have come to it
        Knowledge knowledge;  // of all its threads
        std::vector<SharedAddress> a, b;
        std::array<ProductThread, kThreads> threads;
        std::array<const float*, kThreads> accumulators;
        std::array<std::array<uint32_t, 4>, kThreads> fragments;
    };

    void check_factors(uint32_t number, const Order& order, SharedMemory& shared);
    void perform_first(const SharedMemory& shared);

    int first_thread_ = 0;
    int agent_ = 0;
    std::array<ProductRegisters, kThreads> registers_;
    std::array<uint32_t, kWarps> started_ = {};                 // products, by warp
    std::array<std::vector<uint32_t>, kWarps> ends_of_groups_;  // in products, by warp
    std::deque<Started> products_;                              // not yet performed
    uint32_t performed_ = 0;
};

}  // namespace jvp_attn::emulator
