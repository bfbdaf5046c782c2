// The microscaling 4-bit floats. The layouts of the blocks stand in ops/formats/micro_fp4.py, where CODEBOOK comes from too.

struct MXFP4 {
    static FUNCTION Floats values(Packed block, int first) {
        unsigned exponent = block[0];  // the scale is 2**(exponent - 128), so the two lowest are subnormal
        float scale = float_of_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
        return scale * look_up(load_bytes(block + 1 + first % 16) >> first / 16 * 4 & 15);
    }
};

// The low nibbles of 8 bytes, then the high ones: for LANES of 8.
struct NVFP4 {
    static FUNCTION Floats values(Packed block, int first) {
        int group = first / 16;
        unsigned e4m3 = block[group], exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
        float scale = exponent ? float_of_bits((exponent + 119) << 23 | mantissa << 20) : (float)mantissa / 1024.0f;
        if (e4m3 == 0x7F) scale = 0;  // NaN; 0xFF is none
        return scale * look_up(load_bytes(block + 4 + group * 8) >> first % 16 / 8 * 4 & 15);
    }
};
