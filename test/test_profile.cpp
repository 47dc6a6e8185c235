// The books of a Profiler: what is counted, under which label, and that nothing is counted when none is attached.
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/profile.h"
#include "test/support.h"

namespace {

void check_books(Device& device) {
    const int64_t m = 96, n = 64, k = 128;
    DType type = device.activation_dtype();
    OnDevice a(device, type, m, k, std::vector<float>(m * k, 1.0f)), b(device, type, k, n, std::vector<float>(k * n, 2.0f)), d(device, type, m, n);
    auto product = [&] { matmul(device, d, 1.0f, a, Op::none, b, Op::none); };
    product();  // nobody listens
    Profiler profiler(device);
    CHECK(profiler.take().empty());
    {
        ProfileLabel outer(device, "outer");
        product();
        {
            ProfileLabel inner(device, "inner");
            product();
            product();
        }
        OperationTimer whole(device, "whole", 7, 9);
        product();  // counts for "whole"
    }
    product();
    std::vector<OperationProfile> list = profiler.take();
    REQUIRE(list.size() == 4);
    double flops = 2.0 * m * n * k;
    for (const OperationProfile& p : list) {
        INFO(p.label << "/" << p.name);
        bool whole = p.name == "whole";
        int64_t calls = p.label == "inner" ? 2 : 1;
        CHECK((whole ? p.label == "outer" : p.name == "matmul"));
        CHECK(p.calls == calls);
        CHECK(p.flops == (whole ? 7 : flops * double(calls)));
        CHECK(p.bytes == (whole ? 9 : double((m * k + k * n + m * n) * size_of(type) * calls)));
        CHECK(p.seconds > 0);
        CHECK(p.seconds < 10);
    }
    for (size_t i = 1; i < list.size(); ++i) CHECK(list[i - 1].seconds >= list[i].seconds);
    CHECK(profiler.take().empty());
}

}  // namespace

TEST_CASE("a profiler books operations by label and name", "[profile]") { check_books(*test_device("cpu")); }

TEST_CASE("a profiler books operations on the GPU", "[profile][gpu]") { check_books(*test_device("cuda")); }
