// Collectives between CPUs by Gloo over TCP. Everything is done when a call returns.
#ifdef WITH_GLOO
#include <gloo/allreduce.h>
#include <gloo/broadcast.h>
#include <gloo/context.h>
#include <gloo/reduce.h>
#include <gloo/transport/context.h>
#include <gloo/transport/device.h>
#include <gloo/transport/tcp/device.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "comm/backends.h"

namespace {

// The address (in digits) from which this machine reaches `host`. Nothing is sent.
std::string address_towards(const std::string& host) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_DGRAM;
    if (int error = getaddrinfo(host.c_str(), "9", &hints, &found)) throw UserError("host " + host + ": " + gai_strerror(error));
    std::string address;
    for (const addrinfo* a = found; a && address.empty(); a = a->ai_next) {
        const int fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (fd < 0) continue;
        sockaddr_storage own{};
        socklen_t length = sizeof own;
        char digits[NI_MAXHOST];
        if (connect(fd, a->ai_addr, a->ai_addrlen) == 0 && getsockname(fd, reinterpret_cast<sockaddr*>(&own), &length) == 0 &&
            getnameinfo(reinterpret_cast<sockaddr*>(&own), length, digits, sizeof digits, nullptr, 0, NI_NUMERICHOST) == 0)
            address = digits;
        close(fd);
    }
    freeaddrinfo(found);
    if (address.empty()) throw UserError("host " + host + " cannot be reached from here");
    return address;
}

bool is_loopback(const std::string& address) { return address.rfind("127.", 0) == 0 || address == "::1"; }

// The address under which the other ranks reach this one: that from which it reaches rank 0. Where rank 0's machine knows itself by a loopback
// address and other machines take part, its ranks take the one from which they reach the first of those.
std::string own_address(Control& control) {
    std::string own = address_towards(control.world().address);
    for (const std::string& other : control.gather(own))
        if (is_loopback(own) && !is_loopback(other)) own = address_towards(other);
    return own;
}

// A connection between every two ranks.
class Mesh : public gloo::Context {
  public:
    explicit Mesh(Control& control) : gloo::Context(control.world().rank, control.world().size) {
        const auto limit = std::chrono::milliseconds(int64_t(1000 * control.timeout()));
        setTimeout(limit);
        device_ = gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr(own_address(control).c_str()));
        transportContext_ = device_->createContext(rank, size);
        transportContext_->setTimeout(limit);
        // Every rank has an address of its own for every other. All addresses of a rank are one message of parts of one length.
        std::vector<std::vector<char>> mine(size);
        size_t length = 0;
        for (int i = 0; i < size; ++i)
            if (i != rank) {
                mine[i] = transportContext_->createPair(i)->address().bytes();
                length = mine[i].size();
            }
        std::string message;
        for (std::vector<char>& bytes : mine) {
            bytes.resize(length);
            message.append(bytes.begin(), bytes.end());
        }
        const std::vector<std::string> addresses = control.gather(message);
        for (int i = 0; i < size; ++i)
            if (i != rank) {
                const auto begin = addresses[i].begin() + rank * length;
                transportContext_->getPair(i)->connect(std::vector<char>(begin, begin + length));
            }
    }
};

template <class T> void add(void* out, const void* a, const void* b, size_t n) {
    for (size_t i = 0; i < n; ++i) static_cast<T*>(out)[i] = static_cast<const T*>(a)[i] + static_cast<const T*>(b)[i];
}

class GlooCommunicator : public Communicator {
  public:
    GlooCommunicator(Device& device, Control& control) : Communicator(device, control) {
        guarded("connecting", [&] { mesh_ = std::make_shared<Mesh>(control_); });
    }

  private:
    std::shared_ptr<Mesh> mesh_;

    template <class Call> void guarded(const char* what, Call call) {
        try {
            call();
        } catch (const UserError&) {
            throw;
        } catch (const std::exception& e) {  // gloo::Exception and failed checks, which have no other base in common
            control_.lost(format("%s by Gloo failed: %s", what, e.what()));
        }
    }
    // Other than on a GPU every operation waits for the other ranks here.
    template <class Call> void wait_in(const char* what, Call call) {
        Control::Activity activity(&control_, Control::Kind::waiting, what);
        guarded(what, call);
    }
    template <class Options> Options options() const {
        Options options(mesh_);
        options.setTimeout(std::chrono::milliseconds(int64_t(1000 * control_.timeout())));
        return options;
    }
    // A ring: the order of the additions follows from the number of elements and of ranks alone, and every sum is made in one place.
    template <class T> void add_up(T* values, int64_t count) {
        if (count == 0) return;  // which later versions refuse
        auto o = options<gloo::AllreduceOptions>();
        o.setAlgorithm(gloo::AllreduceOptions::Algorithm::RING);
        o.setOutput(values, size_t(count));
        o.setReduceFunction(add<T>);
        gloo::allreduce(o);
    }

    void queue_all_reduce(const std::vector<Tensor>& tensors) override {
        wait_in("all_reduce", [&] {
            for (const Tensor& t : tensors) {
                if (t.dtype == DType::f64) add_up(t.as<double>(), t.numel());
                else add_up(t.as<float>(), t.numel());
            }
        });
    }
    void queue_reduce(Tensor tensor, int root) override {
        if (tensor.numel() == 0) return;
        wait_in("reduce", [&] {
            auto o = options<gloo::ReduceOptions>();
            o.setOutput(tensor.as<float>(), size_t(tensor.numel()));
            o.setRoot(root);
            o.setReduceFunction(add<float>);
            gloo::reduce(o);
        });
    }
    void queue_broadcast(const std::vector<Tensor>& tensors, int root) override {
        wait_in("broadcast", [&] {
            for (const Tensor& t : tensors) {
                if (t.numel() == 0) continue;
                auto o = options<gloo::BroadcastOptions>();
                o.setOutput(static_cast<char*>(t.data), size_t(t.numel() * size_of(t.dtype)));
                o.setRoot(root);
                gloo::broadcast(o);
            }
        });
    }
    void queue_finish() override {}
    void sum_now(std::vector<double>& values, const char* what) override {
        guarded(what, [&] { add_up(values.data(), int64_t(values.size())); });
    }
};

}  // namespace

std::unique_ptr<Communicator> connect_gloo(Device& device, Control& control) { return std::make_unique<GlooCommunicator>(device, control); }
#endif
