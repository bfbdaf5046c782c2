// The microscaling 4-bit floats. The layouts of the blocks stand in ops/formats/micro_fp4.py, where CODEBOOK comes from too;
// `first` is a chunk's place in its block.

struct MXFP4 {
    static __device__ void values(const Byte* block, int first, float* values) {
        unsigned exponent = block[0];  // the scale is 2**(exponent - 128), so the two lowest are subnormal
        float scale = __uint_as_float(exponent < 2 ? 0x00200000 << exponent : exponent - 1 << 23);
        Bytes codes(block + 1 + first % 16);
        for (int i = 0; i < 8; i++) values[i] = scale * codebook[codes[i] >> first / 16 * 4 & 15];
    }
};

struct NVFP4 {
    static __device__ void values(const Byte* block, int first, float* values) {
        int group = first / 16;
        unsigned e4m3 = block[group], exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
        float scale = exponent ? __uint_as_float(exponent + 119 << 23 | mantissa << 20) : mantissa / 1024.0f;
        if (e4m3 == 0x7F) scale = 0;  // NaN; 0xFF is none
        Bytes codes(block + 4 + group * 8);
        for (int i = 0; i < 8; i++) values[i] = scale * codebook[codes[i] >> first % 16 / 8 * 4 & 15];
    }
};
