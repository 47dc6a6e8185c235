// See socket.h.
#include "comm/socket.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "runtime/error.h"
#include "runtime/metrics.h"

namespace {

constexpr size_t kHeader = 5;  // 32-bit length, 8-bit kind

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

Addresses look_up(const char* host, int port, int flags, int& error) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_family = AF_UNSPEC, hints.ai_socktype = SOCK_STREAM, hints.ai_flags = flags | AI_NUMERICSERV;
    error = getaddrinfo(host, std::to_string(port).c_str(), &hints, &found);
    return Addresses(error ? nullptr : found, freeaddrinfo);
}

Socket open_socket(const addrinfo& a) { return Socket(socket(a.ai_family, a.ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, a.ai_protocol)); }

void set(const Socket& socket, int level, int option, int value) { setsockopt(socket.fd(), level, option, &value, sizeof value); }

// Without a listener a connection attempt to a port of this machine can get that same port as its own, and is then connected to itself.
bool connected_to_itself(const Socket& socket) {
    sockaddr_storage own{}, other{};
    socklen_t own_size = sizeof own, other_size = sizeof other;
    getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&own), &own_size);
    getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&other), &other_size);
    return own_size == other_size && !std::memcmp(&own, &other, own_size);
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

int milliseconds(double seconds) { return int(std::min(std::max(seconds, 0.0), 1e6) * 1000 + 0.999); }

// 0 or the reason why not, as errno has it.
int finish_connecting(const Socket& socket, const addrinfo& a, double seconds) {
    if (connect(socket.fd(), a.ai_addr, a.ai_addrlen) == 0) return 0;
    if (errno != EINPROGRESS) return errno;
    pollfd wait{socket.fd(), POLLOUT, 0};
    if (poll(&wait, 1, milliseconds(seconds)) <= 0) return ETIMEDOUT;
    int error = 0;
    socklen_t size = sizeof error;
    return getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) == 0 ? error : errno;
}

}  // namespace

void Socket::close() {
    if (open()) ::close(std::exchange(fd_, -1));
}

int free_port() {
    Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    socklen_t size = sizeof address;
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    if (!socket.open() || bind(socket.fd(), generic, size) || getsockname(socket.fd(), generic, &size))
        throw UserError(format("cannot find a free TCP port on this machine: %s", std::strerror(errno)));
    return ntohs(address.sin_port);
}

Socket listen_on(const std::string& address, int port, double patience) {
    bool loopback = address == "localhost" || address == "::1" || address.rfind("127.", 0) == 0;
    double deadline = wall_seconds() + patience;
    for (;;) {
        int error = 0;
        auto addresses = look_up(loopback ? address.c_str() : nullptr, port, AI_PASSIVE, error);
        // One socket on :: takes IPv4 as well; where there is no IPv6 the next one is 0.0.0.0.
        std::vector<const addrinfo*> order;
        for (const addrinfo* a = addresses.get(); a; a = a->ai_next) order.push_back(a);
        std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->ai_family == AF_INET6 && b->ai_family != AF_INET6; });
        error = EADDRNOTAVAIL;
        for (const addrinfo* a : order) {
            Socket socket = open_socket(*a);
            if (!socket.open()) continue;
            set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
            if (a->ai_family == AF_INET6) set(socket, IPPROTO_IPV6, IPV6_V6ONLY, 0);
            if (bind(socket.fd(), a->ai_addr, a->ai_addrlen) == 0 && listen(socket.fd(), 1024) == 0) return socket;
            error = errno;
            if (error == EADDRINUSE) break;
        }
        if (error != EADDRINUSE || wall_seconds() > deadline)
            throw UserError(format("rank 0 cannot listen on port %d: %s; %s", port, std::strerror(error), "set MASTER_PORT to another one, the same for all ranks"));
        usleep(50'000);
    }
}

Socket accept_from(const Socket& listener) {
    Socket socket(accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.open()) set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
    return socket;
}

Socket connect_to(const std::string& address, int port, double seconds, std::string& why_not) {
    int error = 0;
    auto addresses = look_up(address.c_str(), port, 0, error);
    why_not = gai_strerror(error);
    if (error == EAI_NONAME) throw UserError("there is no machine \"" + address + "\", where rank 0 should be (" + why_not + "); set MASTER_ADDR to its name or address");
    double deadline = wall_seconds() + seconds;
    for (const addrinfo* a = addresses.get(); a; a = a->ai_next) {
        Socket socket = open_socket(*a);
        error = socket.open() ? finish_connecting(socket, *a, deadline - wall_seconds()) : errno;
        if (!error && connected_to_itself(socket)) error = ECONNREFUSED;
        why_not = std::strerror(error);
        if (error) continue;
        set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
        return socket;
    }
    return Socket();
}

