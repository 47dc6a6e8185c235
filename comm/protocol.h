// What goes over the connections between rank 0 and the others, and how these come to be (the rest of comm/control.h is in connections.cpp).
#pragma once
#include <string>
#include <vector>

#include "comm/socket.h"
#include "comm/world.h"

// Kinds of frames, with their payloads. The first three begin with kMagic and stay as they are in every version.
enum FrameKind : uint8_t {
    kHello,     // to rank 0: magic, version, size of the world, rank, host name
    kWelcome,   // the answer: magic, version, rank 0's host name
    kRefused,   // the other answer: magic, version, reason
    kStart,     // to all: everyone is there
    kReport,    // both ways, at every heartbeat and change: what the main thread is doing
    kText,      // from rank 0: a broadcast
    kPart,      // to rank 0: a contribution to a gather
    kParts,     // from rank 0: the gather's result
    kFail,      // to rank 0: exit code, message
    kEnd,       // from rank 0: all end, with this exit code; to a rank 0 that was not heard of, should it wake up: it has been said
    kGoodbye,   // both ways: an orderly end
};

constexpr char kMagic[] = "train_loqt control";
constexpr int64_t kVersion = 1;
constexpr size_t kLongestGreeting = 1 << 10, kLongestFrame = size_t(1) << 30;

struct Links {
    std::vector<Connection> to;      // by rank: on rank 0 to all others, elsewhere to rank 0 only
    std::vector<std::string> hosts;  // by rank; empty where not known
};

// Returns when all ranks are connected; throws what Control's constructor throws. Where rank 0 has found the mistake, and prints it, the others end here.
Links connect_ranks(const World& world, double timeout);
