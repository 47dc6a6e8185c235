// Runs the Catch2 tests. Tests with a tag that names what they need run where it is, and are counted as skipped elsewhere: [gpu] a usable GPU,
// [nccl] NCCL beside it, [gpus] two GPUs or more and NCCL, [gloo] Gloo.
// The last line is "RESULT passed failed skipped", read by test/run.py.
#define CATCH_CONFIG_RUNNER
#include "test/catch.h"

#include <cstdio>
#include <map>
#include <set>

#include "comm/communicator.h"

namespace {
int passed = 0, failed = 0;
std::set<std::string> seen;

void count(const std::string& name, const Catch::Totals& totals) {
    seen.insert(name);
    if (totals.assertions.failed > 0 || totals.testCases.failed > 0) {
        ++failed;
        std::printf("FAILED: %s\n", name.c_str());
    } else {
        ++passed;
    }
}

#if __has_include(<catch2/catch_all.hpp>)
struct Counter : Catch::EventListenerBase {
    using EventListenerBase::EventListenerBase;
    void testCaseEnded(const Catch::TestCaseStats& stats) override { count(stats.testInfo->name, stats.totals); }
};
#else
struct Counter : Catch::TestEventListenerBase {
    using TestEventListenerBase::TestEventListenerBase;
    void testCaseEnded(const Catch::TestCaseStats& stats) override { count(stats.testInfo.name, stats.totals); }
};
#endif
CATCH_REGISTER_LISTENER(Counter)

// The tags whose tests cannot run here, and why.
std::map<std::string, std::string> missing_for_tags() {
    std::map<std::string, std::string> missing;
    std::string why_not;
    if (!Device::cuda_usable(&why_not)) missing["gpu"] = missing["gpus"] = missing["nccl"] = why_not;
    else if (!Communicator::available(DeviceKind::cuda, &why_not)) missing["gpus"] = missing["nccl"] = why_not;
    else if (Device::cuda_count() < 2) missing["gpus"] = "there is one GPU";
    if (!Communicator::available(DeviceKind::cpu, &why_not)) missing["gloo"] = why_not;
    return missing;
}

// Empty: none.
template <class Test> std::string tag_that_is_missing(const Test& test, const std::map<std::string, std::string>& missing) {
#if __has_include(<catch2/catch_all.hpp>)
    for (const auto& tag : test.getTestCaseInfo().tags)
        if (std::string name(tag.original.data(), tag.original.size()); missing.count(name)) return name;
#else
    for (const std::string& tag : test.tags)
        if (missing.count(tag)) return tag;
#endif
    return "";
}
}  // namespace

int main(int argc, char** argv) {
    Catch::Session session;
    if (int error = session.applyCommandLine(argc, argv)) return error;
    const std::map<std::string, std::string> missing = missing_for_tags();
    int skipped = 0;
    bool selected = !session.config().getTestsOrTags().empty();
    if (!missing.empty() && !selected) {
        std::string others = "~[.]";  // hidden ones count as selected where something is deselected
        for (auto& [tag, why_not] : missing) others += "~[" + tag + "]";
        auto config = session.configData();
        config.testsOrTags.push_back(others);
        session.useConfigData(config);
        std::map<std::string, int> skipped_for;
        for (const auto& test : Catch::getAllTestCasesSorted(session.config()))
            if (auto tag = tag_that_is_missing(test, missing); !tag.empty()) ++skipped, ++skipped_for[tag];
        for (auto& [tag, count] : skipped_for) std::printf("skipped %d tests tagged [%s]: %s\n", count, tag.c_str(), missing.at(tag).c_str());
    }
    int status = session.run();
    std::printf("RESULT %d %d %d\n", passed, failed, skipped);
    return status;
}
