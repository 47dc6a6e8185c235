// The judgement of what ranks report, on a clock made here.
#include "comm/watch.h"

#include "test/support.h"
#include "test/temp_dir.h"

namespace {

using Kind = Control::Kind;
constexpr double kTimeout = 10;

// Ranks that report every second what they are told to be doing.
struct Ranks {
    explicit Ranks(size_t size) : watch(std::vector<std::string>(size, "box"), 0), doing(size), stopped(size, false) { pass(0); }

    void enter(int rank, Kind kind, const std::string& what) {
        Doing& d = doing[size_t(rank)];
        d.kind = kind, d.what = what, ++d.serial;
        if (kind == Kind::waiting) d.number = ++d.entered;
    }
    void pass(double seconds) {
        for (double end = now + seconds;; now = std::min(end, now + 1)) {
            for (size_t i = 0; i < doing.size(); ++i)
                if (!stopped[i]) watch.report(int(i), doing[i], now);
            if (now >= end) return;
        }
    }
    std::string verdict() const {
        for (std::string text : {watch.silent(now, kTimeout), watch.deserted(), watch.stuck(now, kTimeout)})
            if (!text.empty()) return text;
        return "";
    }

    double now = 100;
    Watch watch;
    std::vector<Doing> doing;
    std::vector<bool> stopped;
};

}  // namespace

TEST_CASE("A rank that does not come", "[watch]") {
    Ranks ranks(4);
    ranks.enter(2, Kind::computing, "a long step");
    ranks.pass(7);
    for (int rank : {0, 1, 3}) ranks.enter(rank, Kind::waiting, "the sum");
    ranks.pass(9.9);
    CHECK(ranks.verdict() == "");
    ranks.pass(0.2);
    CHECK(has(ranks.verdict(), "rank 2 (on box) has not come to the sum, where ranks 0, 1, 3 have waited for 10.1 s; it has been in a long step for 17.1 s"));
    ranks.enter(2, Kind::waiting, "the sum");
    ranks.pass(9);
    CHECK(ranks.verdict() == "");
}

TEST_CASE("A rank that has come and gone on is not missed; names do not count", "[watch]") {
    Ranks ranks(3);
    for (int rank : {0, 1, 2}) ranks.enter(rank, Kind::waiting, "a sum");
    ranks.enter(1, Kind::computing, "the next step");
    ranks.pass(9);
    CHECK(ranks.verdict() == "");
    ranks.pass(2);  // all came, but 0 and 2 are still there
    std::string text = ranks.verdict();
    CHECK(has(text, "ranks 0, 2 have been in a sum for 11 s, to which all ranks came"));
    CHECK(has(text, "NCCL_SOCKET_IFNAME"));
    ranks.enter(0, Kind::computing, "a"), ranks.enter(2, Kind::waiting, "a sum");  // of the same name, but the next one
    ranks.pass(11);
    CHECK(has(ranks.verdict(), "has not come to a sum, where rank 2 has"));
}

TEST_CASE("All wait and none gets through: counted from the last that came", "[watch]") {
    Ranks ranks(2);
    ranks.enter(0, Kind::waiting, "a sum");
    ranks.enter(1, Kind::busy, "a checkpoint");
    ranks.pass(50);
    CHECK(ranks.verdict() == "");
    ranks.enter(1, Kind::waiting, "a sum");
    ranks.pass(9);
    CHECK(ranks.verdict() == "");
    ranks.pass(2);
    CHECK(has(ranks.verdict(), "ranks 0, 1 have been in a sum for 11 s"));
}

TEST_CASE("Who is busy has the time it needs, and then as long as any", "[watch]") {
    Ranks ranks(2);
    ranks.enter(0, Kind::waiting, "a sum");
    ranks.enter(1, Kind::busy, "a checkpoint");
    ranks.pass(1000);
    CHECK(ranks.verdict() == "");
    ranks.enter(1, Kind::computing, "a step");
    ranks.pass(9);
    CHECK(ranks.verdict() == "");
    ranks.pass(2);
    CHECK(has(ranks.verdict(), "rank 1 (on box) has not come"));
}

TEST_CASE("A rank held up by another is not to blame", "[watch]") {
    Ranks ranks(3);
    for (int rank : {0, 1}) ranks.enter(rank, Kind::waiting, "the first");
    ranks.pass(1);
    ranks.enter(0, Kind::waiting, "the second");  // it needed nothing of rank 2
    ranks.pass(11);
    CHECK(has(ranks.verdict(), "rank 2 (on box) has not come to the first, where rank 1 has"));
}

TEST_CASE("A rank that falls silent, and one that computes for long without anyone waiting", "[watch]") {
    Ranks ranks(3);
    ranks.enter(1, Kind::computing, "step 7");
    ranks.pass(100);
    CHECK(ranks.verdict() == "");
    ranks.stopped[1] = true;
    ranks.pass(10);
    CHECK(ranks.verdict() == "");
    ranks.pass(1);
    CHECK(has(ranks.verdict(), "rank 1 (on box) has not been heard of for 11 s; it was in step 7"));
    CHECK(has(ranks.watch.death(1), "rank 1 (on box) ended without a word while it was in step 7"));
}

TEST_CASE("An orderly end harms no one who does not wait for it", "[watch]") {
    Ranks ranks(3);
    for (int rank : {0, 1, 2}) ranks.enter(rank, Kind::waiting, "the last sum");
    ranks.enter(1, Kind::computing, "its end");
    ranks.pass(1);
    ranks.watch.goodbye(1);
    ranks.stopped[1] = true;
    CHECK(ranks.verdict() == "");
    for (int rank : {0, 2}) ranks.enter(rank, Kind::computing, "an export");
    ranks.pass(100);
    CHECK(ranks.verdict() == "");
    ranks.enter(2, Kind::waiting, "one more sum");
    ranks.pass(0);
    CHECK(has(ranks.verdict(), "rank 1 (on box) has ended its run, but rank 2 (on box) waits for it in one more sum"));
}
