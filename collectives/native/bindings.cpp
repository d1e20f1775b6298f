// The Python face of the native engine.
//
// The named methods of Group (all_reduce, all_gather …) are the fast path of the communicator's: they take exactly the
// arrays that need no thought, numpy arrays that lie contiguous in memory, and return False for everything else, having
// done nothing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/ndarraytypes.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "board.hpp"
#include "dispatch.hpp"
#include "group.hpp"
#include "operation.hpp"
#include "plan.hpp"
#include "task_table.hpp"
#include "types.hpp"

namespace nb = nanobind;
namespace kernels = collectives::kernels;
using namespace collectives::engine;
using collectives::transports::Member;

namespace {

// What Python says once, when it makes a group.
struct Setting {
    nb::object ndarray;                             // numpy.ndarray
    std::vector<std::pair<int, int>> type_numbers;  // numpy's type number, our dtype code
    std::vector<nb::object> operations;  // ReduceOp members in the order of the fingerprint; AVG is the second
    std::vector<int> operation_codes;    // the code of each in the kernels' tables
    nb::object look;      // (label, call, seconds, awaited ranks, their last calls, what a signal raised, the timeout
                          // if not the communicator's): raises to give up
    nb::object mismatch;  // (peer, our label, its label, call, our bytes, its bytes): always raises
    std::string instruction_set;
    unsigned spins;
};

constexpr std::size_t average = 1;

struct Array {
    std::byte* data = nullptr;
    std::size_t count = 0;
    std::size_t dtype = 0;
};

class PyGroup;

// Stands between a waiting call and the interpreter: gives the lock up when the wait gets long, takes it to look
// around.
class Host {
  public:
    explicit Host(const PyGroup& group, bool eager, std::optional<double> timeout = {})
        : group_(group), timeout_(timeout) {
        if (eager) release();
    }
    Host(const Host&) = delete;
    Host& operator=(const Host&) = delete;
    ~Host() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    void blocked() {
        if (++looks_ > patient_looks) release();
    }
    void release() {
        if (state_ == nullptr) state_ = PyEval_SaveThread();
    }
    void look(const Position& position, double seconds);
    [[noreturn]] void mismatch(const Difference& difference);

  private:
    static constexpr unsigned patient_looks = 100;
    const PyGroup& group_;
    std::optional<double> timeout_;
    unsigned looks_ = 0;
    PyThreadState* state_ = nullptr;
};

nb::bytes to_bytes(const Label& label) { return nb::bytes(reinterpret_cast<const char*>(label.data()), label.size()); }

Label to_label(const nb::bytes& bytes) {
    Label label;
    std::memcpy(label.data(), bytes.c_str(), label.size());
    return label;
}

// A task as `collectives/mapped.py` gives it: the numbers of a TaskRow in its order, up to `waits`, then its
// dependents.
using RowOfNumbers = std::pair<std::array<std::size_t, 10>, std::vector<std::uint32_t>>;

TaskRow to_row(const RowOfNumbers& row) {
    const auto& [n, dependents] = row;
    return {static_cast<TaskKind>(n[0]),
            n[1],
            static_cast<Buffer>(n[2]),
            n[3],
            static_cast<Buffer>(n[4]),
            n[5],
            n[6],
            n[7],
            n[8],
            static_cast<std::uint32_t>(n[9]),
            dependents};
}

class PyGroup {
  public:
    PyGroup(std::size_t rank, const std::vector<std::tuple<std::uintptr_t, std::uintptr_t, int>>& members,
            std::size_t heap_bytes, Setting setting)
        : setting_(std::move(setting)) {
        std::vector<Member> mapped;
        for (const auto& [heap, board, process] : members) {
            mapped.push_back({reinterpret_cast<std::byte*>(heap), reinterpret_cast<std::byte*>(board), process});
        }
        const std::byte* own = mapped[rank].heap;
        group_ = std::make_shared<Group>(Board(rank, std::move(mapped), Geometry{members.size()}),
                                         HeapRange{own, own + heap_bytes}, WaitPolicy{setting_.spins});
        for (const kernels::KernelTable* table : kernels::runnable_tables()) {
            if (table_ == nullptr || setting_.instruction_set == table->name) table_ = table;
        }
        for (const auto& [number, code] : setting_.type_numbers) {
            if (number >= 0 && number < small_types) dtype_of_[number] = static_cast<signed char>(code);
        }
    }

