// Counts compared numbers, and describes the first that is not as expected.
#pragma once

#include <cstdio>
#include <string>

namespace jvp_attn::witness {

class Comparison {
public:
    // csrc's number, and CuTe's. A text and two indices say what it is.
    template <class Number>
    void equal(Number csrc, Number expected, const char* what, int i = 0, int j = 0) {
        ++numbers_;
        if (csrc == expected) return;
        if (++differences_ == 1)
            first_ = std::string(what) + " (" + std::to_string(i) + ", " + std::to_string(j) +
                     ") is " + std::to_string(csrc) + " instead of " + std::to_string(expected);
    }

    // What must hold for the numbers to mean anything.
    void require(bool condition, const char* what) {
        if (!condition && ++differences_ == 1) first_ = std::string("not so: ") + what;
    }

    // A line for test_cute.py.
    void print(const char* name) const {
        std::printf("%s\t%ld\t%ld\t%s\n", name, numbers_, differences_, first_.c_str());
        std::fflush(stdout);
    }

private:
    long numbers_ = 0, differences_ = 0;
    std::string first_;
};

inline void run(const char* name, void (*compare)(Comparison&)) {
    Comparison comparison;
    compare(comparison);
    comparison.print(name);
}

}  // namespace jvp_attn::witness
