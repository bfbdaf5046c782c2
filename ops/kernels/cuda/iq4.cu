// The 4-bit formats with a codebook of integers. The layouts of the blocks stand in ops/formats/iq4.py; `first` is a chunk's
// place in its block. CODEBOOK comes from there too.

struct IQ4_NL {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block);
        Bytes codes(block + 2 + first % 16);
        for (int i = 0; i < 8; i++) values[i] = d * codebook[codes[i] >> first / 16 * 4 & 15];
    }
};

struct IQ4_XS {
    static __device__ void values(const Byte* block, int first, float* values) {
        int group = first / 32;
        int low = block[4 + group / 2] >> group % 2 * 4 & 15, high = block[2 + group / 4] >> group % 4 * 2 & 3;
        float scale = load_half(block) * (float)((low | high << 4) - 32);
        Bytes codes(block + 8 + group * 16 + first % 16);
        for (int i = 0; i < 8; i++) values[i] = scale * codebook[codes[i] >> first % 32 / 16 * 4 & 15];
    }
};