Writer& Writer::number(int64_t value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
}

Writer& Writer::text(const std::string& value) {
    number(int64_t(value.size()));
    bytes += value;
    return *this;
}

int64_t Reader::number() {
    int64_t value;
    if (bytes_.size() - at_ < sizeof value) throw std::runtime_error("a message is too short");
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
}

std::string Reader::text() {
    uint64_t size = uint64_t(number());
    if (bytes_.size() - at_ < size) throw std::runtime_error("a message is too short");
    at_ += size;
    return bytes_.substr(at_ - size, size);
}

FrameBytes encode(uint8_t kind, const std::string& payload) {
    CHECK_INTERNAL(payload.size() <= UINT32_MAX, "a message of %zu bytes", payload.size());
    uint32_t size = uint32_t(payload.size());
    std::string bytes(reinterpret_cast<const char*>(&size), sizeof size);
    bytes += char(kind);
    bytes += payload;
    return std::make_shared<const std::string>(std::move(bytes));
}

void Connection::close() {
    socket_.close();
    output_.clear();
}

void Connection::send(FrameBytes frame) {
    if (open()) output_.push_back(std::move(frame));
}

void Connection::flush() {
    while (!output_.empty()) {
        const std::string& bytes = *output_.front();
        ssize_t n = ::send(fd(), bytes.data() + sent_, bytes.size() - sent_, MSG_NOSIGNAL);
        if (n < 0) {
            if (!would_block()) output_.clear(), sent_ = 0;  // nobody reads any more; receive says so, after what came before that
            return;
        }
        sent_ += size_t(n);
        if (sent_ == bytes.size()) output_.pop_front(), sent_ = 0;
    }
}

void Connection::end_output() {
    if (open()) shutdown(fd(), SHUT_WR);
}

Connection::State Connection::receive(std::vector<Frame>& frames, size_t most) {
    State state = State::open;
    for (int round = 0; round < 16; ++round) {  // no more at a time: the others want to be heard too
        char buffer[1 << 16];
        ssize_t n = recv(fd(), buffer, sizeof buffer, 0);
        if (n > 0) input_.append(buffer, size_t(n));
        else if (n == 0 || !would_block()) state = State::ended;
        if (n < ssize_t(sizeof buffer)) break;
    }
    size_t at = 0;
    while (frames.size() < most && input_.size() - at >= kHeader) {
        uint32_t size;
        std::memcpy(&size, input_.data() + at, sizeof size);
        if (size > longest_) return State::garbage;
        if (input_.size() - at < kHeader + size) break;
        frames.push_back({uint8_t(input_[at + 4]), input_.substr(at + kHeader, size)});
        at += kHeader + size;
    }
    input_.erase(0, at);
    return state;
}

void wait_and_flush(std::vector<Connection>& connections, const std::vector<int>& others, double seconds) {
    std::vector<pollfd> wait;
    for (int fd : others) wait.push_back({fd, POLLIN, 0});
    for (const Connection& c : connections)
        if (c.open()) wait.push_back({c.fd(), short(c.has_output() ? POLLIN | POLLOUT : POLLIN), 0});
    poll(wait.data(), wait.size(), milliseconds(seconds));
    for (Connection& c : connections)
        if (c.open()) c.flush();
}

void drain(std::vector<Connection>& connections, double seconds) {
    double deadline = wall_seconds() + seconds;
    std::vector<bool> told(connections.size(), false);
    for (double left = seconds; left > 0; left = deadline - wall_seconds()) {
        bool any = false;
        for (size_t i = 0; i < connections.size(); ++i) {
            Connection& c = connections[i];
            if (!c.open()) continue;
            c.flush();
            if (!c.has_output() && !told[i]) c.end_output(), told[i] = true;
            std::vector<Frame> dropped;
            if (c.receive(dropped) != Connection::State::open) c.close();
            any = any || c.open();
        }
        if (!any) return;
        wait_and_flush(connections, {}, left);
    }
    for (Connection& c : connections) c.close();
}
