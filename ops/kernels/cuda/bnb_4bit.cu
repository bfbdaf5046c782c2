// bitsandbytes' 4-bit formats, described in ops/formats/bnb_4bit.py, where CODEBOOK comes from. The scales lie in a tensor of
// their own, and are applied in weight.cu.

struct Codebook4Bit {
    static __device__ void values(const Byte* block, int first, float* values) {
        unsigned codes = load_word(block + first / 2);
        for (int i = 0; i < 8; i++) values[i] = codebook[codes >> (i ^ 1) * 4 & 15];
    }
};
