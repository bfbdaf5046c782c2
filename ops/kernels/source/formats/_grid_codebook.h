// Points of a grid, which ops/formats/_grid_codebook.py has as POINTS: the magnitudes of neighbouring
// values, a byte each.

TABLE unsigned points[] = {POINTS};

// Returns the byte of signs whose 7-bit code is given: the number of set bits is even.
static FUNCTION unsigned even_signs(unsigned code) {
    return code | (0x6996 >> ((code ^ code >> 4) & 15) & 1) << 7;
}
