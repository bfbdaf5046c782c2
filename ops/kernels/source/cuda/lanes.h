// CUDA and HIP: a thread works on LANES = 8 values at a time. No header is needed but what the
// compiler has built in.

#define FUNCTION __device__ inline
#define PRIVATE
#define UNROLLED _Pragma("unroll")
// Not __constant__: threads of a warp that read different entries would wait for each other.
#define TABLE __device__ const

const int LANES = 8;

typedef unsigned char Byte;
typedef const Byte* Packed;
typedef const float* Scales;
typedef long long Index;

template <class T>
struct Lanes {
    T lane[LANES];

    FUNCTION T& operator[](int i) { return lane[i]; }
    FUNCTION T operator[](int i) const { return lane[i]; }
};

typedef Lanes<int> Ints;
typedef Lanes<float> Floats;

#define LANEWISE(Result, expression) \
    { \
        Result out; \
        _Pragma("unroll") for (int i = 0; i < LANES; i++) out.lane[i] = expression; \
        return out; \
    }

FUNCTION Ints operator>>(Ints a, int b) LANEWISE(Ints, a.lane[i] >> b)
FUNCTION Ints operator<<(Ints a, int b) LANEWISE(Ints, a.lane[i] << b)
FUNCTION Ints operator*(Ints a, int b) LANEWISE(Ints, a.lane[i] * b)
FUNCTION Ints operator&(Ints a, int b) LANEWISE(Ints, a.lane[i] & b)
FUNCTION Ints operator-(Ints a, int b) LANEWISE(Ints, a.lane[i] - b)
FUNCTION Ints operator>>(Ints a, Ints b) LANEWISE(Ints, a.lane[i] >> b.lane[i])
FUNCTION Ints operator|(Ints a, Ints b) LANEWISE(Ints, a.lane[i] | b.lane[i])
FUNCTION Floats operator*(float a, Floats b) LANEWISE(Floats, a * b.lane[i])
FUNCTION Floats operator*(Floats a, float b) LANEWISE(Floats, a.lane[i] * b)
FUNCTION Floats operator*(Floats a, Floats b) LANEWISE(Floats, a.lane[i] * b.lane[i])
FUNCTION Floats operator/(Floats a, float b) LANEWISE(Floats, a.lane[i] / b)
FUNCTION Floats operator+(Floats a, Floats b) LANEWISE(Floats, a.lane[i] + b.lane[i])
FUNCTION Floats operator-(Floats a, Floats b) LANEWISE(Floats, a.lane[i] - b.lane[i])
FUNCTION Floats operator+(Floats a, float b) LANEWISE(Floats, a.lane[i] + b)
FUNCTION Floats operator-(Floats a, float b) LANEWISE(Floats, a.lane[i] - b)
FUNCTION Floats floats(Ints a) LANEWISE(Floats, (float)a.lane[i])

// Returns values of at most `limit` in magnitude.
FUNCTION Floats limited(Floats values, float limit)
    LANEWISE(Floats, values.lane[i] > limit ? limit : values.lane[i] < -limit ? -limit : values.lane[i])

// Returns 0, 1, 2 ...
FUNCTION Ints lane_numbers() LANEWISE(Ints, i)

// Returns `first` in the first eight lanes, which are all.
FUNCTION Ints of_eights(int first, int) LANEWISE(Ints, first)

FUNCTION Floats load_floats(Scales from) LANEWISE(Floats, from[i])

FUNCTION void wait_for_threads() { __syncthreads(); }

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

#if defined(__HIP__)
FUNCTION float float_of_half(unsigned short half) { return __builtin_bit_cast(_Float16, half); }

FUNCTION unsigned short half_of_float(float value) {
    return __builtin_bit_cast(unsigned short, (_Float16)value);
}

// Returns what the lane of the warp has whose number differs in the bit `distance`.
FUNCTION float shuffled(float value, int distance) { return __shfl_xor(value, distance); }
#else
FUNCTION float shuffled(float value, int distance) {
    return __shfl_xor_sync(0xFFFFFFFF, value, distance);
}
#endif

