// Schedules, compiled here by hand, over pipes of a few bytes: under a simulator, which steps the ranks of a job in an
// order drawn from a seed, and on real threads. Exits with 1 and says which seed when anything is not as it should be.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "board.hpp"
#include "dispatch.hpp"
#include "group.hpp"
#include "scheduled.hpp"
#include "task_table.hpp"
#include "test_job.hpp"

using namespace collectives;
using namespace collectives::engine;
using namespace collectives::engine::test;

namespace {

struct Span {
    Buffer buffer;
    std::size_t start;
};

// What `compile_plan` does: instructions in the order of the program, cut into slices, which wait for each other where
// they touch the same slice of a chunk.
class Compiler {
  public:
    Compiler(std::size_t slice, bool in_place) : slice_(slice), in_place_(in_place) {}

    void add(TaskKind kind, std::size_t peer, Span source, Span target, std::size_t count,
             std::size_t contributions = 1) {
        const bool sends = kind == TaskKind::send;
        const bool receives = kind == TaskKind::recv || kind == TaskKind::recv_reduce;
        for (std::size_t first = 0; first < count; first += slice_) {
            const auto task = static_cast<std::uint32_t>(rows_.size());
            std::set<std::uint32_t> needs;
            std::vector<Cell> read;
            if (kind != TaskKind::recv) {
                for (std::size_t i = 0; i < contributions; ++i)
                    read.push_back(cell({source.buffer, source.start + first + i * count}));
            }
            const Cell written = cell({target.buffer, target.start + first});
            if (kind == TaskKind::copy && read[0] == written) continue;
            if (kind == TaskKind::reduce) read.push_back(written);
            for (const Cell& from : read) {
                if (writer_.contains(from)) needs.insert(writer_[from]);
            }
            if (!sends) {
                needs.insert(readers_[written].begin(), readers_[written].end());
                readers_[written].clear();
                if (writer_.contains(written)) needs.insert(writer_[written]);
                writer_[written] = task;
            }
            for (const Cell& from : read) readers_[from].push_back(task);
            needs.erase(task);
            for (const std::uint32_t needed : needs) rows_[needed].dependents.push_back(task);
            rows_.push_back({kind,
                             peer,
                             source.buffer,
                             source.start + first,
                             target.buffer,
                             target.start + first,
                             std::min(slice_, count - first),
                             contributions,
                             count,
                             static_cast<std::uint32_t>(needs.size()),
                             {}});
            if (sends) sends_[peer].push_back(task);
            if (receives) receives_[peer].push_back(task);
        }
        if (sends) sends_[peer];
        if (receives) receives_[peer];
    }

    TaskTable table(const Label& label, std::size_t count, std::size_t scratch) const {
        Reduction reduction;
        reduction.element_bytes = sizeof(Element);
        reduction.fold =
            kernels::runnable_tables().front()->reduce[index(kernels::Op::sum)][index(kernels::DType::int32)];
        return make_task_table(Collective::all_reduce, label, reduction, count, count, scratch, rows_,
                               {sends_.begin(), sends_.end()}, {receives_.begin(), receives_.end()});
    }

  private:
    using Cell = std::pair<Buffer, std::size_t>;
    Cell cell(Span span) const {
        return {in_place_ && span.buffer == Buffer::in ? Buffer::out : span.buffer, span.start};
    }

