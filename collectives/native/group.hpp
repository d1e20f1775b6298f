// The calls of one communicator on one rank, run in the order in which they were made.
//
// Communicators have boards of their own and never wait for each other. Whoever waits for a call steps the queue
// itself; the background thread steps the queues that nobody waits for.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "board.hpp"
#include "messages.hpp"
#include "operation.hpp"
#include "plan.hpp"
#include "scheduled.hpp"
#include "wait.hpp"

namespace collectives::engine {

using transports::Patience;
using transports::WaitPolicy;

// A collective that was started and is not waited for yet: as `direct` by its plan, or else by the table of a schedule.
struct Call : Pending {
    std::shared_ptr<const Plan> plan;
    std::shared_ptr<const TaskTable> table;
    const std::byte* input = nullptr;
    std::byte* output = nullptr;
    Scratch scratch;  // of a schedule; the group's
};

// Where a wait stands, for whoever has to explain it: a message's `call` is its tag.
struct Position {
    Label label;
    std::uint64_t call;
    std::vector<std::size_t> awaited;
};

// A call, or a message, that does not fit what its peer did.
struct Difference {
    std::size_t peer;
    std::uint64_t call;
    Label ours, theirs;
    std::uint64_t our_bytes = 0, their_bytes = 0;  // where the labels agree: what was expected, and what comes
};

class Group {
  public:
    struct Record {
        Traffic traffic;
        std::uint64_t calls = 0;
        double seconds = 0.0;  // in calls that waited for their end
    };

    Group(Board board, HeapRange heap, WaitPolicy policy)
        : board_(std::move(board)),
          heap_(heap),
          policy_(policy),
          records_(collective_count + 1, {Traffic(board_.size())}),
          messages_(board_, records_[collective_count].traffic, heap),
          links_(board_) {}
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    Board& board() { return board_; }
    // Of a collective; or, behind them all, of send and recv.
    const Record& record(std::size_t collective) const { return records_[collective]; }

    // A group that has failed once runs nothing any more; one that is closed ends what is under way and takes no more.
    bool alive() const { return !failed() && !board_.aborted(); }
    bool usable() const { return alive() && !closed_.load(std::memory_order_relaxed); }
    bool failed() const { return failed_.load(std::memory_order_relaxed); }
    void fail() { failed_.store(true, std::memory_order_relaxed); }
    void close() { closed_.store(true, std::memory_order_relaxed); }
    bool idle() const { return pending_.load(std::memory_order_acquire) == 0; }

    std::unique_lock<std::mutex> lock() {
        auto held = try_lock();
        if (!held) {
            const Count count(wanting_);
            held.lock();
        }
        return held;
    }
    std::unique_lock<std::mutex> try_lock() { return std::unique_lock(mutex_, std::try_to_lock); }

    // The lock must be held for `run`, `push`, `post` and `drive`, and not for `wait` and `poll`. A `Host` is told of
    // long waits: blocked() after each look in vain, release() before another thread is waited for, look(position,
    // seconds) every 20 ms, mismatch(difference), which throws.

    // Runs one call to its end; no other may be under way. `held`, the lock, is given up when the wait gets long and
    // another thread wants it: what this call waits for may depend on that thread's messages.
    template <typename Host>
    void run(std::unique_lock<std::mutex>& held, const std::shared_ptr<const Plan>& shared_plan, const std::byte* input,
             std::byte* output, Host& host) {
        const Plan& plan = *shared_plan;
        using Clock = std::chrono::steady_clock;
        const Clock::time_point began = plan.in_slot ? Clock::time_point{} : Clock::now();
        Operation operation = begin(plan, input, output);
        Patience patience(board_.self().door(), policy_);
        for (;;) {
            patience.listen();
            const Progress progress = operation.step();
            if (progress == Progress::done) break;
            if (progress == Progress::moved) {
                patience.reset();
            } else if (progress == Progress::mismatch) {
                report(operation, host);
            } else {
                host.blocked();
                if (patience.pause() || board_.aborted()) host.look(position(operation), patience.seconds());
                if (wanting_.load(std::memory_order_relaxed) == 0) continue;
                auto call = std::make_shared<Call>();
                call->plan = shared_plan;
                call->input = input;
                call->output = output;
                running_.emplace<Operation>(std::move(operation));
                push(call);
                const double before = plan.in_slot ? patience.seconds() : since(began);
                const Clock::time_point handed = Clock::now();
                held.unlock();
                wait(call, host);
                held = lock(host);
                records_[static_cast<std::size_t>(plan.collective)].seconds += before + since(handed);
                return;
            }
        }
        // To read the clock twice would make a small call a tenth slower: of those only long waits count.
        double& seconds = records_[static_cast<std::size_t>(plan.collective)].seconds;
        seconds += plan.in_slot ? patience.seconds() : since(began);
    }