    PyGroup(const PyGroup&) = delete;
    PyGroup& operator=(const PyGroup&) = delete;
    ~PyGroup() {
        // The background thread may still know the group, and the heaps go next.
        group_->fail();
        const nb::gil_scoped_release unlocked;
        Background::instance().forget(group_);
    }

    const Setting& setting() const { return setting_; }
    Group& group() const { return *group_; }

    bool all_reduce(nb::handle x, nb::handle op) {
        Array array;
        std::size_t operation = 0;
        if (!find(x, array) || !find_operation(op, operation)) return false;
        return run_fast(Collective::all_reduce, array.dtype, operation + 1, 0, array.count, array.data, array.data);
    }

    bool reduce_scatter(nb::handle x, nb::handle out, nb::handle op) {
        Array array, target;
        std::size_t operation = 0;
        if (!find(x, array) || !find(out, target) || !find_operation(op, operation)) return false;
        if (!matches(array, target, size()) || !apart_or_at(array, target, board().rank())) return false;
        return run_fast(Collective::reduce_scatter, array.dtype, operation + 1, 0, target.count, array.data,
                        target.data);
    }

    bool all_gather(nb::handle x, nb::handle out) {
        Array array, target;
        if (!find(x, array) || !find(out, target)) return false;
        if (!matches(target, array, size()) || !apart_or_at(target, array, board().rank())) return false;
        return run_fast(Collective::all_gather, array.dtype, 0, 0, array.count, array.data, target.data);
    }

    bool all_to_all(nb::handle x, nb::handle out) {
        Array array, target;
        if (!find(x, array) || !find(out, target)) return false;
        if (!matches(array, target, 1) || array.count % size() != 0 || !apart_or_at(array, target, 0)) return false;
        return run_fast(Collective::all_to_all, array.dtype, 0, 0, array.count / size(), array.data, target.data);
    }

    bool broadcast(nb::handle x, nb::handle root_object) {
        Array array;
        std::size_t root = 0;
        if (!find_root(root_object, root) || !find(x, array)) return false;
        return run_fast(Collective::broadcast, array.dtype, 0, root, array.count, array.data, array.data);
    }

    bool scan(nb::handle x, nb::handle op) {
        Array array;
        std::size_t operation = 0;
        if (!find(x, array) || !find_operation(op, operation)) return false;
        return run_fast(Collective::scan, array.dtype, operation + 1, 0, array.count, array.data, array.data);
    }

    bool reduce(nb::handle x, nb::handle root_object, nb::handle op, nb::handle out) {
        Array array, target;
        std::size_t operation = 0, root = 0;
        if (!find_root(root_object, root) || !find_operation(op, operation) || !find(x, array)) return false;
        const bool leads = root == board().rank();
        if (leads && (!find(out, target) || !matches(array, target, 1) || !apart_or_at(array, target, 0))) return false;
        return run_fast(Collective::reduce, array.dtype, operation + 1, root, array.count, array.data, target.data);
    }

    bool gather(nb::handle x, nb::handle root_object, nb::handle out) {
        Array array, target;
        std::size_t root = 0;
        if (!find_root(root_object, root) || !find(x, array)) return false;
        const bool leads = root == board().rank();
        if (leads && (!find(out, target) || !matches(target, array, size()) || !apart_or_at(target, array, root)))
            return false;
        return run_fast(Collective::gather, array.dtype, 0, root, array.count, array.data, target.data);
    }

    bool scatter(nb::handle x, nb::handle root_object, nb::handle out) {
        Array array, target;
        std::size_t root = 0;
        if (!find_root(root_object, root) || !find(out, target)) return false;
        const bool leads = root == board().rank();
        if (leads && (!find(x, array) || !matches(array, target, size()) || !apart_or_at(array, target, root)))
            return false;
        return run_fast(Collective::scatter, target.dtype, 0, root, target.count, array.data, target.data);
    }

    bool barrier() { return run_fast(Collective::barrier, 5, 0, 0, 1, nullptr, nullptr); }

    // Whether there is a kernel; what has none is left to the reference engine, on every rank alike.
    bool supports(std::size_t dtype, std::size_t operation) const {
        return operation == 0 || (dtype < kernels::dtype_count && fold_of(dtype, operation) != nullptr);
    }

