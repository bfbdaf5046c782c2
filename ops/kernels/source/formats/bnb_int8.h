// bitsandbytes' int8 format, described in ops/formats/bnb_int8.py. The scales lie in a tensor of their own, and are applied in
// weight.h.

struct INT8 {
    static FUNCTION Floats values(Packed block, int first) { return floats(load_signed_bytes(block + first)); }
};