    // Raises std::bad_alloc where a schedule needs more scratch memory than there is; nothing is begun then.
    void push(std::shared_ptr<Call> call) {
        if (call->table != nullptr) call->scratch = take_scratch(call->table->scratch_bytes);
        calls_pending_.push_back(std::move(call));
        pending_.fetch_add(1, std::memory_order_release);
    }

    void post(const std::shared_ptr<Message>& message) {
        Record& record = records_[collective_count];
        ++record.calls;
        messages_.post(message);
        pending_.fetch_add(1, std::memory_order_release);
        if (!message->sends || mismatched_ || failed()) return;
        const std::size_t before = messages_.pending();
        messages_.begin(message);
        pending_.fetch_sub(before - messages_.pending(), std::memory_order_release);
    }

    // Steps everything under way as far as it goes now; returns whether anything moved.
    bool drive() {
        if (failed()) return false;
        bool moved = false;
        while (!calls_pending_.empty() && !mismatched_) {
            Call& head = *calls_pending_.front();
            const bool timed = head.plan == nullptr || !head.plan->in_slot;
            if (running_.index() == 0) {
                begin(head);
                if (timed) head.began = std::chrono::steady_clock::now();
            }
            const Progress progress = step();
            if (progress == Progress::blocked) break;
            moved = true;
            if (progress == Progress::mismatch) {
                mismatched_ = true;
            } else if (progress == Progress::done) {
                running_.emplace<std::monostate>();
                if (timed) head.ended = std::chrono::steady_clock::now();
                keep_scratch(std::move(head.scratch));
                head.done.store(true, std::memory_order_release);
                calls_pending_.pop_front();
                pending_.fetch_sub(1, std::memory_order_release);
            }
        }
        if (!messages_.idle() && !mismatched_) {
            const std::size_t before = messages_.pending();
            const Progress progress = messages_.step();
            pending_.fetch_sub(before - messages_.pending(), std::memory_order_release);
            mismatched_ = progress == Progress::mismatch;
            moved = moved || progress != Progress::blocked;
        }
        return moved;
    }

    template <typename Host>
    void wait(const std::shared_ptr<Pending>& pending, Host& host) {
        const Count count(waiters_);
        Patience patience(board_.self().door(), policy_);
        while (!pending->done.load(std::memory_order_acquire)) {
            patience.listen();
            bool moved = false;
            {
                const auto held = lock(host);
                moved = drive();
                check(host);
            }
            if (moved) {
                patience.reset();
                continue;
            }
            host.blocked();
            if (!patience.pause() && alive()) continue;
            host.look(locked_position(*pending, host), patience.seconds());
        }
    }

    // Steps what is under way; returns whether `pending` is done. Who polls learns as soon as who waits that it never
    // will be.
    template <typename Host>
    bool poll(const std::shared_ptr<Pending>& pending, Host& host) {
        using Clock = std::chrono::steady_clock;
        if (pending->done.load(std::memory_order_acquire)) return true;
        bool looks = !alive();
        {
            const auto held = lock(host);
            drive();
            check(host);
            const Clock::time_point now = Clock::now();
            if (looks || now - polled_ >= Patience::looking) {
                polled_ = now;
                looks = true;
            }
        }
        if (looks && !pending->done.load(std::memory_order_acquire)) {
            host.look(locked_position(*pending, host), 0.0);
        }
        return pending->done.load(std::memory_order_acquire);
    }

    // Tells the host of a mismatch that `drive` has met.
    template <typename Host>
    void check(Host& host) {
        if (!mismatched_) return;
        if (messages_.differing() != nullptr) {
            const Message& message = *messages_.differing();
            host.mismatch({message.peer, message.tag, message.label, messages_.their_label()});
        }
        if (const auto* const scheduled = std::get_if<Scheduled>(&running_)) {
            const std::size_t peer = scheduled->differing_peer();
            host.mismatch({peer, scheduled->call(), scheduled->table().label, scheduled->their_label(),
                           scheduled->expected_bytes(), scheduled->their_bytes()});
        }
        report(std::get<Operation>(running_), host);
    }

