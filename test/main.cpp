// Runs the Catch2 tests. Tests tagged [gpu] run where a GPU is usable and are counted as skipped elsewhere.
// The last line is "RESULT passed failed skipped", read by test/run.py.
#define CATCH_CONFIG_RUNNER
#include "test/catch.h"

#include <cstdio>
#include <set>

#include "runtime/device.h"

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
}  // namespace

int main(int argc, char** argv) {
    Catch::Session session;
    if (int error = session.applyCommandLine(argc, argv)) return error;
    std::string why_not;
    bool gpu = Device::cuda_usable(&why_not);
    int skipped = 0;
    bool selected = !session.config().getTestsOrTags().empty();
    if (!gpu && !selected) {
        auto config = session.configData();
        config.testsOrTags.push_back("~[gpu]");
        session.useConfigData(config);
        for (const auto& test : Catch::getAllTestCasesSorted(session.config()))
#if __has_include(<catch2/catch_all.hpp>)
            for (const auto& tag : test.getTestCaseInfo().tags) skipped += std::string(tag.original.data(), tag.original.size()) == "gpu";
#else
            for (const auto& tag : test.getTestCaseInfo().tags) skipped += tag == "gpu";
#endif
        std::printf("skipped %d tests tagged [gpu]: %s\n", skipped, why_not.c_str());
    }
    int status = session.run();
    std::printf("RESULT %d %d %d\n", passed, failed, skipped);
    return status;
}
