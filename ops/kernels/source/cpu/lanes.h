// CPUs: vectors of LANES = 8 or 16 values, an extension of GCC and Clang for every CPU. Conversions
// that they do slowly use intrinsics of AVX-512 and AVX2.

#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define FUNCTION inline __attribute__((always_inline))
#define PRIVATE
#define UNROLLED _Pragma("GCC unroll 16")
#define TABLE static const

typedef unsigned char Byte;
typedef const Byte* Packed;
typedef const float* Scales;
typedef long long Index;

template <class T>
struct Vector {
    typedef T Lanes __attribute__((vector_size(LANES * sizeof(T))));
};

typedef Vector<int>::Lanes Ints;
typedef Vector<unsigned>::Lanes Words;
typedef Vector<float>::Lanes Floats;
typedef Vector<unsigned char>::Lanes Bytes;
typedef Vector<unsigned short>::Lanes Shorts;

template <class To, class From>
static FUNCTION To load(const From* from) {
    To lanes;
    memcpy(&lanes, from, sizeof(To));
    return lanes;
}

static FUNCTION float float_of_bits(unsigned bits) { return load<float>(&bits); }

static FUNCTION Floats floats(Ints a) { return __builtin_convertvector(a, Floats); }

static FUNCTION Ints ints(Bytes bytes) {
#if LANES == 16 && defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif LANES == 8 && defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&bytes));
#else
    return __builtin_convertvector(bytes, Ints);
#endif
}

static FUNCTION Floats load_floats(Scales from) { return load<Floats>(from); }

static FUNCTION Ints load_bytes(Packed from) { return ints(load<Bytes>(from)); }

static FUNCTION Ints load_signed_bytes(Packed from) { return load_bytes(from) << 24 >> 24; }

// Two lanes per byte, the high nibble first.
static FUNCTION Ints load_nibble_pairs(Packed from) {
    typedef unsigned char Half __attribute__((vector_size(LANES / 2)));
    typedef unsigned short Pairs __attribute__((vector_size(LANES)));
    Pairs pairs = __builtin_convertvector(load<Half>(from), Pairs);
    pairs = pairs >> 4 | (pairs & 15) << 8;  // the low byte of a pair comes first in memory
    return ints(load<Bytes>(&pairs));
}

// Two lanes per byte, the low nibble first.
static FUNCTION Ints load_low_nibble_pairs(Packed from) {
    typedef unsigned char Half __attribute__((vector_size(LANES / 2)));
    typedef unsigned short Pairs __attribute__((vector_size(LANES)));
    Pairs pairs = __builtin_convertvector(load<Half>(from), Pairs);
    pairs = (pairs & 15) | pairs >> 4 << 8;
    return ints(load<Bytes>(&pairs));
}

// Returns 0, 1, 2 ...
static FUNCTION Ints lane_numbers() {
    Ints lanes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

// Returns `first` in the first eight lanes and `second` in the others.
static FUNCTION Ints of_eights(int first, int second) {
    return LANES == 8 ? Ints{} + first : lane_numbers() < 8 ? Ints{} + first : Ints{} + second;
}

// Eight lanes per byte, the lowest bit first.
static FUNCTION Ints load_bits(Packed from) {
    return (from[0] | (LANES > 8 ? from[1] << 8 : 0)) >> lane_numbers() & 1;
}

// Four lanes per byte, the lowest bits first.
static FUNCTION Ints load_bit_pairs(Packed from) {
    unsigned pairs = load<unsigned short>(from);
    if (LANES > 8) pairs |= (unsigned)load<unsigned short>(from + 2) << 16;
    return (Ints)((Words{} + pairs) >> (Words)(lane_numbers() << 1)) & 3;
}

static FUNCTION unsigned load_short(Packed from) { return load<unsigned short>(from); }

static FUNCTION unsigned load_word(Packed from) { return load<unsigned>(from); }

// The bytes of LANES / 4 numbers, the lowest first.
static FUNCTION Ints bytes_of(const unsigned* words) {
    // by way of memory the words would be written apart and read at once, which waits
    unsigned quarters __attribute__((vector_size(LANES)));
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; i++) quarters[i] = words[i];
    return ints((Bytes)quarters);
}

// Negates the lanes whose bit is set.
static FUNCTION Ints negated(Ints values, unsigned bits) {
#if LANES == 16 && defined(__AVX512F__)
    return (Ints)_mm512_mask_sub_epi32((__m512i)values, (__mmask16)bits, _mm512_setzero_si512(),
                                       (__m512i)values);
#else
    Ints minus = ((int)bits & 1 << lane_numbers()) != 0;  // -1 in these lanes
    return (values ^ minus) - minus;
#endif
}

// Rounding to nearest, ties to even.
struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