    bool awaited() const { return waiters_.load(std::memory_order_relaxed) > 0; }

  private:
    struct Count {
        explicit Count(std::atomic<int>& value) : value_(value) { value_.fetch_add(1, std::memory_order_relaxed); }
        Count(const Count&) = delete;
        Count& operator=(const Count&) = delete;
        ~Count() { value_.fetch_sub(1, std::memory_order_relaxed); }
        std::atomic<int>& value_;
    };

    static double since(std::chrono::steady_clock::time_point began) {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    }

    // What is kept for the next schedule; larger scratch memory is given back.
    static constexpr std::size_t most_scratch = 64 * 1024 * 1024;

    Scratch take_scratch(std::size_t bytes) {
        if (bytes <= spare_.bytes) return std::exchange(spare_, {});
        return {std::make_unique_for_overwrite<std::byte[]>(bytes), bytes};
    }

    void keep_scratch(Scratch scratch) {
        if (scratch.bytes > spare_.bytes && scratch.bytes <= most_scratch) spare_ = std::move(scratch);
    }

    void begin(Call& call) {
        if (call.table == nullptr) {
            running_.emplace<Operation>(begin(*call.plan, call.input, call.output));
            return;
        }
        Record& record = records_[static_cast<std::size_t>(call.table->collective)];
        ++record.calls;
        running_.emplace<Scheduled>(board_, links_, record.traffic, *call.table, ++calls_, call.input, call.output,
                                    call.scratch.data.get());
    }

    Progress step() {
        if (auto* const scheduled = std::get_if<Scheduled>(&running_)) return scheduled->step();
        return std::get<Operation>(running_).step();
    }

    Operation begin(const Plan& plan, const std::byte* input, std::byte* output) {
        Record& record = records_[static_cast<std::size_t>(plan.collective)];
        ++record.calls;
        const std::uint64_t first = pieces_;
        pieces_ += plan.pieces;
        return Operation(board_, record.traffic, scratch_, plan, ++calls_, first, heap_, input, output);
    }

    template <typename Host>
    void report(Operation& operation, Host& host) {
        const std::size_t peer = operation.differing_peer();
        host.mismatch({peer, operation.call(), operation.plan().label, board_.slot(peer, operation.call()).label});
    }

    Position position(Operation& operation) { return {operation.plan().label, operation.call(), operation.awaited()}; }

    // Whoever holds the lock may need the interpreter before it lets go: nobody waits for it holding the interpreter.
    template <typename Host>
    std::unique_lock<std::mutex> lock(Host& host) {
        auto held = try_lock();
        if (!held) {
            host.release();
            held = lock();
        }
        return held;
    }

    template <typename Host>
    Position locked_position(const Pending& pending, Host& host) {
        const auto held = lock(host);
        return where(pending);
    }

    Position where(const Pending& pending) {
        if (const auto* const message = dynamic_cast<const Message*>(&pending)) {
            return {message->label, message->tag, {message->peer}};
        }
        if (auto* const scheduled = std::get_if<Scheduled>(&running_)) {
            return {scheduled->table().label, scheduled->call(), scheduled->awaited()};
        }
        if (auto* const operation = std::get_if<Operation>(&running_)) return position(*operation);
        return {};
    }

    Board board_;
    HeapRange heap_;
    WaitPolicy policy_;
    std::vector<Record> records_;
    Messages messages_;
    Links links_;
    Scratch spare_;
    std::vector<const std::byte*> scratch_;
    std::mutex mutex_;
    std::deque<std::shared_ptr<Call>> calls_pending_;
    std::variant<std::monostate, Operation, Scheduled> running_;
    bool mismatched_ = false;
    std::chrono::steady_clock::time_point polled_{};  // when a poll last looked around
    std::atomic<std::size_t> pending_ = 0;            // calls and messages under way
    std::atomic<int> wanting_ = 0;                    // threads that wait for the lock
    std::atomic<int> waiters_ = 0;                    // threads that step them because they wait for one
    std::atomic<bool> failed_ = false, closed_ = false;
    std::uint64_t calls_ = 0;
    std::uint64_t pieces_ = 0;
};

// Steps, in a thread of its own, the queues of all groups that have calls in flight and nobody who waits for them.
class Background {
  public:
    // One a process, also in a forked child, where the thread of the parent does not run. Never destroyed: the thread
    // may outlive main.
    static Background& instance() {
        static const int registered = [] {
            current_ = new Background;
            return pthread_atfork(nullptr, nullptr, [] { current_ = new Background; });
        }();
        static_cast<void>(registered);
        return *current_;
    }

