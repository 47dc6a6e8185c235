// See watch.h.
#include "comm/watch.h"

#include <algorithm>

#include "runtime/error.h"

namespace {
constexpr char kResume[] = "no checkpoint is lost, --resume continues from the last if there is one";
}

Watch::Watch(std::vector<std::string> hosts, int self) : ranks_(hosts.size()), self_(size_t(self)) {
    for (size_t i = 0; i < hosts.size(); ++i) ranks_[i].host = std::move(hosts[i]);
}

void Watch::report(int rank, const Doing& doing, double now) {
    Rank& r = ranks_[size_t(rank)];
    if (doing.entered != r.doing.entered) r.moved = now;
    if (doing.serial != r.doing.serial) r.since = now;
    if (doing.kind == Control::Kind::busy || r.doing.kind == Control::Kind::busy) r.busy = now;
    r.doing = doing;
    r.heard = now;
}

std::string Watch::name(size_t rank) const { return format("rank %zu (on %s)", rank, ranks_[rank].host.c_str()); }

std::string Watch::death(int rank) const {
    return name(size_t(rank)) + " ended without a word while it was in " + ranks_[size_t(rank)].doing.what + "; " + kResume +
           "; if something killed it, look for an out-of-memory killer (dmesg) or a time limit";
}

std::string Watch::silent(double now, double timeout) const {
    for (size_t i = 0; i < ranks_.size(); ++i) {
        const Rank& r = ranks_[i];
        if (i == self_ || r.gone || r.heard == kNever || now - r.heard <= timeout) continue;
        return format("%s has not been heard of for %.3g s; it was in %s: the process was stopped, or its machine or the network is down; %s", name(i).c_str(), now - r.heard,
                      r.doing.what.c_str(), kResume);
    }
    return "";
}

std::string Watch::deserted() const {
    int64_t fewest = std::numeric_limits<int64_t>::max();  // waits entered by one that has ended
    size_t who = 0;
    for (size_t i = 0; i < ranks_.size(); ++i)
        if (ranks_[i].gone && ranks_[i].doing.entered < fewest) fewest = ranks_[i].doing.entered, who = i;
    for (size_t i = 0; i < ranks_.size(); ++i)
        if (ranks_[i].waits() && ranks_[i].doing.number > fewest)
            return format("%s has ended its run, but %s waits for it in %s; %s", name(who).c_str(), name(i).c_str(), ranks_[i].doing.what.c_str(), kResume);
    return "";
}

// "rank 0 has", "ranks 0, 2 have": those in this wait.
std::string Watch::waiting_for(int64_t number) const {
    std::string list;
    int count = 0;
    for (size_t i = 0; i < ranks_.size(); ++i)
        if (ranks_[i].waits() && ranks_[i].doing.number == number && ++count <= 8) list += (list.empty() ? "" : ", ") + std::to_string(i);
    if (count > 8) list += format(" and %d more", count - 8);
    return (count == 1 ? "rank " : "ranks ") + list + (count == 1 ? " has" : " have");
}

std::string Watch::stuck(double now, double timeout) const {
    const Rank* first = nullptr;  // of those in the earliest wait, the one that was there first
    for (const Rank& r : ranks_)
        if (r.waits() && (!first || r.doing.number < first->doing.number || (r.doing.number == first->doing.number && r.since < first->since))) first = &r;
    if (!first || now - first->since <= timeout) return "";
    const std::string& what = first->doing.what;
    bool all_came = true;
    double arrival = first->since;
    for (size_t i = 0; i < ranks_.size(); ++i) {
        const Rank& r = ranks_[i];
        arrival = std::max(arrival, r.moved);
        if (r.doing.entered >= first->doing.number) continue;
        all_came = false;
        if (r.doing.kind != Control::Kind::computing || now - std::max(first->since, r.busy) <= timeout) continue;
        return format("%s has not come to %s, where %s waited for %.3g s; it has been in %s for %.3g s; %s; where that may take so long raise --comm-timeout", name(i).c_str(),
                      what.c_str(), waiting_for(first->doing.number).c_str(), now - first->since, r.doing.what.c_str(), now - r.since, kResume);
    }
    if (!all_came || now - arrival <= timeout) return "";
    return format("%s been in %s for %.3g s, to which all ranks came, and it does not end; %s; if it happens again run with NCCL_DEBUG=INFO, and with several network "
                  "interfaces name the one to use in NCCL_SOCKET_IFNAME",
                  waiting_for(first->doing.number).c_str(), what.c_str(), now - arrival, kResume);
}
