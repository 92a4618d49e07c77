// What was found, as JSON, and the settings: the simulator's face to Python.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <set>
#include <tuple>

#include "runtime.h"

namespace sim {

struct Finding {
    std::string kind, message, kernel;
    At at;
    const void* other_pc;
};

constexpr size_t kMostFindings = 50;
static std::vector<Finding> findings;
static std::string message_of_last;

[[noreturn]] void abandon();

std::string print(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

std::string name_thread(const Thread& thread) {
    const dim3 b = launch.block;
    std::string name = b.y == 1 && b.z == 1 ? print("thread %u", thread.index.x)
                                            : print("thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
    const dim3 g = launch.grid;
    if (g.y == 1 && g.z == 1) return name + print(" of block %u", blockIdx.x);
    return name + print(" of block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

std::string name_place(At at) {
    const char* slash = std::strrchr(at.file, '/');
    return print("%s:%d", slash ? slash + 1 : at.file, at.line);
}

void note(const char* kind, At at, const std::string& message, const void* other_pc) {
    for (const Finding& f : findings)  // one of each pair of lines is enough
        if (f.kind == kind && f.at.pc == at.pc && f.at.line == at.line && f.other_pc == other_pc) return;
    if (findings.size() < kMostFindings) findings.push_back({kind, message, launch.kernel, at, other_pc});
}

void fail(const char* kind, At at, const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    note(kind, at, text);
    abandon();
}

bool anything_found() { return !findings.empty(); }

// Accesses as the memory system sees them: what the lanes of a warp do at one place of the code, the n-th time each, is one
// request.
struct SiteKey {
    const char* kernel;
    const void* pc;
    bool shared;
    Access access;
    size_t bytes;
    bool operator<(const SiteKey& other) const {
        return std::tie(kernel, pc, shared, access, bytes) < std::tie(other.kernel, other.pc, other.shared, other.access, other.bytes);
    }
};
struct Site {
    At at;
    std::vector<uint32_t> times;                                             // by thread
    std::map<std::pair<int, uint32_t>, std::vector<std::pair<int, uintptr_t>>> requests;  // (warp, time): (lane, address)
    uint64_t count = 0, parts = 0, least = 0;
};
static std::map<SiteKey, Site> sites;
static uint32_t recorded_block = ~0u;

// Shared memory serves a request in phases of 128 bytes at most (8 lanes of 16 bytes); in one phase each of 32 banks gives one
// word. Global memory moves sectors of 32 bytes.
static void count_parts(const SiteKey& key, Site& site) {
    for (auto& [time, lanes] : site.requests) {
        ++site.count;
        if (key.shared) {
            const int together = key.bytes >= 16 ? 8 : key.bytes == 8 ? 16 : 32;
            std::map<int, std::map<uintptr_t, std::set<uintptr_t>>> phases;
            for (auto [lane, address] : lanes)
                for (uintptr_t word = address / 4; word <= (address + key.bytes - 1) / 4; ++word)
                    phases[lane / together][word % 32].insert(word);
            for (auto& [phase, banks] : phases) {
                size_t most = 0, words = 0;
                for (auto& [bank, in_bank] : banks) {
                    most = std::max(most, in_bank.size());
                    words += in_bank.size();
                }
                site.parts += most;
                site.least += (words + 31) / 32;
            }
        } else {
            std::set<uintptr_t> sectors, units;
            for (auto [lane, address] : lanes)
                for (uintptr_t b = address; b < address + key.bytes; b += std::min<size_t>(key.bytes, 4)) {
                    sectors.insert(b / 32);
                    units.insert(b);
                }
            site.parts += sectors.size();
            site.least += (units.size() * std::min<size_t>(key.bytes, 4) + 31) / 32;
        }
    }
    site.requests.clear();
    site.times.clear();
}

void record(const void* p, size_t bytes, Access access, At at, const void* pc) {
    if (!settings.record || !running) return;
    if (recorded_block != block_number) {
        for (auto& [key, site] : sites) count_parts(key, site);
        recorded_block = block_number;
    }
    const bool shared = in_shared(p, bytes);
    Site& site = sites[{launch.kernel, pc, shared, access, bytes}];
    site.at = at;
    if (site.times.size() < threads.size()) site.times.resize(threads.size());
    const uintptr_t address = shared ? static_cast<const char*>(p) - shared_base : reinterpret_cast<uintptr_t>(p);
    site.requests[{current->warp, site.times[current->id]++}].emplace_back(current->lane, address);
}

static std::string quote(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return out + "\"";
}

}  // namespace sim

using namespace sim;

// Where the call before this return address lies in the library's file; 0 for none.
static size_t offset_of(const void* pc) {
    Dl_info info;
    if (!pc || !dladdr(pc, &info)) return 0;
    return static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
}

// Findings and counts since sim_clear(). A place in the code without a file and line is an offset in the library's file.
API const char* sim_report() {
    static std::string json;
    json = "{\"findings\": [";
    for (size_t i = 0; i < findings.size(); ++i) {
        const Finding& f = findings[i];
        json += print("%s{\"kind\": \"%s\", \"file\": %s, \"line\": %d, \"pc\": %zu, \"other_pc\": %zu, \"kernel\": ", i ? ", " : "",
                      f.kind.c_str(), quote(f.at.file ? f.at.file : "").c_str(), f.at.line, offset_of(f.at.pc),
                      offset_of(f.other_pc));
        json += quote(f.kernel) + ", \"message\": " + quote(f.message) + "}";
    }
    json += print("], \"launches\": %u, \"mutant_hits\": %ld, \"requests\": [", launch.number, mutant_hits);
    bool first = true;
    for (auto& [key, site] : sites) {
        count_parts(key, site);
        json += print("%s{\"file\": %s, \"line\": %d, \"pc\": %zu, \"kernel\": %s, \"space\": \"%s\", \"access\": \"%s\", ",
                      first ? "" : ", ", quote(site.at.file ? site.at.file : "").c_str(), site.at.line, offset_of(key.pc),
                      quote(key.kernel).c_str(), key.shared ? "shared" : "global",
                      key.access == Access::read ? "read" : key.access == Access::write ? "write" : "atomic");
        json += print("\"bytes\": %zu, \"requests\": %llu, \"parts\": %llu, \"least\": %llu}", key.bytes,
                      (unsigned long long)site.count, (unsigned long long)site.parts, (unsigned long long)site.least);
        first = false;
    }
    json += "]}";
    return json.c_str();
}

API void sim_clear() {
    findings.clear();
    sites.clear();
    mutant_hits = 0;
}

// Returns 0, or -1 for a name or value that is not known.
API int sim_set(const char* name, long long value) {
    const std::string what = name;
    if (what == "schedule" && value >= 0 && value <= 3)
        settings.schedule = static_cast<Schedule>(value);
    else if (what == "seed")
        settings.seed = static_cast<uint64_t>(value);
    else if (what == "late_copies")
        settings.late_copies = value != 0;
    else if (what == "architecture")
        settings.architecture = static_cast<int>(value);
    else if (what == "record")
        settings.record = value != 0;
    else if (what == "mutant")
        mutant = static_cast<int>(value);
    else
        return -1;
    return 0;
}

API const char* launch_message(int error) {
    message_of_last = error ? "the launch was refused: another kernel is running" : "no error";
    if (error && !findings.empty()) {
        const Finding& f = findings.front();
        message_of_last = f.kind + ": " + f.message;
        if (f.at.file) message_of_last += " (" + name_place(f.at) + ")";
    }
    return message_of_last.c_str();
}