    void serve(const std::shared_ptr<Group>& group) {
        const std::lock_guard lock(mutex_);
        if (ending_) return;
        groups_.push_back(group);
        came_.store(true, std::memory_order_release);
        if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
        if (sleeps_) wake_.notify_one();
    }

    // Of a group that has failed: the thread looks at nothing of it after this, so its memory may go.
    void forget(const std::shared_ptr<Group>& group) {
        std::unique_lock lock(mutex_);
        std::erase(groups_, group);
        dropped_.wait(lock, [&] { return !knows(group); });
    }

    // No thread touches any array after this.
    void stop() {
        {
            const std::lock_guard lock(mutex_);
            ending_ = true;
            came_.store(true, std::memory_order_release);
            wake_.notify_one();
        }
        if (thread_.joinable()) thread_.join();
    }

  private:
    // For so long the thread keeps looking for the next call before it sleeps: to wake it costs the caller some
    // microseconds.
    static constexpr std::chrono::milliseconds lingering{1};

    void loop() {
        std::optional<Patience> patience;
        while (take_in()) {
            if (!patience) patience.emplace(active_[0]->board().self().door(), WaitPolicy{1});
            patience->listen();
            bool moved = false, over = false;
            for (const std::shared_ptr<Group>& group : active_) {
                if (!group->awaited()) moved = advance(*group) || moved;
                over = over || is_over(*group);
            }
            if (over) {
                patience.reset();  // its doorbell may go with a group
                const std::lock_guard lock(mutex_);
                std::erase_if(active_, [](const std::shared_ptr<Group>& group) { return is_over(*group); });
                dropped_.notify_all();
            } else if (moved) {
                patience->reset();
            } else {
                patience->pause();
            }
        }
        patience.reset();
        const std::lock_guard lock(mutex_);
        active_.clear();
        dropped_.notify_all();
    }

    // Where memory runs out in the middle of a call, whoever waits for it learns that the group has failed.
    static bool advance(Group& group) {
        try {
            const auto lock = group.try_lock();
            return lock && group.drive();
        } catch (const std::bad_alloc&) {
            group.fail();
            return false;
        }
    }

    static bool is_over(const Group& group) { return group.idle() || !group.alive(); }

    bool knows(const std::shared_ptr<Group>& group) const {
        return std::find(active_.begin(), active_.end(), group) != active_.end();
    }

    // Adds the groups that have come, waiting for some when there are none at all; false: the thread ends.
    bool take_in() {
        if (active_.empty()) {
            const auto until = std::chrono::steady_clock::now() + lingering;
            while (!came_.load(std::memory_order_acquire) && std::chrono::steady_clock::now() < until) sched_yield();
        } else if (!came_.load(std::memory_order_acquire)) {
            return true;
        }
        std::unique_lock lock(mutex_);
        if (active_.empty()) {
            sleeps_ = true;
            wake_.wait(lock, [this] { return ending_ || !groups_.empty(); });
            sleeps_ = false;
        }
        if (ending_) return false;
        for (const auto& group : groups_) {
            if (!knows(group)) active_.push_back(group);
        }
        groups_.clear();
        came_.store(false, std::memory_order_release);
        return true;
    }

    inline static Background* current_ = nullptr;
    std::mutex mutex_;
    std::condition_variable wake_, dropped_;
    std::vector<std::shared_ptr<Group>> groups_;  // that have come and are not taken in yet
    std::vector<std::shared_ptr<Group>> active_;  // the thread's: others read it under the lock, which changes need too
    bool ending_ = false, sleeps_ = false;
    std::atomic<bool> came_ = false;  // groups, or the end
    std::thread thread_;
};

}  // namespace collectives::engine