#if LANES == 16 && defined(__AVX512F__)
static FUNCTION Shorts low_halves(Words words) {
    return (Shorts)_mm512_cvtepi32_epi16((__m512i)words);
}
static FUNCTION Shorts halves(Floats values) {
    return (Shorts)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
}
static FUNCTION Floats of_halves(Shorts halves) { return (Floats)_mm512_cvtph_ps((__m256i)halves); }
#elif LANES == 8 && defined(__AVX2__) && defined(__F16C__)
static FUNCTION Shorts low_halves(Words words) {
    __m256i pairs = _mm256_packus_epi32((__m256i)words, (__m256i)words);
    return (Shorts)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
static FUNCTION Shorts halves(Floats values) {
    return (Shorts)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
}
static FUNCTION Floats of_halves(Shorts halves) { return (Floats)_mm256_cvtph_ps((__m128i)halves); }
#else
typedef Vector<_Float16>::Lanes Float16s;
static FUNCTION Shorts low_halves(Words words) { return __builtin_convertvector(words, Shorts); }
static FUNCTION Shorts halves(Floats values) {
    return (Shorts)__builtin_convertvector(values, Float16s);
}
static FUNCTION Floats of_halves(Shorts halves) {
    return __builtin_convertvector((Float16s)halves, Floats);
}
#endif

static FUNCTION float float_of_half(unsigned short half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    return load<_Float16>(&half);
#endif
}

static FUNCTION float load_half(Packed from) { return float_of_half(load_short(from)); }
// Returns the floats that bytes of float8 stand for.
#define HAS_VECTORS_OF_FLOAT8

static FUNCTION Floats e4m3(Ints bytes) {
    Ints magnitude = bytes & 0x7F;
    // Exponent and mantissa at their places in a float; without an exponent, an integer over 512:
    // as floats without one these would be slow.
    Floats values = magnitude < 8 ? floats(magnitude) * (1 / 512.0f)
                                  : (Floats)((magnitude << 20) + (120 << 23));
    Words nan = magnitude == 0x7F ? Words{} + 0x7FC00000 : Words{};
    return (Floats)((Words)values | nan | ((Words)bytes & 0x80) << 24);
}

static FUNCTION Floats e5m2(Ints bytes) {  // the upper bytes of halves
    return of_halves(low_halves((Words)bytes << 8));
}

// Returns values of at most `limit` in magnitude.
static FUNCTION Floats limited(Floats values, float limit) {
    values = values > limit ? Floats{} + limit : values;
    return values < -limit ? Floats{} - limit : values;
}

// Returns the bits of the nearest bfloat16 in the upper halves.
static FUNCTION Words bfloat16_bits(Floats values) {
    Words bits = (Words)values, rounded = bits + 0x7FFF + (bits >> 16 & 1);
    Words quiet_nan = bits | 0x7FC00000;
    return values == values ? rounded : quiet_nan;
}

// Stores the lowest byte of each lane.
static FUNCTION void store_bytes(Ints values, void* to) {
#if LANES == 16 && defined(__AVX512F__)
    __m128i bytes = _mm512_cvtepi32_epi8((__m512i)values);
#else
    Bytes bytes = __builtin_convertvector(values, Bytes);
#endif
    memcpy(to, &bytes, sizeof bytes);
}

// Returns how many of `length` values are taken at a time: a part of `part` of them, if these divide
// it, otherwise LANES.
static constexpr int piece_of(int part, int length) {
    return part && length % part == 0 ? part : LANES;
}

static FUNCTION void store(Floats values, float* to) { memcpy(to, &values, sizeof values); }

static FUNCTION void store(Floats values, BFloat16* to) {
    Shorts bits = low_halves(bfloat16_bits(values) >> 16);
    memcpy(to, &bits, sizeof bits);
}

static FUNCTION void store(Floats values, Half* to) {
    Shorts bits = halves(values);
    memcpy(to, &bits, sizeof bits);
}

// Rounds in one instruction where there is one; it rounds subnormal numbers to zero.
static FUNCTION void store_rounded(Floats values, BFloat16* to) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m256bh bits = _mm512_cvtneps_pbh((__m512)values);
    memcpy(to, &bits, sizeof bits);
#else
    store(values, to);
#endif
}

static FUNCTION void store_rounded(Floats values, float* to) { store(values, to); }

static FUNCTION Floats rounded_as(Floats values, const float*) { return values; }
static FUNCTION Floats rounded_as(Floats values, const BFloat16*) {
    return (Floats)(bfloat16_bits(values) & 0xFFFF0000);
}
static FUNCTION Floats rounded_as(Floats values, const Half*) { return of_halves(halves(values)); }

template <class T>
static FUNCTION Floats rounded(Floats values) { return rounded_as(values, (const T*)0); }

static FUNCTION Floats load_values(const float* from) { return load<Floats>(from); }
static FUNCTION Floats load_values(const Half* from) { return of_halves(load<Shorts>(from)); }
static FUNCTION Floats load_values(const BFloat16* from) {
    return (Floats)(__builtin_convertvector(load<Shorts>(from), Words) << 16);
}

static FUNCTION Floats multiply_add(Floats a, Floats b, Floats c) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Returns numbers of a table of 16.
static FUNCTION Floats look_up_16(const float* table, Ints places) {
#if LANES == 16 && defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(table));
#elif LANES == 8 && defined(__AVX2__)
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)places);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)places);
    return (Floats)_mm256_blendv_ps(low, high,
                                    _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)places, 28)));
#else
    Floats values;
    for (int i = 0; i < LANES; i++) values[i] = table[places[i]];
    return values;
#endif
}

#ifdef CODEBOOK
static const float codebook[16] = {CODEBOOK};

static FUNCTION Floats look_up(Ints codes) { return look_up_16(codebook, codes); }
#endif
