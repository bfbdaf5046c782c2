// bitsandbytes' 4-bit formats. ops/formats/bnb_4bit.py documents them and has CODEBOOK. The scales
// are a tensor of their own, which weight.h applies.

struct Codebook4Bit {
    static FUNCTION Floats values(Packed block, int first) {
        return look_up(load_nibble_pairs(block + first / 2));
    }
};
