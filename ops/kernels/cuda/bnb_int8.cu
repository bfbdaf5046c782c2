// bitsandbytes' int8 format, described in ops/formats/bnb_int8.py. The scales lie in a tensor of their own, and are applied in
// weight.cu.

struct INT8 {
    static __device__ void values(const Byte* block, int first, float* values) {
        Bytes codes(block + first);
        for (int i = 0; i < 8; i++) values[i] = (float)(signed char)codes[i];
    }
};
