#include "replica_check.h"

#include <cstring>

#include "comm/communicator.h"
#include "ops/checksum.h"

ReplicaCheck::ReplicaCheck(Device& device, Llama& model) : device_(device), model_(model) {
    for (const TensorEntry& e : model.table().entries())
        if (e.saved) saved_.push_back(&e);
    sums_ = static_cast<uint64_t*>(device.allocate(int64_t(saved_.size() * sizeof(uint64_t)), "checksums"));
}

ReplicaCheck::~ReplicaCheck() { device_.release(sums_); }

std::string ReplicaCheck::first_difference(const std::vector<uint64_t>& mine, const std::vector<uint64_t>& theirs) const {
    for (size_t i = 0; i < mine.size(); ++i)
        if (i >= theirs.size() || mine[i] != theirs[i]) return i < saved_.size() ? saved_[i]->name : model_.parameters()[i - saved_.size()]->name + " (its count of updates)";
    return "";
}

void ReplicaCheck::verify(int64_t step) {
    Communicator* ranks = device_.communicator();
    if (!ranks) return;
    for (size_t i = 0; i < saved_.size(); ++i) checksum(device_, sums_, int64_t(i), saved_[i]->holder->data, saved_[i]->holder->bytes());
    Communicator::synchronize(device_, "the checksums");
    std::vector<uint64_t> mine(saved_.size());
    device_.download(mine.data(), sums_, int64_t(mine.size() * sizeof(uint64_t)));
    for (const Parameter* p : model_.parameters()) mine.push_back(uint64_t(p->updates) * 2 + p->active);

    std::string bytes(mine.size() * sizeof(uint64_t), '\0');
    std::memcpy(&bytes[0], mine.data(), bytes.size());
    const std::string root_bytes = ranks->control().broadcast(bytes);
    std::vector<uint64_t> theirs(root_bytes.size() / sizeof(uint64_t));
    std::memcpy(theirs.data(), root_bytes.data(), theirs.size() * sizeof(uint64_t));
    const std::vector<std::string> differences = ranks->control().gather(first_difference(mine, theirs));
    for (size_t rank = 0; rank < differences.size(); ++rank)
        if (!differences[rank].empty())
            throw InternalError(format("after step %lld rank %zu holds another %s than rank 0 (%s); GPUs of different kinds and faulty ones do that; --resume continues from the last checkpoint, "
                                       "which was the same on all",
                                       (long long)step, rank, differences[rank].c_str(), agreed_ < 0 ? "they never agreed" : format("they agreed after step %lld", (long long)agreed_).c_str()));
    agreed_ = step;
}
