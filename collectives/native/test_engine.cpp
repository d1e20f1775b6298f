// The engine's state machines under a simulator, which steps the ranks of a job in an order drawn from a seed, and the
// same calls on real threads. Exits with 1 and says which seed when anything differs from what the specification wants.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "board.hpp"
#include "dispatch.hpp"
#include "group.hpp"
#include "messages.hpp"
#include "operation.hpp"
#include "plan.hpp"
#include "test_job.hpp"

using namespace collectives;
using namespace collectives::engine;
using namespace collectives::engine::test;

namespace {

// One call as every rank makes it.
struct Shape {
    Collective collective;
    std::size_t count;  // elements a block
    std::size_t root;
    Label label;
};

Shape draw_shape(Random& random, std::size_t ranks, std::size_t number) {
    constexpr std::size_t counts[] = {0, 1, 5, 16, 17, 100, 257, 1000, 9000};
    Shape shape{static_cast<Collective>(below(random, collective_count)),
                counts[below(random, std::size(counts))],
                below(random, ranks),
                {}};
    const std::uint64_t parts[3] = {static_cast<std::uint64_t>(shape.collective), shape.count, number};
    std::memcpy(shape.label.data(), parts, sizeof parts);
    return shape;
}

bool each(Collective c) {
    return c == Collective::reduce_scatter || c == Collective::scatter || c == Collective::all_to_all;
}
bool collects(Collective c) {
    return c == Collective::all_gather || c == Collective::gather || c == Collective::all_to_all;
}
bool folds(Collective c) {
    return c == Collective::all_reduce || c == Collective::reduce_scatter || c == Collective::reduce ||
           c == Collective::scan;
}

Element input_element(std::size_t call, std::size_t rank, std::size_t index) {
    return static_cast<Element>(call * 1'000'003 + rank * 10'007 + index * 31);
}

Element wanted_element(const Shape& shape, std::size_t call, std::size_t ranks, std::size_t rank, std::size_t index) {
    const std::size_t n = shape.count;
    switch (shape.collective) {
        case Collective::all_gather:
        case Collective::gather: return input_element(call, index / n, index % n);
        case Collective::broadcast: return input_element(call, shape.root, index);
        case Collective::scatter: return input_element(call, shape.root, rank * n + index);
        case Collective::all_to_all: return input_element(call, index / n, rank * n + index % n);
        default: break;
    }
    const std::size_t first = shape.collective == Collective::reduce_scatter ? rank * n : 0;
    const std::size_t last = shape.collective == Collective::scan ? rank + 1 : ranks;
    std::uint32_t sum = 0;
    for (std::size_t s = 0; s < last; ++s) sum += static_cast<std::uint32_t>(input_element(call, s, first + index));
    return static_cast<Element>(sum);
}

// One rank's arrays and plan of one call.
class Part {
  public:
    Part(const Memory& memory, const Shape& shape, std::size_t call, std::size_t rank, bool in_heap)
        : shape_(shape), call_(call), rank_(rank), ranks_(memory.ranks()) {
        const std::size_t inputs =
            shape.collective == Collective::barrier ? 0 : shape.count * (each(shape.collective) ? ranks_ : 1);
        outputs_ =
            shape.collective == Collective::barrier ? 0 : shape.count * (collects(shape.collective) ? ranks_ : 1);
        if ((shape.collective == Collective::reduce || shape.collective == Collective::gather) && rank != shape.root)
            outputs_ = 0;
        own_.resize(inputs + outputs_ + 1);
        Element* const base = in_heap ? memory.array(rank, 0) : own_.data();
        const bool in_place = shape.collective == Collective::all_reduce || shape.collective == Collective::broadcast ||
                              shape.collective == Collective::scan;
        input_ = base;
        output_ = in_place ? base : base + inputs;
        for (std::size_t i = 0; i < outputs_; ++i) output_[i] = -1;
        const bool filled = shape.collective != Collective::broadcast || rank == shape.root;
        for (std::size_t i = 0; i < inputs && filled; ++i) input_[i] = input_element(call, rank, i);
        Reduction reduction;
        reduction.element_bytes = sizeof(Element);
        if (folds(shape.collective)) {
            const auto* const table = kernels::runnable_tables().front();
            reduction.fold = table->reduce[index(kernels::Op::sum)][index(kernels::DType::int32)];
        }
        plan_ =
            std::make_shared<const Plan>(make_plan(shape.collective, rank, ranks_, shape.root, Counts{{shape.count}},
                                                   reduction, shape.label, memory.geometry()));
    }

    const std::shared_ptr<const Plan>& plan() const { return plan_; }
    const std::byte* input() const { return reinterpret_cast<const std::byte*>(input_); }
    std::byte* output() const { return reinterpret_cast<std::byte*>(output_); }

    bool right() const {
        for (std::size_t i = 0; i < outputs_; ++i) {
            if (output_[i] != wanted_element(shape_, call_, ranks_, rank_, i)) return false;
        }
        return true;
    }

  private:
    Shape shape_;
    std::size_t call_, rank_, ranks_, outputs_ = 0;
    std::vector<Element> own_;
    Element* input_ = nullptr;
    Element* output_ = nullptr;
    std::shared_ptr<const Plan> plan_;
};

std::vector<Shape> draw_shapes(Random& random, std::size_t ranks, std::size_t calls) {
    std::vector<Shape> shapes;
    for (std::size_t call = 0; call < calls; ++call) shapes.push_back(draw_shape(random, ranks, call));
    return shapes;
}

// The ranks' calls one by one, as `step_in_any_order` has them.
bool simulate(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 1 + below(random, 6), calls = 40;
    const Memory memory(ranks, random() % 2 == 0);
    const std::vector<Shape> shapes = draw_shapes(random, ranks, calls);
    struct Rank {
        Board board;
        Traffic traffic;
        std::vector<const std::byte*> scratch;
        std::size_t call = 0;
        std::uint64_t pieces = 0;
        std::unique_ptr<Part> part;
        std::unique_ptr<Operation> run;
    };
    std::vector<std::unique_ptr<Rank>> job;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
        job.push_back(std::make_unique<Rank>(Rank{memory.board(rank), Traffic(ranks), {}, 0, 0, nullptr, nullptr}));
    }
    const auto begin = [&](Rank& rank, std::size_t number) {
        rank.part = std::make_unique<Part>(memory, shapes[rank.call], rank.call, number, random() % 2 == 0);
        const Plan& plan = *rank.part->plan();
        rank.run = std::make_unique<Operation>(rank.board, rank.traffic, rank.scratch, plan, rank.call + 1, rank.pieces,
                                               memory.range(number), rank.part->input(), rank.part->output());
        rank.pieces += plan.pieces;
    };
    if (!step_in_any_order(random, job, calls, begin)) return false;
    std::uint64_t sent = 0, received = 0;
    for (const auto& rank : job) {
        for (std::size_t peer = 0; peer < ranks; ++peer) {
            sent += rank->traffic.sent[peer];
            received += rank->traffic.received[peer];
        }
    }
    return sent == received;
}

// One rank makes another call than the others: nobody gets a result, and somebody finds out.
bool finds_mismatch(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 2 + below(random, 4);
    const Memory memory(ranks, random() % 2 == 0);
    const std::size_t odd = below(random, ranks);
    std::vector<std::unique_ptr<Board>> boards;
    std::vector<std::unique_ptr<Part>> parts;
    std::vector<std::unique_ptr<Operation>> job;
    Traffic traffic(ranks);
    std::vector<const std::byte*> scratch;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
        Shape shape{Collective::all_reduce, 500, 0, {}};
        if (rank == odd) shape.count = 10;
        shape.label[0] = static_cast<std::byte>(shape.count % 251);
        boards.push_back(std::make_unique<Board>(memory.board(rank)));
        parts.push_back(std::make_unique<Part>(memory, shape, 0, rank, random() % 2 == 0));
        job.push_back(std::make_unique<Operation>(*boards[rank], traffic, scratch, *parts[rank]->plan(), 1, 0,
                                                  memory.range(rank), parts[rank]->input(), parts[rank]->output()));
    }
    for (std::size_t step = 0; step < 1000 * ranks; ++step) {
        const Progress progress = job[below(random, ranks)]->step();
        if (progress == Progress::done) return false;
        if (progress == Progress::mismatch) return true;
    }
    return false;
}

