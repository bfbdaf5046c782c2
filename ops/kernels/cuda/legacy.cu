// ggml's first formats. The layouts of the blocks stand in ops/formats/legacy.py; `first` is a chunk's place in its block.

struct Q4_0 {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block);
        Bytes codes(block + 2 + first % 16);
        for (int i = 0; i < 8; i++) values[i] = d * (float)((codes[i] >> first / 16 * 4 & 15) - 8);
    }
};

struct Q4_1 {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block), m = load_half(block + 2);
        Bytes codes(block + 4 + first % 16);
        for (int i = 0; i < 8; i++) values[i] = d * (float)(codes[i] >> first / 16 * 4 & 15) + m;
    }
};

struct Q5_0 {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block);
        int fifth = block[2 + first / 8];
        Bytes codes(block + 6 + first % 16);
        for (int i = 0; i < 8; i++)
            values[i] = d * (float)((codes[i] >> first / 16 * 4 & 15 | (fifth >> i & 1) << 4) - 16);
    }
};

struct Q5_1 {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block), m = load_half(block + 2);
        int fifth = block[4 + first / 8];
        Bytes codes(block + 8 + first % 16);
        for (int i = 0; i < 8; i++)
            values[i] = d * (float)(codes[i] >> first / 16 * 4 & 15 | (fifth >> i & 1) << 4) + m;
    }
};

struct Q8_0 {
    static __device__ void values(const Byte* block, int first, float* values) {
        float d = load_half(block);
        Bytes codes(block + 2 + first);
        for (int i = 0; i < 8; i++) values[i] = d * (float)(signed char)codes[i];
    }
};