    bool send(nb::handle x, nb::handle peer, nb::handle tag) {
        const auto message = make_message(x, peer, tag, true);
        return message != nullptr && transfer(message);
    }

    bool recv(nb::handle x, nb::handle peer, nb::handle tag) {
        const auto message = make_message(x, peer, tag, false);
        return message != nullptr && transfer(message);
    }

    bool sendrecv(nb::handle x, nb::handle to, nb::handle out, nb::handle source, nb::handle tag) {
        const auto received = make_message(out, source, tag, false);
        const auto sent = received != nullptr ? make_message(x, to, tag, true) : nullptr;
        if (sent == nullptr) return false;
        {
            const auto lock = locked();
            group_->post(received);
        }
        return transfer(sent) && finish(received);
    }

    // The general way in: addresses, and one count a block (or one for all of them).
    std::shared_ptr<const Plan> plan(std::size_t collective, std::size_t dtype, std::size_t item_bytes,
                                     std::size_t operation, std::size_t root, std::vector<std::size_t> counts,
                                     nb::bytes label) {
        return find_plan(static_cast<Collective>(collective), dtype, item_bytes, operation, root,
                         Counts{std::move(counts)}, to_label(label));
    }

    // `alone`: it must advance while nobody waits for it.
    std::shared_ptr<Pending> start(const std::shared_ptr<const Plan>& plan, std::uintptr_t input, std::uintptr_t output,
                                   bool alone) {
        auto call = std::make_shared<Call>();
        call->plan = plan;
        call->input = reinterpret_cast<const std::byte*>(input);
        call->output = reinterpret_cast<std::byte*>(output);
        {
            const auto lock = locked();
            const bool next = group_->idle();
            group_->push(call);
            if (next && plan->in_slot) group_->drive();  // more is left to whoever waits, or to the background
        }
        if (alone && !call->done.load(std::memory_order_acquire)) Background::instance().serve(group_);
        return call;
    }

    // Runs a call of `plan` to its end.
    void run(const std::shared_ptr<const Plan>& plan, std::uintptr_t input, std::uintptr_t output) {
        auto lock = locked();
        if (group_->idle()) {
            run_alone(lock, plan, reinterpret_cast<const std::byte*>(input), reinterpret_cast<std::byte*>(output));
            return;
        }
        lock.unlock();
        wait(start(plan, input, output, false));
    }

    // Calls of this collective run a schedule, not `direct`; `how`: the checksum of its name, as in their labels.
    void force(std::size_t collective, std::uint32_t how) { forced_[collective] = how; }

    // Starts a call of a schedule that was kept before; nothing where none was. `counts`: the elements of the blocks,
    // in and out, where the label does not tell.
    std::shared_ptr<Pending> start_schedule(const nb::bytes& label, bool in_place,
                                            const std::vector<std::size_t>& counts, std::uintptr_t input,
                                            std::uintptr_t output, bool alone) {
        const auto known = tables_.find({to_label(label), in_place, counts});
        if (known == tables_.end()) return nullptr;
        auto call = std::make_shared<Call>();
        call->table = known->second;
        call->input = reinterpret_cast<const std::byte*>(input);
        call->output = reinterpret_cast<std::byte*>(output);
        {
            const nb::gil_scoped_release unlocked;
            const auto lock = group_->lock();
            group_->push(call);
            group_->drive();
        }
        if (alone) Background::instance().serve(group_);
        return call;
    }

    void keep_schedule(const nb::bytes& label, bool in_place, std::vector<std::size_t> counts, std::size_t collective,
                       std::size_t dtype, std::size_t item_bytes, std::size_t operation, std::size_t input_count,
                       std::size_t output_count, std::size_t scratch_count, const std::vector<RowOfNumbers>& rows,
                       const TaskQueues& sends, const TaskQueues& receives) {
        std::vector<TaskRow> tasks;
        for (const RowOfNumbers& row : rows) tasks.push_back(to_row(row));
        const Label name = to_label(label);
        auto table = std::make_shared<const TaskTable>(
            make_task_table(static_cast<Collective>(collective), name, reduction_of(dtype, item_bytes, operation),
                            input_count, output_count, scratch_count, tasks, sends, receives));
        if (tables_.size() >= most_plans) tables_.clear();
        tables_.insert_or_assign({name, in_place, std::move(counts)}, std::move(table));
    }

