// A weight of one format: FORMAT with BLOCK_LENGTH values in BLOCK_BYTES bytes, the blocks in the
// order of the flattened values.
//
// FORMAT::values(block, first) returns LANES neighbouring values of a block. `first` is the number
// of the first one, a multiple of LANES. A platform's lanes.h defines what it uses: Floats and
// Ints, one number per lane, with the operators of C; Packed, a pointer to bytes; loads of LANES
// bytes, or bits, from an address on as Ints; bytes_of(words); floats(Ints); negated(Ints, bits);
// look_up(Ints) in CODEBOOK; TABLE, where constants are kept; load_short and load_word, also of
// addresses that are multiples of 2 only; load_half; float_of_half and float_of_bits. Values have the
// reference's bits: no product and sum may be contracted.

// Returns these values, times the scale of their block, where the format keeps
// scales in a tensor of their own.
static FUNCTION Floats weight_values(Packed block, int first, float scale) {
    Floats values = FORMAT::values(block, first);
    if (SCALES_APART) values = scale * values;
    return values;
}

// Returns the weight's values from chunk * LANES on.
static FUNCTION Floats weight_chunk(Packed packed, Scales scales, Index chunk) {
    const int chunks_of_block = BLOCK_LENGTH / LANES;
    Index block = chunk / chunks_of_block;
    return weight_values(packed + block * BLOCK_BYTES, (int)(chunk % chunks_of_block) * LANES,
                         SCALES_APART ? scales[block] : 0);
}