    std::size_t slice_;
    bool in_place_;
    std::vector<TaskRow> rows_;
    std::map<Cell, std::uint32_t> writer_;
    std::map<Cell, std::vector<std::uint32_t>> readers_;
    std::map<std::size_t, std::vector<std::uint32_t>> sends_, receives_;
};

enum class Algorithm { ring, tree, one_hop };

// An all_reduce as every rank makes it.
struct Shape {
    Algorithm algorithm;
    std::size_t count;
    std::size_t slice;
    Label label;
};

// Where chunk `chunk` of `count` elements begins; `ranks` chunks, the first of which have one element more.
std::size_t chunk_start(std::size_t chunk, std::size_t count, std::size_t ranks) {
    return chunk * (count / ranks) + std::min(chunk, count % ranks);
}

TaskTable ring(const Shape& shape, std::size_t rank, std::size_t ranks, bool in_place) {
    Compiler compiler(shape.slice, in_place);
    const std::size_t next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
    const auto chunk = [&](std::size_t steps) { return (rank + 2 * ranks - steps) % ranks; };
    const auto start = [&](std::size_t number) { return chunk_start(number, shape.count, ranks); };
    const auto length = [&](std::size_t number) { return start(number + 1) - start(number); };
    for (std::size_t step = 0; step + 1 < ranks; ++step) {
        const std::size_t sent = chunk(step), received = chunk(step + 1);
        compiler.add(TaskKind::send, next, {step == 0 ? Buffer::in : Buffer::out, start(sent)}, {}, length(sent));
        compiler.add(TaskKind::recv_reduce, previous, {Buffer::in, start(received)}, {Buffer::out, start(received)},
                     length(received));
    }
    for (std::size_t step = 0; step + 1 < ranks; ++step) {
        const std::size_t sent = chunk(ranks - 1 + step), received = chunk(ranks + step);
        compiler.add(TaskKind::send, next, {Buffer::out, start(sent)}, {}, length(sent));
        compiler.add(TaskKind::recv, previous, {}, {Buffer::out, start(received)}, length(received));
    }
    if (ranks == 1) compiler.add(TaskKind::copy, 0, {Buffer::in, 0}, {Buffer::out, 0}, shape.count);
    return compiler.table(shape.label, shape.count, 0);
}

// Up a binary tree and down again; the second child's elements are received first and reduced then.
TaskTable tree(const Shape& shape, std::size_t rank, std::size_t ranks, bool in_place) {
    Compiler compiler(shape.slice, in_place);
    const std::size_t count = shape.count, children[2] = {2 * rank + 1, 2 * rank + 2};
    const Span in{Buffer::in, 0}, out{Buffer::out, 0}, tmp{Buffer::tmp, 0};
    compiler.add(TaskKind::copy, 0, in, out, count);
    if (children[0] < ranks) compiler.add(TaskKind::recv_reduce, children[0], out, out, count);
    if (children[1] < ranks) {
        compiler.add(TaskKind::recv, children[1], {}, tmp, count);
        compiler.add(TaskKind::reduce, 0, tmp, out, count);
    }
    if (rank > 0) {
        compiler.add(TaskKind::send, (rank - 1) / 2, out, {}, count);
        compiler.add(TaskKind::recv, (rank - 1) / 2, {}, out, count);
    }
    for (const std::size_t child : children) {
        if (child < ranks) compiler.add(TaskKind::send, child, out, {}, count);
    }
    return compiler.table(shape.label, count, count);
}

TaskTable one_hop(const Shape& shape, std::size_t rank, std::size_t ranks, bool in_place) {
    Compiler compiler(shape.slice, in_place);
    const std::size_t count = shape.count;
    compiler.add(TaskKind::copy, 0, {Buffer::in, 0}, {Buffer::tmp, rank * count}, count);
    for (std::size_t distance = 1; distance < ranks; ++distance) {
        const std::size_t to = (rank + distance) % ranks, from = (rank + ranks - distance) % ranks;
        compiler.add(TaskKind::send, to, {Buffer::in, 0}, {}, count);
        compiler.add(TaskKind::recv, from, {}, {Buffer::tmp, from * count}, count);
    }
    compiler.add(TaskKind::fold, 0, {Buffer::tmp, 0}, {Buffer::out, 0}, count, ranks);
    return compiler.table(shape.label, count, count * ranks);
}

Element input_element(std::size_t call, std::size_t rank, std::size_t index) {
    return static_cast<Element>(call * 1'000'003 + rank * 10'007 + index * 31);
}

// One rank's arrays and tasks of one call. They begin at an odd address: no channel and no kernel needs another.
class Part {
  public:
    Part(const Shape& shape, std::size_t call, std::size_t rank, std::size_t ranks, bool in_place)
        : count_(shape.count),
          call_(call),
          ranks_(ranks),
          memory_(1 + 2 * bytes()),
          scratch_(1 + ranks * bytes()),
          in_place_(in_place) {
        const auto compile = shape.algorithm == Algorithm::ring   ? ring
                             : shape.algorithm == Algorithm::tree ? tree
                                                                  : one_hop;
        table_ = std::make_shared<const TaskTable>(compile(shape, rank, ranks, in_place));
        for (std::size_t i = 0; i < count_; ++i) {
            const Element element = input_element(call, rank, i);
            std::memcpy(memory_.data() + 1 + i * sizeof element, &element, sizeof element);
        }
    }

    const std::shared_ptr<const TaskTable>& table() const { return table_; }
    const std::byte* input() const { return memory_.data() + 1; }
    std::byte* output() { return memory_.data() + 1 + (in_place_ ? 0 : bytes()); }
    std::byte* scratch() { return scratch_.data() + 1; }

    bool right() {
        for (std::size_t i = 0; i < count_; ++i) {
            std::uint32_t sum = 0;
            for (std::size_t rank = 0; rank < ranks_; ++rank)
                sum += static_cast<std::uint32_t>(input_element(call_, rank, i));
            if (std::memcmp(output() + i * sizeof sum, &sum, sizeof sum) != 0) return false;
        }
        return true;
    }

  private:
    std::size_t bytes() const { return count_ * sizeof(Element); }

    std::size_t count_, call_, ranks_;
    std::vector<std::byte> memory_, scratch_;
    bool in_place_;
    std::shared_ptr<const TaskTable> table_;
};

Shape draw_shape(Random& random, std::size_t number) {
    constexpr std::size_t counts[] = {0, 1, 2, 5, 17, 100, 300};
    constexpr std::size_t slices[] = {1, 3, 16, 1000};
    constexpr Algorithm algorithms[] = {Algorithm::ring, Algorithm::tree, Algorithm::one_hop};
    Shape shape{algorithms[below(random, 3)],
                counts[below(random, std::size(counts))],
                slices[below(random, std::size(slices))],
                {}};
    const std::uint64_t parts[3] = {static_cast<std::uint64_t>(shape.algorithm), shape.count, number};
    std::memcpy(shape.label.data(), parts, sizeof parts);
    return shape;
}

Memory draw_memory(Random& random, std::size_t ranks) {
    constexpr std::size_t pipes[] = {1, 3, 50, 64, 1000};
    Geometry geometry = small_geometry(ranks);
    geometry.most_pipe_bytes = pipes[below(random, std::size(pipes))];
    return Memory(geometry, false);
}

// One rank of a simulated job.
struct Rank {
    Rank(const Memory& memory, std::size_t rank) : board(memory.board(rank)), links(board), traffic(memory.ranks()) {}

    void begin(const Shape& shape, std::size_t number, bool in_place) {
        part = std::make_unique<Part>(shape, number, board.rank(), board.size(), in_place);
        run = std::make_unique<Scheduled>(board, links, traffic, *part->table(), number + 1, part->input(),
                                          part->output(), part->scratch());
    }

    Board board;
    Links links;
    Traffic traffic;
    std::size_t call = 0;
    std::unique_ptr<Part> part;
    std::unique_ptr<Scheduled> run;
};

// The ranks' calls one by one, as `step_in_any_order` has them.
bool simulate(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 1 + below(random, 6), calls = 20;
    const Memory memory = draw_memory(random, ranks);
    std::vector<Shape> shapes;
    for (std::size_t call = 0; call < calls; ++call) shapes.push_back(draw_shape(random, call));
    std::vector<std::unique_ptr<Rank>> job;
    for (std::size_t rank = 0; rank < ranks; ++rank) job.push_back(std::make_unique<Rank>(memory, rank));
    const auto begin = [&](Rank& rank, std::size_t) { rank.begin(shapes[rank.call], rank.call, random() % 2 == 0); };
    if (!step_in_any_order(random, job, calls, begin)) return false;
    std::uint64_t wanted = 0;
    for (const Shape& shape : shapes) {
        const std::size_t copies = shape.algorithm == Algorithm::one_hop ? ranks * (ranks - 1) : 2 * (ranks - 1);
        wanted += copies * shape.count * sizeof(Element);
    }
    std::uint64_t sent = 0, received = 0;
    for (const auto& rank : job) {
        sent = std::accumulate(rank->traffic.sent.begin(), rank->traffic.sent.end(), sent);
        received = std::accumulate(rank->traffic.received.begin(), rank->traffic.received.end(), received);
    }
    return sent == wanted && received == wanted;
}

// One rank makes another call than the others, or one of another size under the same label: nobody gets a result, and
// whoever finds out names a rank whose call is another one.
bool finds_mismatch(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 2 + below(random, 4), odd = below(random, ranks);
    const bool labelled = random() % 2 == 0;
    const Memory memory = draw_memory(random, ranks);
    std::vector<std::unique_ptr<Rank>> job;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
        Shape shape{Algorithm::one_hop, 100, 16, {}};
        if (rank == odd) shape.count = 10;
        if (rank == odd && labelled) shape.label[0] = std::byte{1};
        job.push_back(std::make_unique<Rank>(memory, rank));
        job.back()->begin(shape, 0, false);
    }
    for (std::size_t step = 0; step < 10'000 * ranks; ++step) {
        const std::size_t number = below(random, ranks);
        Scheduled& run = *job[number]->run;
        const Progress progress = run.step();
        if (progress == Progress::done) return false;
        if (progress != Progress::mismatch) continue;
        const bool named = number == odd ? run.differing_peer() != odd : run.differing_peer() == odd;
        return named && (run.their_label() == run.table().label) == !labelled &&
               (run.expected_bytes() != run.their_bytes()) == !labelled;
    }
    return false;
}

// Schedules among calls of `direct`, on a thread per rank, some of them in the background.
bool run_threads(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 2 + below(random, 3), calls = 60;
    const Memory& memory = kept(draw_memory(random, ranks));
    std::vector<Shape> shapes;
    std::vector<char> direct;
    for (std::size_t call = 0; call < calls; ++call) {
        shapes.push_back(draw_shape(random, call));
        direct.push_back(random() % 4 == 0);
    }
    std::vector<char> right(ranks, 1);
    std::vector<std::shared_ptr<Group>> groups;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
        groups.push_back(std::make_shared<Group>(memory.board(rank), memory.range(rank), WaitPolicy{10}));
    }
    std::vector<std::thread> threads;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
        threads.emplace_back([&, rank] {
            Random own(seed * 100 + rank);
            SilentHost host;
            for (std::size_t call = 0; call < calls; ++call) {
                Part part(shapes[call], call, rank, ranks, direct[call] != 0 || own() % 2 == 0);
                auto pending = std::make_shared<Call>();
                if (direct[call] != 0) {
                    pending->plan = std::make_shared<const Plan>(
                        make_plan(Collective::all_reduce, rank, ranks, 0, Counts{{shapes[call].count}},
                                  part.table()->reduction, shapes[call].label, memory.geometry()));
                } else {
                    pending->table = part.table();
                }
                pending->input = part.input();
                pending->output = part.output();
                {
                    const auto lock = groups[rank]->lock();
                    groups[rank]->push(pending);
                }
                if (own() % 2 == 0) {
                    Background::instance().serve(groups[rank]);
                    while (own() % 2 == 0 && !pending->done.load(std::memory_order_acquire)) std::this_thread::yield();
                }
                groups[rank]->wait(pending, host);
                if (!part.right()) right[rank] = 0;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return std::find(right.begin(), right.end(), 0) == right.end();
}

}  // namespace

// Arguments: how many seeds, 100 by default.
int main(int count, char** arguments) {
    const std::uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 100;
    const bool good = all("simulate", simulate, seeds) && all("finds_mismatch", finds_mismatch, seeds) &&
                      all("run_threads", run_threads, seeds / 10);
    Background::instance().stop();
    return good ? 0 : 1;
}