    std::shared_ptr<Pending> post(bool sends, std::size_t peer, std::uint32_t tag, nb::bytes label, std::uintptr_t data,
                                  std::size_t bytes, bool alone) {
        auto message = std::make_shared<Message>();
        message->sends = sends;
        message->peer = peer;
        message->tag = tag;
        message->label = to_label(label);
        message->data = reinterpret_cast<std::byte*>(data);
        message->bytes = bytes;
        {
            const auto lock = locked();
            const bool next = group_->idle();
            group_->post(message);
            if (next && bytes <= board().geometry().slot_payload) group_->drive();
        }
        if (alone && !message->done.load(std::memory_order_acquire)) Background::instance().serve(group_);
        return message;
    }

    bool poll(const std::shared_ptr<Pending>& pending) {
        if (pending->done.load(std::memory_order_acquire)) return true;
        Host host(*this, true);
        bool done = false;
        guarded(host, {}, [&] { done = group_->poll(pending, host); });
        return done;
    }

    // `timeout`: seconds, in place of the communicator's.
    void wait(const std::shared_ptr<Pending>& pending, std::optional<double> timeout = {}) {
        Host host(*this, false, timeout);
        wait_for(pending, host);
    }

    nb::tuple record(std::size_t collective) const {
        const auto lock = locked();
        const Group::Record& found = group_->record(collective);
        return nb::make_tuple(found.calls, found.seconds, nb::cast(found.traffic.sent),
                              nb::cast(found.traffic.received));
    }

    bool usable() const { return group_->usable(); }
    bool failed() const { return group_->failed(); }
    void fail() { group_->fail(); }
    void close() { group_->close(); }

  private:
    static constexpr int small_types = 32;
    static constexpr std::size_t most_plans = 1024;

    std::size_t size() const { return board().size(); }
    Board& board() const { return group_->board(); }

    std::unique_lock<std::mutex> locked() const {
        auto lock = group_->try_lock();
        if (!lock) {
            // Another thread of this process waits in a call: it may need the interpreter before it lets go.
            const nb::gil_scoped_release unlocked;
            lock = group_->lock();
        }
        return lock;
    }

    // Nothing else of the group is under way, and `lock` is held.
    void run_alone(std::unique_lock<std::mutex>& lock, const std::shared_ptr<const Plan>& plan, const std::byte* input,
                   std::byte* output) {
        Host host(*this, !plan->in_slot);
        guarded(host, lock, [&] { group_->run(lock, plan, input, output, host); });
    }

    void wait_for(const std::shared_ptr<Pending>& pending, Host& host) const {
        guarded(host, {}, [&] { group_->wait(pending, host); });
    }

    // What ends by an exception ends the group: nothing of it touches an array any more when this is over.
    template <typename Work>
    void guarded(Host& host, const std::unique_lock<std::mutex>& held, const Work& work) const {
        try {
            work();
        } catch (...) {
            group_->fail();
            if (!held) {
                host.release();
                const auto lock = group_->lock();  // another thread may have been in the middle of a step
            }
            throw;
        }
    }

    // Nothing where the arguments are not for the fast path.
    std::shared_ptr<Message> make_message(nb::handle x, nb::handle peer, nb::handle tag, bool sends) const {
        Array array;
        std::size_t rank = 0, number = 0;
        if (!group_->usable() || !find(x, array) || !find_number(peer, rank) || !find_number(tag, number))
            return nullptr;
        if (rank >= size() || rank == board().rank() || number > 0xFFFFFFFFu) return nullptr;
        auto message = std::make_shared<Message>();
        message->sends = sends;
        message->peer = rank;
        message->tag = static_cast<std::uint32_t>(number);
        message->label = make_label(collective_count, array.dtype, 0, 0, array.count);
        message->data = array.data;
        message->bytes = array.count * kernels::element_bytes[array.dtype];
        return message;
    }

    bool transfer(const std::shared_ptr<Message>& message) {
        {
            const auto lock = locked();
            group_->post(message);
        }
        return finish(message);
    }

    bool finish(const std::shared_ptr<Message>& message) {
        Host host(*this, message->bytes > board().geometry().slot_payload);
        wait_for(message, host);
        return true;
    }

    bool find_root(nb::handle object, std::size_t& root) const { return find_number(object, root) && root < size(); }

