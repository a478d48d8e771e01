// The registers of a thread that products in the background (wgmma) read and write.
//
// From its start to the wait, an accumulator is full of the NaN of in_flight.h, and its values are
// kept here: whoever uses them meanwhile is found by that NaN; whoever changes them, or the
// registers of a factor, at the wait.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

class ProductRegisters {
public:
    using Fragment = std::span<const uint32_t, 4>;

    void start_thread();

    // wgmma_fence: products may use the registers as they are now.
    void fence();

    // A product that is the number-th of the warpgroup takes the accumulator.
    void start(const Actor& actor, std::span<float> accumulator, uint32_t number);
    // The same with a factor in registers.
    void start(const Actor& actor, Fragment factor, uint32_t number);

    // Where the values of an accumulator are now.
    std::span<float> values(const float* accumulator);

    // The products below that number are over, and their registers the thread's own.
    void finish(uint32_t number);

    // An error if products work on the registers.
    void check_idle(const Actor& actor, const void* registers) const;
    void check_finished() const;

private:
    // The registers at an address that is known since they were first in a product.
    template <class Value>
    struct Registers {
        const Value* address;
        std::vector<Value> values;    // of an accumulator in flight, or those that a factor had
        std::vector<Value> at_fence;  // empty if there has been none
        bool in_flight;
        uint32_t last_product;
        Actor actor;  // that started it

        void remember_at_fence();
        bool is_as_at_fence() const;
        void check_is_unchanged() const;
    };

    void check_fenced(const Actor& actor) const;

    std::vector<Registers<float>> accumulators_;
    std::vector<Registers<uint32_t>> factors_;
    bool fenced_ = false;  // since the start or the last wait
};

}  // namespace jvp_attn::emulator
