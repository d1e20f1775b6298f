// A byte channel: an ordered stream of bytes from one rank to another, whose ends never wait.
//
// The writer takes as many bytes as it has room for now. The reader shows what has come, as far as it lies in one
// piece, without copying it; the view is valid until `advance` says how much of it was used. PipeWriter and PipeReader
// are the two ends over shared memory.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>

#include "pipe.hpp"

namespace collectives::transports {

template <typename Writer>
concept ByteWriter = requires(Writer writer, std::span<const std::byte> data) {
    { writer.try_send(data) } -> std::same_as<std::size_t>;
};

template <typename Reader>
concept ByteReader = requires(Reader reader, std::size_t length) {
    { reader.arrived() } -> std::same_as<std::span<const std::byte>>;
    { reader.advance(length) } -> std::same_as<void>;
};

static_assert(ByteWriter<PipeWriter> && ByteReader<PipeReader>);

}  // namespace collectives::transports