#ifdef __CUDA_ARCH__
FUNCTION float float_of_half(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

FUNCTION unsigned short half_of_float(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

FUNCTION float float_of_bits(unsigned bits) { return __uint_as_float(bits); }

FUNCTION float to_float(Half half) { return float_of_half(half.bits); }

FUNCTION void round_to(float value, Half& half) { half.bits = half_of_float(value); }

FUNCTION float to_float(BFloat16 value) { return float_of_bits((unsigned)value.bits << 16); }

// Rounds to nearest, ties to even, by integers: GPUs before compute capability 8.0 have no
// instruction for it.
FUNCTION void round_to(float value, BFloat16& rounded) {
    unsigned bits = __float_as_uint(value);
    bits += 0x7FFF + (bits >> 16 & 1);
    rounded.bits = value == value ? bits >> 16 : 0x7FC0;
}

FUNCTION float to_float(float value) { return value; }

FUNCTION void round_to(float value, float& same) { same = value; }

// LANES neighbouring numbers in memory.
template <class T>
struct alignas(16) Chunk {
    T values[LANES];
};

// from: a multiple of 16.
template <class T>
FUNCTION Floats load_chunk(const T* from) {
    Chunk<T> chunk;
    for (int i = 0; i < (int)(sizeof(chunk) / sizeof(uint4)); i++)
        ((uint4*)&chunk)[i] = ((const uint4*)from)[i];
    Floats values;
    for (int i = 0; i < LANES; i++) values.lane[i] = to_float(chunk.values[i]);
    return values;
}

// to: any address.
template <class T>
FUNCTION void store_chunk(T* to, Floats values) {
    Chunk<T> chunk;
    for (int i = 0; i < LANES; i++) round_to(values.lane[i], chunk.values[i]);
    if ((unsigned long long)to % 16 == 0) {
        for (int i = 0; i < (int)(sizeof(chunk) / sizeof(uint4)); i++)
            ((uint4*)to)[i] = ((uint4*)&chunk)[i];
    } else {
        for (int i = 0; i < LANES; i++) to[i] = chunk.values[i];
    }
}

// Four bytes of a block at an address that is a multiple of ALIGNMENT.
FUNCTION unsigned load_word(Packed from) {
    if (ALIGNMENT == 4) return *(const unsigned*)from;
    if (ALIGNMENT == 2)
        return ((const unsigned short*)from)[0] | (unsigned)((const unsigned short*)from)[1] << 16;
    return from[0] | from[1] << 8 | from[2] << 16 | (unsigned)from[3] << 24;
}

// The same of two bytes.
FUNCTION unsigned load_short(Packed from) {
    return ALIGNMENT >= 2 ? *(const unsigned short*)from : from[0] | from[1] << 8;
}

FUNCTION Ints load_bytes(Packed from) {
    unsigned words[2] = {load_word(from), load_word(from + 4)};
    Ints bytes;
    for (int i = 0; i < LANES; i++) bytes.lane[i] = words[i / 4] >> i % 4 * 8 & 0xFF;
    return bytes;
}

FUNCTION Ints load_signed_bytes(Packed from) {
    Ints bytes = load_bytes(from);
    for (int i = 0; i < LANES; i++) bytes.lane[i] = (signed char)bytes.lane[i];
    return bytes;
}

// Two lanes per byte, the high nibble first.
FUNCTION Ints load_nibble_pairs(Packed from) {
    unsigned word = load_word(from);
    Ints nibbles;
    for (int i = 0; i < LANES; i++) nibbles.lane[i] = word >> (i ^ 1) * 4 & 15;
    return nibbles;
}

// Two lanes per byte, the low nibble first.
FUNCTION Ints load_low_nibble_pairs(Packed from) {
    unsigned word = load_word(from);
    Ints nibbles;
    for (int i = 0; i < LANES; i++) nibbles.lane[i] = word >> i * 4 & 15;
    return nibbles;
}

// Eight lanes per byte, the lowest bit first.
FUNCTION Ints load_bits(Packed from) LANEWISE(Ints, from[0] >> i & 1)

FUNCTION float load_half(Packed from) { return float_of_half(load_short(from)); }

// Four lanes per byte, the lowest bits first.
FUNCTION Ints load_bit_pairs(Packed from) {
    unsigned pairs = load_short(from);
    Ints values;
    for (int i = 0; i < LANES; i++) values.lane[i] = pairs >> i * 2 & 3;
    return values;
}

// The bytes of two numbers, the lowest first.
FUNCTION Ints bytes_of(const unsigned* words)
    LANEWISE(Ints, (int)(words[i / 4] >> i % 4 * 8 & 0xFF))

// Negates the lanes whose bit is set.
FUNCTION Ints negated(Ints values, unsigned bits)
    LANEWISE(Ints, bits >> i & 1 ? -values.lane[i] : values.lane[i])

#ifdef CODEBOOK
// The value of each code, from the format's class.
TABLE float codebook[16] = {CODEBOOK};

FUNCTION Floats look_up(Ints codes) LANEWISE(Floats, codebook[codes.lane[i]])
#endif
