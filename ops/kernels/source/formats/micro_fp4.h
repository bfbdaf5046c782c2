// The microscaling 4-bit floats. ops/formats/micro_fp4.py documents the layouts of the blocks and
// has CODEBOOK.

struct MXFP4 {
    static FUNCTION Floats values(Packed block, int first) {
        // The scale is 2**(exponent - 128), so the two lowest exponents give subnormals.
        unsigned exponent = block[0];
        float scale = float_of_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
        return scale * look_up(load_bytes(block + 1 + first % 16) >> first / 16 * 4 & 15);
    }
};

// Its groups have the low nibbles of 8 bytes, then the high ones, so LANES must be 8.
struct NVFP4 {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 16;
        unsigned e4m3 = block[group], exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
        float scale = exponent ? float_of_bits((exponent + 119) << 23 | mantissa << 20)
                               : (float)mantissa / 1024.0f;
        if (e4m3 == 0x7F) scale = 0;  // the only NaN: 0xFF counts as a number
        return scale * look_up(load_bytes(block + 4 + group * 8) >> first % 16 / 8 * 4 & 15);
    }
};