// Messages between two ranks, with tags, received in another order than sent.
bool exchanges_messages(std::uint64_t seed) {
    Random random(seed);
    const Memory memory(2, random() % 2 == 0);
    struct Sent {
        std::uint32_t tag;
        std::vector<Element> data;
        std::size_t heap_offset;
        bool in_heap;
    };
    constexpr std::size_t messages = 60, longest = 9000;
    std::vector<Sent> sent;
    for (std::size_t i = 0; i < messages; ++i) {
        Sent message{static_cast<std::uint32_t>(below(random, 3)), {}, 0, i % 20 == 0};
        message.data.resize(below(random, 4) == 0 || message.in_heap ? longest - 1 - below(random, 1000)
                                                                     : below(random, 300));
        for (std::size_t k = 0; k < message.data.size(); ++k) message.data[k] = input_element(i, 0, k);
        sent.push_back(std::move(message));
    }
    Board sender_board = memory.board(0), receiver_board = memory.board(1);
    Traffic sender_traffic(2), receiver_traffic(2);
    Messages sender(sender_board, sender_traffic, memory.range(0)),
        receiver(receiver_board, receiver_traffic, memory.range(1));
    const auto make = [](bool sends, std::size_t peer, std::uint32_t tag, Element* data, std::size_t count) {
        auto message = std::make_shared<Message>();
        message->sends = sends;
        message->peer = peer;
        message->tag = tag;
        message->label[0] = static_cast<std::byte>(count % 251);
        message->data = reinterpret_cast<std::byte*>(data);
        message->bytes = count * sizeof(Element);
        return message;
    };
    std::size_t posted = 0, in_vain = 0;
    std::vector<std::vector<Element>> received(messages);
    std::vector<bool> asked(messages, false);
    std::vector<std::shared_ptr<Message>> sends, receives;
    std::size_t open = messages;
    while (open > 0 || !sender.idle() || !receiver.idle()) {
        switch (below(random, 4)) {
            case 0:
                if (posted < messages && sender.idle()) {
                    Sent& message = sent[posted++];
                    Element* data = message.data.data();
                    if (message.in_heap) {
                        data = memory.array(0, 0);
                        std::memcpy(data, message.data.data(), message.data.size() * sizeof(Element));
                    }
                    sends.push_back(make(true, 1, message.tag, data, message.data.size()));
                    sender.post(sends.back());
                }
                break;
            case 1: {
                // Any tag, but the first message of that tag.
                const auto tag = static_cast<std::uint32_t>(below(random, 3));
                for (std::size_t i = 0; i < messages; ++i) {
                    if (asked[i] || sent[i].tag != tag) continue;
                    asked[i] = true;
                    --open;
                    received[i].resize(sent[i].data.size() + 1);
                    receives.push_back(make(false, 0, tag, received[i].data(), sent[i].data.size()));
                    receiver.post(receives.back());
                    break;
                }
                break;
            }
            case 2: in_vain = sender.step() == Progress::moved ? 0 : in_vain + 1; break;
            default: in_vain = receiver.step() == Progress::moved ? 0 : in_vain + 1;
        }
        if (in_vain > 100'000) return false;
    }
    for (std::size_t i = 0; i < messages; ++i) {
        received[i].pop_back();
        if (received[i] != sent[i].data) return false;
    }
    return sender_traffic.sent[1] == receiver_traffic.received[0];
}

// The same calls on a thread per rank, some of them in the background.
bool run_threads(std::uint64_t seed) {
    Random random(seed);
    const std::size_t ranks = 2 + below(random, 3), calls = 60;
    const Memory& memory = kept(Memory(ranks, random() % 2 == 0));
    const std::vector<Shape> shapes = draw_shapes(random, ranks, calls);
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
                const Part part(memory, shapes[call], call, rank, own() % 2 == 0);
                if (own() % 2 == 0) {
                    auto lock = groups[rank]->lock();
                    groups[rank]->run(lock, part.plan(), part.input(), part.output(), host);
                } else {
                    auto pending = std::make_shared<Call>();
                    pending->plan = part.plan();
                    pending->input = part.input();
                    pending->output = part.output();
                    {
                        const auto lock = groups[rank]->lock();
                        groups[rank]->push(pending);
                    }
                    Background::instance().serve(groups[rank]);
                    while (own() % 2 == 0 && !pending->done.load(std::memory_order_acquire)) std::this_thread::yield();
                    groups[rank]->wait(pending, host);
                }
                if (!part.right()) right[rank] = 0;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const char good : right) {
        if (good == 0) return false;
    }
    return true;
}

}  // namespace

// Arguments: how many seeds, 100 by default.
int main(int count, char** arguments) {
    const std::uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 100;
    const bool good = all("simulate", simulate, seeds) && all("finds_mismatch", finds_mismatch, seeds) &&
                      all("exchanges_messages", exchanges_messages, seeds) &&
                      all("run_threads", run_threads, seeds / 10);
    Background::instance().stop();
    return good ? 0 : 1;
}