    static bool find_number(nb::handle object, std::size_t& number) {
        if (!PyLong_CheckExact(object.ptr())) return false;
        int overflow = 0;
        const long long found = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
        number = static_cast<std::size_t>(found);
        return overflow == 0 && found >= 0;
    }

    // As collectives/calls.py makes it.
    static Label make_label(std::size_t kind, std::size_t dtype, std::size_t operation, std::size_t root,
                            std::size_t count) {
        Label label{};
        label[0] = static_cast<std::byte>(kind);
        label[1] = static_cast<std::byte>(dtype);
        label[2] = static_cast<std::byte>(operation);
        const auto short_root = static_cast<std::uint32_t>(root);
        const auto long_count = static_cast<std::uint64_t>(count);
        std::memcpy(&label[4], &short_root, sizeof short_root);
        std::memcpy(&label[8], &long_count, sizeof long_count);
        return label;
    }

    bool find(nb::handle object, Array& array) const {
        if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(setting_.ndarray.ptr())) return false;
        auto* const numpy = reinterpret_cast<PyArrayObject*>(object.ptr());
        constexpr int needed = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_WRITEABLE;
        if ((PyArray_FLAGS(numpy) & needed) != needed || PyArray_DESCR(numpy)->byteorder == '>') return false;
        const int number = PyArray_DESCR(numpy)->type_num;
        int code = -1;
        if (number >= 0 && number < small_types) {
            code = dtype_of_[number];
        } else {
            for (const auto& [known, its_code] : setting_.type_numbers) code = known == number ? its_code : code;
        }
        if (code < 0 || static_cast<std::size_t>(code) >= kernels::dtype_count) return false;
        std::size_t count = 1;
        for (int axis = 0; axis < PyArray_NDIM(numpy); ++axis)
            count *= static_cast<std::size_t>(PyArray_DIMS(numpy)[axis]);
        array = {static_cast<std::byte*>(PyArray_DATA(numpy)), count, static_cast<std::size_t>(code)};
        return true;
    }

    bool find_operation(nb::handle op, std::size_t& operation) const {
        for (std::size_t i = 0; i < setting_.operations.size(); ++i) {
            if (setting_.operations[i].ptr() == op.ptr()) {
                operation = i;
                return true;
            }
        }
        return false;
    }

    static bool matches(const Array& large, const Array& small, std::size_t factor) {
        return large.dtype == small.dtype && large.count == small.count * factor;
    }

    // Whether the arrays are apart, or `small` is block `block` of `large`.
    static bool apart_or_at(const Array& large, const Array& small, std::size_t block) {
        const std::size_t item = kernels::element_bytes[large.dtype];
        const std::byte* const end = large.data + large.count * item;
        const std::byte* const small_end = small.data + small.count * item;
        return small_end <= large.data || end <= small.data || small.data == large.data + block * small.count * item;
    }

    kernels::ReduceFunction fold_of(std::size_t dtype, std::size_t operation) const {
        return table_->reduce[setting_.operation_codes[operation - 1]][dtype];
    }

    bool run_fast(Collective collective, std::size_t dtype, std::size_t operation, std::size_t root, std::size_t count,
                  const std::byte* input, std::byte* output) {
        if (!group_->usable() || !supports(dtype, operation)) return false;
        Label label = make_label(static_cast<std::size_t>(collective), dtype, operation, root, count);
        if (const auto how = forced_[static_cast<std::size_t>(collective)]) {
            std::memcpy(&label[20], &*how, sizeof *how);
            return run_schedule(label, input, output);
        }
        auto lock = locked();
        if (!group_->idle()) return false;
        // The lock keeps it: other threads may run while this one waits.
        std::shared_ptr<const Plan>& last = last_[static_cast<std::size_t>(collective)];
        if (last == nullptr || last->label != label) {
            last = find_plan(collective, dtype, kernels::element_bytes[dtype], operation, root, Counts{{count}}, label);
        }
        run_alone(lock, last, input, output);
        return true;
    }

