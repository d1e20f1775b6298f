// How a rank waits for another one: spin, then yield the processor, then sleep on a futex.
//
// Every process has a doorbell in shared memory. A waiter that goes to sleep first counts itself in `sleepers`; whoever
// publishes something looks at that count and, only if it is not zero, rings. Between the publisher's store and its
// look at the count there is no fence, since it would cost every message some ten nanoseconds: a ring may be missed
// when both happen within a store buffer's delay. So no sleep is longer than 10 ms, and the first ones are 50 µs.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <ctime>

namespace collectives::transports {

// Processors fetch lines of 64 bytes in pairs: what different ranks write lies this far apart.
inline constexpr std::size_t line_bytes = 128;

// At the beginning of every rank's heap.
struct alignas(line_bytes) Doorbell {
    std::uint32_t bell;
    std::uint32_t sleepers;
    alignas(line_bytes) std::uint32_t aborted;
};

inline std::atomic_ref<std::uint32_t> atomic(std::uint32_t& word) { return std::atomic_ref<std::uint32_t>(word); }
inline std::atomic_ref<std::uint64_t> atomic(std::uint64_t& word) { return std::atomic_ref<std::uint64_t>(word); }
static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free &&
              std::atomic_ref<std::uint32_t>::is_always_lock_free);

// Wake whoever sleeps at this doorbell; costs one load when nobody does.
inline void ring(Doorbell& door) {
    if (atomic(door.sleepers).load(std::memory_order_relaxed) == 0) return;
    atomic(door.bell).fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &door.bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline void pause_processor() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct WaitPolicy {
    unsigned spins = 2000;  // looks before the processor is yielded: few where ranks outnumber processors
};

// One wait, from its first failed look to the next success.
//
//     Patience patience(door, policy);
//     while (patience.listen(), !ready()) if (patience.pause()) look_around();
class Patience {
  public:
    static constexpr std::chrono::milliseconds looking{20};

    Patience(Doorbell& door, WaitPolicy policy) : door_(door), policy_(policy) {}
    Patience(const Patience&) = delete;
    Patience& operator=(const Patience&) = delete;
    ~Patience() { leave(); }

    // To be called before the look whose failure leads to `pause`.
    void listen() {
        if (asleep_) heard_ = atomic(door_.bell).load(std::memory_order_acquire);
    }

    // Wait a little. Returns true every 20 ms or so: time to look after signals, deadlines and dead peers.
    bool pause() {
        if (looks_++ < policy_.spins) {
            pause_processor();
            return false;
        }
        const Clock::time_point now = Clock::now();
        if (looks_ == policy_.spins + 1) {
            began_ = looked_ = now;
            if (crowded.load(std::memory_order_relaxed) > 0) crowded.fetch_sub(1, std::memory_order_relaxed);
        }
        if (looks_ <= policy_.spins + yields()) {
            sched_yield();
            if (Clock::now() - now > foreign_turn) crowded.store(waits_crowded, std::memory_order_relaxed);
        } else if (!asleep_) {
            asleep_ = true;
            atomic(door_.sleepers).fetch_add(1, std::memory_order_seq_cst);
        } else {
            sleep(std::clamp<Clock::duration>((now - began_) / 4, shortest_sleep, longest_sleep));
        }
        if (now - looked_ < looking) return false;
        looked_ = now;
        return true;
    }

    // Something came: the next wait begins with spinning again.
    void reset() {
        seconds_ += blocked();
        looks_ = 0;
        leave();
    }

    // Seconds waited, apart from those spent spinning.
    double seconds() const { return seconds_ + blocked(); }

  private:
    using Clock = std::chrono::steady_clock;
    // Beside other programs each yield forfeits a time slice to them, which a sleeper is granted when it wakes: there a
    // rank yields a few times only. A yield that lasts as long as such a slice tells. Yields are counted, not timed,
    // since one may last as long as another rank's turn.
    static constexpr unsigned many_yields = 2000, few_yields = 20;
    static constexpr Clock::duration foreign_turn = std::chrono::microseconds(500);
    static constexpr int waits_crowded = 200;
    static inline std::atomic<int> crowded = 0;  // for how many more waits this processor counts as crowded
    unsigned yields() const { return crowded.load(std::memory_order_relaxed) > 0 ? few_yields : many_yields; }

    static constexpr Clock::duration shortest_sleep = std::chrono::microseconds(50);
    static constexpr Clock::duration longest_sleep = std::chrono::milliseconds(10);

    double blocked() const {
        return looks_ > policy_.spins ? std::chrono::duration<double>(Clock::now() - began_).count() : 0.0;
    }

    void leave() {
        if (asleep_) atomic(door_.sleepers).fetch_sub(1, std::memory_order_relaxed);
        asleep_ = false;
    }

    void sleep(Clock::duration duration) {
        const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
        timespec limit{};
        limit.tv_nsec = static_cast<decltype(limit.tv_nsec)>(nanoseconds);
        syscall(SYS_futex, &door_.bell, FUTEX_WAIT, heard_, &limit, nullptr, 0);
    }

    Doorbell& door_;
    WaitPolicy policy_;
    unsigned looks_ = 0;
    bool asleep_ = false;
    std::uint32_t heard_ = 0;
    Clock::time_point began_{}, looked_{};
    double seconds_ = 0.0;
};

}  // namespace collectives::transports
