// bitsandbytes' int8 format. ops/formats/bnb_int8.py documents it. The scales are a tensor of their
// own, which weight.h applies.

struct INT8 {
    static FUNCTION Floats values(Packed block, int first) {
        return floats(load_signed_bytes(block + first));
    }
};