    // As `start_schedule`, and waits; declines what was not kept before, and barriers, whose tokens need memory.
    bool run_schedule(const Label& label, const std::byte* input, std::byte* output) {
        if (static_cast<Collective>(label[0]) == Collective::barrier) return false;
        const auto call = std::make_shared<Call>();
        for (const bool in_place : {true, false}) {
            const auto known = tables_.find({label, in_place, {}});
            // Arrays that share memory do so as the collective wants them in place: see `apart_or_at`.
            if (known != tables_.end() && known->second->shares_memory(input, output) == in_place) {
                call->table = known->second;
            }
        }
        if (call->table == nullptr) return false;
        call->input = input;
        call->output = output;
        {
            const auto lock = locked();
            group_->push(call);
        }
        Host host(*this, call->table->bytes_moved > board().geometry().slot_payload);
        wait_for(call, host);
        return true;
    }

    Reduction reduction_of(std::size_t dtype, std::size_t item_bytes, std::size_t operation) const {
        Reduction reduction{.element_bytes = item_bytes};
        if (operation > 0) {
            reduction.fold = fold_of(dtype, operation);
            if (operation - 1 == average) {
                reduction.scale = table_->scale[dtype];
                reduction.factor = 1.0 / static_cast<double>(size());
            }
        }
        return reduction;
    }

    std::shared_ptr<const Plan> find_plan(Collective collective, std::size_t dtype, std::size_t item_bytes,
                                          std::size_t operation, std::size_t root, Counts counts, const Label& label) {
        const auto key = std::pair(label, counts.blocks);
        const auto known = plans_.find(key);
        if (known != plans_.end()) return known->second;
        if (plans_.size() >= most_plans) plans_.clear();
        auto plan = std::make_shared<const Plan>(make_plan(collective, board().rank(), size(), root, counts,
                                                           reduction_of(dtype, item_bytes, operation), label,
                                                           board().geometry()));
        plans_.emplace(key, plan);
        return plan;
    }

    Setting setting_;
    std::shared_ptr<Group> group_;
    const kernels::KernelTable* table_ = nullptr;
    signed char dtype_of_[small_types] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    std::map<std::pair<Label, std::vector<std::size_t>>, std::shared_ptr<const Plan>> plans_;
    std::shared_ptr<const Plan> last_[collective_count];
    std::optional<std::uint32_t> forced_[collective_count];
    // By label, whether input and output share memory, and the counts that the label does not tell.
    std::map<std::tuple<Label, bool, std::vector<std::size_t>>, std::shared_ptr<const TaskTable>> tables_;
};

// The exception that is set, as an object.
PyObject* fetch_exception() {
    PyObject *type = nullptr, *value = nullptr, *trace = nullptr;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
}

// A call on arrays that stay the same: nothing is looked up or checked again.
class FixedCall {
  public:
    FixedCall(std::shared_ptr<PyGroup> group, std::shared_ptr<const Plan> plan, std::uintptr_t input,
              std::uintptr_t output)
        : group_(std::move(group)), plan_(std::move(plan)), input_(input), output_(output) {}

    // Each returns whether the group could take the call; false: it is closed or has failed, or the last is under way.
    bool run() {
        if (!group_->usable() || !finished()) return false;
        group_->run(plan_, input_, output_);
        return true;
    }
    bool start() {
        if (!group_->usable() || !finished()) return false;
        pending_ = group_->start(plan_, input_, output_, true);
        return true;
    }
    bool done() { return pending_ == nullptr || group_->poll(pending_); }
    void wait() {
        if (pending_ != nullptr) group_->wait(pending_);
    }
    const std::shared_ptr<Pending>& pending() const { return pending_; }
    bool finished() const { return pending_ == nullptr || pending_->done.load(std::memory_order_acquire); }

  private:
    std::shared_ptr<PyGroup> group_;
    std::shared_ptr<const Plan> plan_;
    std::shared_ptr<Pending> pending_;
    std::uintptr_t input_, output_;
};

void Host::look(const Position& position, double seconds) {
    const nb::gil_scoped_acquire locked;
    nb::list last;
    Board& board = group_.group().board();
    for (const std::size_t peer : position.awaited) {
        const std::uint64_t call = board.last_call(peer);
        last.append(nb::make_tuple(call, to_bytes(board.slot(peer, call).label)));
    }
    nb::object interrupt = nb::none();
    if (PyErr_CheckSignals() != 0) interrupt = nb::steal(fetch_exception());
    group_.setting().look(to_bytes(position.label), position.call, seconds, nb::cast(position.awaited), last, interrupt,
                          timeout_);
}

