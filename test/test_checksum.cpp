// Checksums against a plain loop that follows the description in checksum.cu, and what they must be able to tell apart.
#include "ops/checksum.h"

#include <omp.h>

#include <cstring>

#include "test/support.h"

namespace {

using Bytes = std::vector<unsigned char>;

Bytes random_bytes(std::mt19937_64& rng, int64_t n) {
    Bytes bytes(n);
    for (auto& b : bytes) b = (unsigned char)(rng());
    return bytes;
}

// SplitMix64 as published: its n-th output from the state s is splitmix64(s + (n + 1)·γ).
uint64_t splitmix64(uint64_t z) {
    z = (z ^ z >> 30) * 13787848793156543929ull;
    z = (z ^ z >> 27) * 10723151780598845931ull;
    return z ^ z >> 31;
}

uint64_t expected_checksum(const Bytes& bytes) {
    uint64_t sum = splitmix64(~uint64_t(bytes.size())), place = 0;
    for (size_t i = 0; i < bytes.size(); i += 4, place += 11400714819323198485ull) {
        uint32_t word = 0;
        for (size_t k = 0; k < 4 && i + k < bytes.size(); ++k) word += uint32_t(bytes[i + k]) << 8 * k;
        sum += splitmix64(place + word);
    }
    return sum;
}

// In memory of its own, `shift` words from the start of an allocation; what lies behind the bytes is not zero and what lies beside the sum stays.
uint64_t checksum_of(Device& device, const Bytes& bytes, int64_t shift = 0) {
    const int64_t n = int64_t(bytes.size()), room = 4 * shift + n + 16;
    OnDevice memory(device, DType::u8, 1, room), sums(device, DType::f64, 1, 3);
    char* data = static_cast<char*>(memory.t.data) + 4 * shift;
    device.upload(data, bytes.data(), n);
    checksum(device, static_cast<uint64_t*>(sums.t.data), 1, data, n);
    const auto got = sums.raw<uint64_t>();
    CHECK(got[0] == ~uint64_t(0));
    CHECK(got[2] == ~uint64_t(0));
    return got[1];
}

void check_against_loop(Device& device) {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    std::vector<int64_t> sizes;
    for (int64_t n = 0; n <= 40; ++n) sizes.push_back(n);
    for (int i = 0; i < 30; ++i) sizes.push_back(int64_t(rng() % (int64_t(1) << (6 + i / 2))));
    sizes.push_back((int64_t(1) << 25) + 16 * int64_t(rng() % 1000) + 3);
    for (int64_t n : sizes)
        for (int64_t shift : {0, 1, 2, 3}) {
            INFO(n << " bytes, shifted by " << shift << " words");
            const Bytes bytes = random_bytes(rng, n);
            REQUIRE(checksum_of(device, bytes, shift) == expected_checksum(bytes));
        }
    // Zeros are not nothing.
    for (int64_t n : {0, 1, 3, 4, 1000}) REQUIRE(checksum_of(device, Bytes(n)) == expected_checksum(Bytes(n)));
}

void check_differences(Device& device) {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int64_t n : {1, 3, 4, 31, 64, 257, 5000}) {
        Bytes bytes = random_bytes(rng, n);
        if (n == 257) std::fill(bytes.begin(), bytes.end(), 0);  // all words the same
        const uint64_t sum = checksum_of(device, bytes);
        CHECK(checksum_of(device, bytes) == sum);
        for (int64_t trial = 0; trial < std::min<int64_t>(8 * n, 300); ++trial) {
            const int64_t bit = 8 * n <= 300 ? trial : int64_t(rng() % (8 * n));
            Bytes flipped = bytes;
            flipped[bit / 8] = (unsigned char)(flipped[bit / 8] ^ 1 << bit % 8);
            INFO(n << " bytes, bit " << bit);
            REQUIRE(checksum_of(device, flipped) != sum);
        }
        Bytes longer = bytes;
        for (int zeros = 1; zeros <= 5; ++zeros) {
            longer.push_back(0);
            CHECK(checksum_of(device, longer) != sum);
        }
    }
    for (int trial = 0; trial < 200; ++trial) {  // two words change places
        std::vector<uint32_t> words(2 + rng() % 300);
        for (auto& w : words) w = uint32_t(rng() % 3);
        const size_t a = rng() % words.size(), b = rng() % words.size();
        const auto bytes_of = [&] { return Bytes(reinterpret_cast<unsigned char*>(words.data()), reinterpret_cast<unsigned char*>(words.data() + words.size())); };
        const uint64_t sum = checksum_of(device, bytes_of());
        std::swap(words[a], words[b]);
        REQUIRE((checksum_of(device, bytes_of()) != sum) == (words[a] != words[b]));
    }
}

}  // namespace

TEST_CASE("checksums are those of a plain loop", "[checksum]") { check_against_loop(*test_device("cpu", 1 << 20)); }
TEST_CASE("checksums on the GPU are those of a plain loop", "[checksum][gpu]") { check_against_loop(*test_device("cuda", 1 << 20)); }
TEST_CASE("checksums tell bits, places and lengths apart", "[checksum]") { check_differences(*test_device("cpu", 1 << 20)); }
TEST_CASE("checksums on the GPU tell bits, places and lengths apart", "[checksum][gpu]") { check_differences(*test_device("cuda", 1 << 20)); }

TEST_CASE("checksums do not depend on the number of threads", "[checksum]") {
    std::mt19937_64 rng(fresh_seed());
    auto device = test_device("cpu", 1 << 20);
    const Bytes bytes = random_bytes(rng, 100003);
    const int threads = omp_get_max_threads();
    for (int count : {1, 2, 5}) {
        omp_set_num_threads(count);
        CHECK(checksum_of(*device, bytes) == expected_checksum(bytes));
    }
    omp_set_num_threads(threads);
}

TEST_CASE("a dry device takes no checksums", "[checksum]") {
    auto device = Device::open_dry(DeviceKind::cuda);
    void* nowhere = device->allocate(8, "sums");
    checksum(*device, static_cast<uint64_t*>(nowhere), 5, nowhere, 1000);
    CHECK_THROWS_AS(checksum(*device, static_cast<uint64_t*>(nowhere), 0, static_cast<char*>(nowhere) + 1, 8), InternalError);
    CHECK(device->scratch_high_water() == 0);
}
