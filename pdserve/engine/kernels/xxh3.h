// XXH3-64 of more than 240 bytes, without a seed, stripe by stripe; the numbers are the ones of
// Yann Collet's specification (xxhash_spec.md).
#pragma once

#include "vectors.h"

#if HAS_TILES

namespace {

constexpr int64_t STRIPE = 64;
constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F,
                   PRIME64_3 = 0x165667B19E3779F9, PRIME64_4 = 0x85EBCA77C2B2AE63,
                   PRIME64_5 = 0x27D4EB2F165667C5, PRIME_MIX = 0x165667919E3779F9;

// The specification's 192 bytes, as numbers of 8.
constexpr uint64_t SECRET[24] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072,
    0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82, 0x8E2443F7744608B8, 0x4C263A81E69035E0,
    0xCB00C391BB52283C, 0xA32E531B8B65D088, 0x4EF90DA297486471, 0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A, 0x647378D9C97E9FC8,
    0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5, 0x49DAF0B751DD0D17, 0x9E68D429265516D3,
    0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
};
constexpr int64_t SECRET_BYTES = sizeof(SECRET);

// As many lanes of 64 bits as a register holds. ``swapped``: those of each pair; ``low_products``: of
// the lower halves of the lanes.
typedef uint64_t Lanes __attribute__((vector_size(sizeof(V))));
#if HAS_AVX512
inline Lanes swapped(Lanes a) { return (Lanes)_mm512_permutex_epi64((__m512i)a, 0xB1); }
inline Lanes low_products(Lanes a, Lanes b) {
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#else
inline Lanes swapped(Lanes a) { return (Lanes)_mm256_permute4x64_epi64((__m256i)a, 0xB1); }
inline Lanes low_products(Lanes a, Lanes b) {
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#endif
typedef Lanes LanesAnywhere __attribute__((aligned(1), may_alias));

// 64 bytes in registers.
struct Stripe {
  static constexpr int64_t PARTS = STRIPE / sizeof(Lanes);
  Lanes parts[PARTS];
};

// Not by memcpy: it may go through memory, in other pieces than are then loaded.
inline Stripe load_stripe(const void* from) {
  Stripe stripe;
  for (int64_t i = 0; i < Stripe::PARTS; ++i) {
    stripe.parts[i] = static_cast<const LanesAnywhere*>(from)[i];
  }
  return stripe;
}

inline const char* secret(int64_t byte) { return reinterpret_cast<const char*>(SECRET) + byte; }

inline uint64_t folded_product(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

class Xxh3 {
 public:
  // The next 64 bytes, each once and in order, up to (bytes - 1) / 64 stripes.
  void add(const Stripe& data) {
    accumulate(data, secret(8 * place_));
    if (++place_ == BETWEEN_SCRAMBLES) {
      scramble();
      place_ = 0;
    }
  }

  // ``last``: the last 64 of all ``bytes``, some of which may have been in a stripe before.
  uint64_t end(const Stripe& last, int64_t bytes) {
    accumulate(last, secret(SECRET_BYTES - STRIPE - 7));
    uint64_t sums[8], keys[8];
    std::memcpy(sums, &sums_, STRIPE);
    std::memcpy(keys, secret(11), STRIPE);
    uint64_t sum = static_cast<uint64_t>(bytes) * PRIME64_1;
    for (int i = 0; i < 8; i += 2) {
      sum += folded_product(sums[i] ^ keys[i], sums[i + 1] ^ keys[i + 1]);
    }
    sum = (sum ^ (sum >> 37)) * PRIME_MIX;
    return sum ^ (sum >> 32);
  }

 private:
  static constexpr int64_t BETWEEN_SCRAMBLES = (SECRET_BYTES - STRIPE) / 8;
  static constexpr uint64_t START[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                        PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

  void accumulate(const Stripe& data, const char* with) {
    const Stripe keys = load_stripe(with);
    for (int64_t i = 0; i < Stripe::PARTS; ++i) {
      const Lanes mixed = data.parts[i] ^ keys.parts[i];
      sums_.parts[i] += swapped(data.parts[i]) + low_products(mixed, mixed >> 32);
    }
  }

  void scramble() {
    const Stripe keys = load_stripe(secret(SECRET_BYTES - STRIPE));
    for (int64_t i = 0; i < Stripe::PARTS; ++i) {
      Lanes& sum = sums_.parts[i];
      sum = (sum ^ (sum >> 47) ^ keys.parts[i]) * PRIME32_1;
    }
  }

  Stripe sums_ = load_stripe(START);
  int64_t place_ = 0;  // of the next stripe
};

}  // namespace

#endif
