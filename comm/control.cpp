// See control.h; what goes on behind it is in connections.cpp.
#include "comm/control.h"

#include "comm/connections.h"

Control::Control(const World& world, double timeout, double heartbeat) : world_(world), connections_(std::make_unique<Connections>(world, timeout, heartbeat)) {}
Control::~Control() = default;

double Control::timeout() const {
    std::lock_guard<std::mutex> lock(connections_->mutex);
    return connections_->timeout;
}

void Control::set_timeout(double seconds) {
    std::lock_guard<std::mutex> lock(connections_->mutex);
    connections_->timeout = seconds;
}

std::string Control::broadcast(const std::string& text) {
    Activity activity(this, Kind::waiting, connections_->exchange_name());
    if (!world_.root()) return connections_->take(0, kText);
    connections_->post(kAll, kText, text);
    return text;
}

std::vector<std::string> Control::gather(const std::string& text) {
    Activity activity(this, Kind::waiting, connections_->exchange_name());
    std::vector<std::string> all(size_t(world_.size), text);
    if (world_.root()) {
        Writer writer;
        for (int rank = 0; rank < world_.size; ++rank) {
            if (rank > 0) all[size_t(rank)] = connections_->take(rank, kPart);
            writer.text(all[size_t(rank)]);
        }
        connections_->post(kAll, kParts, writer.bytes);
    } else {
        connections_->post(0, kPart, text);
        std::string bytes = connections_->take(0, kParts);
        Reader reader(bytes);
        for (std::string& part : all) part = reader.text();
    }
    return all;
}

Control::Activity::Activity(Control* control, Kind kind, std::string what) : control_(control) {
    if (control_) control_->connections_->begin(kind, std::move(what));
}

Control::Activity::~Activity() {
    if (control_) control_->connections_->finish();
}

void Control::fail(const std::string& message, int code) { connections_->fail(message, code); }

void Control::lost(const std::string& what) {
    usleep(useconds_t(kMoment * 1e6));
    fail(what, kLostCode);
}

Control::Uninterrupted::Uninterrupted(Control* control) : control_(control) {
    if (!control_) return;
    Connections& c = *control_->connections_;
    std::unique_lock<std::mutex> lock(c.mutex);
    while (c.ending && c.uninterrupted == 0) c.changed.wait(lock);  // the end comes now
    ++c.uninterrupted;
    c.uninterrupted_thread = std::this_thread::get_id();
}

Control::Uninterrupted::~Uninterrupted() {
    if (!control_) return;
    Connections& c = *control_->connections_;
    std::lock_guard<std::mutex> lock(c.mutex);
    if (c.uninterrupted > 0) --c.uninterrupted;
    c.changed.notify_all();
}
