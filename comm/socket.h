// TCP connections on which frames go: a length, a kind, and that many bytes. Nothing here blocks but connect_to, for as long as it is told.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// A file descriptor that closes itself.
class Socket {
  public:
    explicit Socket(int fd = -1) : fd_(fd) {}
    Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Socket& operator=(Socket&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Socket() { close(); }
    int fd() const { return fd_; }
    bool open() const { return fd_ >= 0; }
    void close();

  private:
    int fd_;
};

// A port of this machine that is free now.
int free_port();
// Listens on `port`: of the loopback interface if address names it, else of all interfaces, IPv6 and IPv4. UserError: the port is taken for
// longer than `patience` seconds, or not allowed.
Socket listen_on(const std::string& address, int port, double patience);
// The next connection that waits on a listening socket, not open if there is none.
Socket accept_from(const Socket& listener);
// Not open, with the reason in why_not, if there is no connection after `seconds`. UserError: no machine has that name.
Socket connect_to(const std::string& address, int port, double seconds, std::string& why_not);

// Values one after another, in the payload of a frame.
class Writer {
  public:
    Writer& number(int64_t value);
    Writer& text(const std::string& value);
    std::string bytes;
};
class Reader {  // throws std::runtime_error where the bytes end too soon
  public:
    explicit Reader(const std::string& bytes) : bytes_(bytes) {}
    int64_t number();
    std::string text();

  private:
    const std::string& bytes_;
    size_t at_ = 0;
};

struct Frame {
    uint8_t kind;
    std::string payload;
};
// As it goes over the wire; shared by all connections it is sent on.
using FrameBytes = std::shared_ptr<const std::string>;
FrameBytes encode(uint8_t kind, const std::string& payload);

class Connection {
  public:
    // longest: bytes of payload taken from the other side; what announces more is not one of ours.
    explicit Connection(Socket socket = Socket(), size_t longest = 1 << 10) : socket_(std::move(socket)), longest_(longest) {}
    bool open() const { return socket_.open(); }
    int fd() const { return socket_.fd(); }
    void close();
    void allow(size_t longest) { longest_ = longest; }

    // Queues it; flush passes on what the kernel takes.
    void send(FrameBytes frame);
    bool has_output() const { return !output_.empty(); }
    void flush();
    // No more will be sent; the other side sees an end after what has been flushed.
    void end_output();

    enum class State { open, ended, garbage };
    // Appends the whole frames that have come, up to `most` altogether; the rest waits here. Not open: they were the last.
    State receive(std::vector<Frame>& frames, size_t most = SIZE_MAX);

  private:
    Socket socket_;
    size_t longest_;
    std::string input_;
    std::deque<FrameBytes> output_;
    size_t sent_ = 0;  // bytes of the first of output_
};

// Waits until one of the connections (closed ones are passed over) or `others` can be read, or written if it has output, for so long at most.
// Flushes those that can be written.
void wait_and_flush(std::vector<Connection>& connections, const std::vector<int>& others, double seconds);
// Flushes what is queued, then reads and drops what comes until every other side has closed, for so many seconds at most: a connection that
// is closed with bytes unread takes back what the other side has not read yet.
void drain(std::vector<Connection>& connections, double seconds);
