// Metal: a thread works on LANES = 8 values at a time.

#include <metal_stdlib>

// Values have the reference's bits. The last line is for compilers that do not know the two before.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#pragma STDC FP_CONTRACT OFF

using namespace metal;

#define FUNCTION inline
#define PRIVATE thread
#define UNROLLED _Pragma("unroll")
#define TABLE constant

typedef const device uchar* Packed;
typedef const device float* Scales;
// 64 bits, because a weight may have more than 2^32 bytes. A position in the grid has 32 bits: it
// counts chunks.
typedef long Index;

struct Ints {
    int lane[LANES];

    thread int& operator[](int i) { return lane[i]; }
};

struct Floats {
    float lane[LANES];

    thread float& operator[](int i) { return lane[i]; }
};

#define LANEWISE(Result, expression) \
    { \
        Result out; \
        _Pragma("unroll") for (int i = 0; i < LANES; i++) out.lane[i] = expression; \
        return out; \
    }

static FUNCTION Ints operator>>(Ints a, int b) LANEWISE(Ints, a.lane[i] >> b)
static FUNCTION Ints operator<<(Ints a, int b) LANEWISE(Ints, a.lane[i] << b)
static FUNCTION Ints operator*(Ints a, int b) LANEWISE(Ints, a.lane[i] * b)
static FUNCTION Ints operator&(Ints a, int b) LANEWISE(Ints, a.lane[i] & b)
static FUNCTION Ints operator-(Ints a, int b) LANEWISE(Ints, a.lane[i] - b)
static FUNCTION Ints operator>>(Ints a, Ints b) LANEWISE(Ints, a.lane[i] >> b.lane[i])
static FUNCTION Ints operator|(Ints a, Ints b) LANEWISE(Ints, a.lane[i] | b.lane[i])
static FUNCTION Floats operator*(float a, Floats b) LANEWISE(Floats, a * b.lane[i])
static FUNCTION Floats operator*(Floats a, float b) LANEWISE(Floats, a.lane[i] * b)
static FUNCTION Floats operator*(Floats a, Floats b) LANEWISE(Floats, a.lane[i] * b.lane[i])
static FUNCTION Floats operator/(Floats a, float b) LANEWISE(Floats, a.lane[i] / b)
static FUNCTION Floats operator+(Floats a, Floats b) LANEWISE(Floats, a.lane[i] + b.lane[i])
static FUNCTION Floats operator-(Floats a, Floats b) LANEWISE(Floats, a.lane[i] - b.lane[i])
static FUNCTION Floats operator+(Floats a, float b) LANEWISE(Floats, a.lane[i] + b)
static FUNCTION Floats operator-(Floats a, float b) LANEWISE(Floats, a.lane[i] - b)
static FUNCTION Floats floats(Ints a) LANEWISE(Floats, (float)a.lane[i])

// Returns values of at most `limit` in magnitude.
static FUNCTION Floats limited(Floats values, float limit)
    LANEWISE(Floats, values.lane[i] > limit ? limit : values.lane[i] < -limit ? -limit : values.lane[i])

// Returns 0, 1, 2 ...
static FUNCTION Ints lane_numbers() LANEWISE(Ints, i)

// Returns `first` in the first eight lanes, which are all.
static FUNCTION Ints of_eights(int first, int) LANEWISE(Ints, first)

static FUNCTION Floats load_floats(Scales from) LANEWISE(Floats, from[i])

static FUNCTION void wait_for_threads() { threadgroup_barrier(mem_flags::mem_threadgroup); }

// Packed vectors need only the alignment of their elements.

static FUNCTION Ints load_bytes(Packed from) {
    const device packed_uchar4* quads = (const device packed_uchar4*)from;
    packed_uchar4 low = quads[0], high = quads[1];
    Ints bytes;
    for (int i = 0; i < 4; i++) {
        bytes.lane[i] = low[i];
        bytes.lane[i + 4] = high[i];
    }
    return bytes;
}

static FUNCTION Ints load_signed_bytes(Packed from) { return load_bytes(from) << 24 >> 24; }

// Two lanes per byte, the high nibble first.
static FUNCTION Ints load_nibble_pairs(Packed from) {
    packed_uchar4 pairs = *(const device packed_uchar4*)from;
    Ints nibbles;
    for (int i = 0; i < LANES; i++) nibbles.lane[i] = pairs[i / 2] >> (i % 2 ? 0 : 4) & 15;
    return nibbles;
}

// Two lanes per byte, the low nibble first.
static FUNCTION Ints load_low_nibble_pairs(Packed from) {
    packed_uchar4 pairs = *(const device packed_uchar4*)from;
    Ints nibbles;
    for (int i = 0; i < LANES; i++) nibbles.lane[i] = pairs[i / 2] >> (i % 2 ? 4 : 0) & 15;
    return nibbles;
}

// Eight lanes per byte, the lowest bit first.
static FUNCTION Ints load_bits(Packed from) LANEWISE(Ints, from[0] >> i & 1)

static FUNCTION uint load_short(Packed from) { return from[0] | from[1] << 8; }

static FUNCTION uint load_word(Packed from) { return load_short(from) | load_short(from + 2) << 16; }

static FUNCTION float float_of_half(uint bits) { return as_type<half>((ushort)bits); }

static FUNCTION float load_half(Packed from) { return float_of_half(load_short(from)); }

// Four lanes per byte, the lowest bits first.
static FUNCTION Ints load_bit_pairs(Packed from) LANEWISE(Ints, from[i / 4] >> i % 4 * 2 & 3)

// The bytes of two numbers, the lowest first.
static FUNCTION Ints bytes_of(thread const uint* words)
    LANEWISE(Ints, (int)(words[i / 4] >> i % 4 * 8 & 0xFF))

// Negates the lanes whose bit is set.
static FUNCTION Ints negated(Ints values, uint bits)
    LANEWISE(Ints, bits >> i & 1 ? -values.lane[i] : values.lane[i])

static FUNCTION float float_of_bits(uint bits) { return as_type<float>(bits); }

// Rounding to nearest, ties to even.

typedef half Half;

// Metal has a type for it only from version 3.1 on.
struct BFloat16 {
    ushort bits;
};

static FUNCTION ushort bfloat16_bits(float value) {
    uint bits = as_type<uint>(value);
    return value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
}

static FUNCTION void store(Floats values, device float* to) {
    device packed_float4* quads = (device packed_float4*)to;
    for (int i = 0; i < LANES / 4; i++) {
        thread const float* lane = values.lane + i * 4;
        quads[i] = packed_float4(lane[0], lane[1], lane[2], lane[3]);
    }
}

static FUNCTION void store(Floats values, device Half* to) {
    device packed_half4* quads = (device packed_half4*)to;
    for (int i = 0; i < LANES / 4; i++) {
        thread const float* lane = values.lane + i * 4;
        quads[i] = packed_half4((half)lane[0], (half)lane[1], (half)lane[2], (half)lane[3]);
    }
}

static FUNCTION void store(Floats values, device BFloat16* to) {
    device packed_ushort4* quads = (device packed_ushort4*)to;
    for (int i = 0; i < LANES / 4; i++) {
        thread const float* lane = values.lane + i * 4;
        quads[i] = packed_ushort4(bfloat16_bits(lane[0]), bfloat16_bits(lane[1]),
                                  bfloat16_bits(lane[2]), bfloat16_bits(lane[3]));
    }
}

#ifdef CODEBOOK
TABLE float codebook[16] = {CODEBOOK};

static FUNCTION Floats look_up(Ints codes) LANEWISE(Floats, codebook[codes.lane[i]])
#endif
