// What the race check remembers of each four bytes: the last accesses that may still be unordered with a later one.
#pragma once

#include <cstdint>
#include <vector>

namespace sim {

struct Seen {
    uint32_t interval = 0;  // between two barriers; 0: nothing
    uint32_t clock = 0;     // the thread's own count of warp synchronisations
    int32_t pc = 0;         // of the kernel's code, from a fixed function of this library
    uint16_t thread = 0;
    uint8_t bytes = 0;      // which of the four
    uint8_t access = 0;
};

struct Word {
    Seen seen[4];
    uint32_t interval = 0;   // of the first write in this block, for shared memory
    uint8_t written = 0;     // bytes that hold a value
    uint8_t in_flight = 0;   // bytes that an asynchronous copy is on its way to
};

class Shadow {
  public:
    explicit Shadow(size_t bytes) : words(bytes / 4 + 1) {}
    std::vector<Word> words;
};

}  // namespace sim