void Host::mismatch(const Difference& difference) {
    const nb::gil_scoped_acquire locked;
    group_.setting().mismatch(difference.peer, to_bytes(difference.ours), to_bytes(difference.theirs), difference.call,
                              difference.our_bytes, difference.their_bytes);
    throw std::runtime_error("the handler of mismatches returned");
}

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);
    module.doc() = "The native engine; use it through collectives.Communicator.";
    module.attr("largest_in_slot") = Geometry{1}.slot_payload;
    module.def("board_bytes", &Geometry::most_bytes);
    module.def("stop_background", [] { Background::instance().stop(); });
    nb::class_<Pending>(module, "Pending")
        .def_prop_ro("interval",
                     [](const Pending& pending) {
                         const auto seconds = [](std::chrono::steady_clock::time_point time) {
                             return std::chrono::duration<double>(time.time_since_epoch()).count();
                         };
                         return std::pair(seconds(pending.began), seconds(pending.ended));
                     })
        .def_prop_ro("done", [](const Pending& pending) { return pending.done.load(std::memory_order_acquire); });
    nb::class_<Plan>(module, "Plan");
    nb::class_<FixedCall>(module, "FixedCall")
        .def(nb::init<std::shared_ptr<PyGroup>, std::shared_ptr<const Plan>, std::uintptr_t, std::uintptr_t>())
        .def("run", &FixedCall::run)
        .def("start", &FixedCall::start)
        .def("done", &FixedCall::done)
        .def("wait", &FixedCall::wait)
        .def_prop_ro("pending", &FixedCall::pending)
        .def_prop_ro("finished", &FixedCall::finished);
    nb::class_<PyGroup>(module, "Group")
        .def(
            "__init__",
            [](PyGroup* self, std::size_t rank,
               const std::vector<std::tuple<std::uintptr_t, std::uintptr_t, int>>& members, std::size_t heap_bytes,
               nb::object ndarray, std::vector<std::pair<int, int>> type_numbers, nb::list operations,
               std::vector<int> operation_codes, nb::object look, nb::object mismatch,
               const std::string& instruction_set, unsigned spins) {
                Setting setting{
                    std::move(ndarray),  std::move(type_numbers), {},   std::move(operation_codes), std::move(look),
                    std::move(mismatch), instruction_set,         spins};
                for (const nb::handle operation : operations) setting.operations.push_back(nb::borrow(operation));
                new (self) PyGroup(rank, members, heap_bytes, std::move(setting));
            },
            nb::kw_only(), nb::arg("rank"), nb::arg("members"), nb::arg("heap_bytes"), nb::arg("ndarray"),
            nb::arg("type_numbers"), nb::arg("operations"), nb::arg("operation_codes"), nb::arg("look"),
            nb::arg("mismatch"), nb::arg("instruction_set"), nb::arg("spins"))
        .def("all_reduce", &PyGroup::all_reduce, nb::arg().none(), nb::arg().none())
        .def("reduce_scatter", &PyGroup::reduce_scatter, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("all_gather", &PyGroup::all_gather, nb::arg().none(), nb::arg().none())
        .def("all_to_all", &PyGroup::all_to_all, nb::arg().none(), nb::arg().none())
        .def("broadcast", &PyGroup::broadcast, nb::arg().none(), nb::arg().none())
        .def("barrier", &PyGroup::barrier)
        .def("scan", &PyGroup::scan, nb::arg().none(), nb::arg().none())
        .def("reduce", &PyGroup::reduce, nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("gather", &PyGroup::gather, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("scatter", &PyGroup::scatter, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("sendrecv", &PyGroup::sendrecv, nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
             nb::arg().none())
        .def("send", &PyGroup::send, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("recv", &PyGroup::recv, nb::arg().none(), nb::arg().none(), nb::arg().none())
        .def("post", &PyGroup::post)
        .def("supports", &PyGroup::supports)
        .def("plan", &PyGroup::plan)
        .def("start", &PyGroup::start)
        .def("force", &PyGroup::force)
        .def("start_schedule", &PyGroup::start_schedule)
        .def("keep_schedule", &PyGroup::keep_schedule)
        .def("poll", &PyGroup::poll)
        .def("wait", &PyGroup::wait, nb::arg(), nb::arg().none())
        .def("record", &PyGroup::record)
        .def("fail", &PyGroup::fail)
        .def("close", &PyGroup::close)
        .def_prop_ro("failed", &PyGroup::failed);
}
