// Eight neighbouring values, a chunk, are what one thread unpacks, loads or stores at a time.
//
// No CUDA header is needed. Compile without contraction of a * b + c: values are those of the reference, bit for bit.

typedef unsigned char Byte;

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

#ifdef __CUDA_ARCH__
__device__ inline float float_of_half(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ inline unsigned short half_of_float(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

__device__ inline float to_float(Half half) { return float_of_half(half.bits); }

__device__ inline void round_to(float value, Half& half) { half.bits = half_of_float(value); }

__device__ inline float to_float(BFloat16 value) {
    return __uint_as_float((unsigned)value.bits << 16);
}

// To nearest, ties to even; in integers, since GPUs before compute capability 8.0 have no instruction for it.
__device__ inline void round_to(float value, BFloat16& rounded) {
    unsigned bits = __float_as_uint(value);
    bits += 0x7FFF + (bits >> 16 & 1);
    rounded.bits = value == value ? bits >> 16 : 0x7FC0;
}

__device__ inline float to_float(float value) { return value; }

__device__ inline void round_to(float value, float& same) { same = value; }

template <class T>
struct alignas(16) Chunk {
    T values[8];
};

// from: a multiple of 16.
template <class T>
__device__ inline void load_chunk(const T* from, float* values) {
    Chunk<T> chunk;
    for (int i = 0; i < (int)(sizeof(chunk) / sizeof(uint4)); i++) ((uint4*)&chunk)[i] = ((const uint4*)from)[i];
    for (int i = 0; i < 8; i++) values[i] = to_float(chunk.values[i]);
}

// to: any address.
template <class T>
__device__ inline void store_chunk(T* to, const float* values) {
    Chunk<T> chunk;
    for (int i = 0; i < 8; i++) round_to(values[i], chunk.values[i]);
    if ((unsigned long long)to % 16 == 0) {
        for (int i = 0; i < (int)(sizeof(chunk) / sizeof(uint4)); i++) ((uint4*)to)[i] = ((uint4*)&chunk)[i];
    } else {
        for (int i = 0; i < 8; i++) to[i] = chunk.values[i];
    }
}

// Four bytes of a block at an address that is a multiple of ALIGNMENT.
__device__ inline unsigned load_word(const Byte* from) {
    if (ALIGNMENT == 4) return *(const unsigned*)from;
    if (ALIGNMENT == 2) return ((const unsigned short*)from)[0] | (unsigned)((const unsigned short*)from)[1] << 16;
    return from[0] | from[1] << 8 | from[2] << 16 | (unsigned)from[3] << 24;
}

// Eight neighbouring bytes of a block.
struct Bytes {
    unsigned words[2];

    __device__ explicit Bytes(const Byte* from) : words{load_word(from), load_word(from + 4)} {}

    __device__ int operator[](int i) const { return words[i / 4] >> i % 4 * 8 & 0xFF; }
};

// The float16 at an even byte of a block.
__device__ inline float load_half(const Byte* from) {
    if (ALIGNMENT >= 2) return float_of_half(*(const unsigned short*)from);
    return float_of_half(from[0] | from[1] << 8);
}

#ifdef CODEBOOK
// The value of each code, from the format's class. Not __constant__: threads of a warp that read different entries would wait
// for each other.
__device__ const float codebook[16] = {CODEBOOK};
#endif
