// CRC-32 (IEEE 802.3, reflected polynomial 0xEDB88320): the same value as zlib.crc32, so any tool can check our files.
// Sixteen bytes per step by table lookup ("slicing", Kounavis & Berry 2005): some GB/s on one core.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

struct Crc32Tables {
    uint32_t t[16][256];  // t[k][b]: what byte b contributes when k more bytes follow it in the step
    Crc32Tables() {
        for (uint32_t b = 0; b < 256; ++b) {
            uint32_t c = b;
            for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0xEDB88320u : 0u);
            t[0][b] = c;
        }
        for (int k = 1; k < 16; ++k)
            for (int b = 0; b < 256; ++b) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 0xff];
    }
};

// A running checksum: update() any number of times, value() at any point.
class Crc32 {
  public:
    void update(const void* data, size_t bytes) {
        static const Crc32Tables tables;
        const auto& t = tables.t;
        const unsigned char* p = static_cast<const unsigned char*>(data);
        uint32_t c = state_;
        for (; bytes >= 16; bytes -= 16, p += 16) {
            uint32_t w[4];
            std::memcpy(w, p, 16);  // little-endian words
            w[0] ^= c;
            c = 0;
            for (int i = 0; i < 4; ++i)
                c ^= t[15 - 4 * i][w[i] & 0xff] ^ t[14 - 4 * i][(w[i] >> 8) & 0xff] ^ t[13 - 4 * i][(w[i] >> 16) & 0xff] ^ t[12 - 4 * i][w[i] >> 24];
        }
        for (; bytes > 0; --bytes, ++p) c = (c >> 8) ^ t[0][(c ^ *p) & 0xff];
        state_ = c;
    }
    uint32_t value() const { return ~state_; }

  private:
    uint32_t state_ = 0xffffffffu;
};

inline uint32_t crc32(const void* data, size_t bytes) {
    Crc32 c;
    c.update(data, bytes);
    return c.value();
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "file formats here are little-endian and are read without conversion");
