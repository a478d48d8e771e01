// The registers of a thread that asynchronous products (wgmma) read and write.
//
// From the wgmma to its wait, an accumulator is filled with the NaN of in_flight.h, and its values
// are kept here. Instructions that read it report that NaN. The wait reports changes of the
// accumulator, or of an operand in registers.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "report.h"

namespace jvp_attn::emulator {

class WgmmaRegisters {
public:
    using Fragment = std::span<const uint32_t, 4>;

    void start_thread();

    // wgmma_fence: later wgmmas use the registers as they are now.
    void fence();

    // The number-th wgmma of the warpgroup takes the accumulator.
    void start(const Actor& actor, std::span<float> accumulator, uint32_t number);
    // The same for an operand in registers.
    void start(const Actor& actor, Fragment operand, uint32_t number);

    // The values of an accumulator that is in flight.
    std::span<float> values(const float* accumulator);

    // The wgmmas below that number are complete; the thread may use their registers.
    void finish(uint32_t number);

    // An error if the registers are in flight.
    void check_idle(const Actor& actor, const void* registers) const;
    void check_finished() const;

private:
    // The registers at an address, since a wgmma first used them.
    template <class Value>
    struct Registers {
        const Value* address;
        std::vector<Value> values;    // of an accumulator in flight, or of an operand at its wgmma
        std::vector<Value> at_fence;  // empty if there has been none
        bool in_flight;
        uint32_t last_product;
        Actor actor;  // that issued it

        void store_at_fence();
        bool is_as_at_fence() const;
        void check_is_unchanged() const;
    };

    void check_fenced(const Actor& actor) const;

    std::vector<Registers<float>> accumulators_;
    std::vector<Registers<uint32_t>> operands_;
    bool fenced_ = false;  // since the last wait, or the start
};

}  // namespace jvp_attn::emulator
