// A weight of one format: FORMAT with BLOCK_LENGTH values in BLOCK_BYTES bytes, the blocks following its flattened values.
//
// FORMAT::values(block, first): LANES neighbouring values of a block, of which the first is number `first`, a multiple of
// LANES. What a platform's lanes.h gives them: Floats and Ints, one of each lane, with the operators of C; Packed, a pointer to
// bytes; LANES bytes, or bits, from an address on as Ints; floats(Ints); look_up(Ints) in CODEBOOK; load_half; float_of_bits.
// Values are those of the reference bit for bit: no product and sum may be contracted.

// The same values as they are used: times the scale of their block, where the format keeps scales apart from its codes, and
// rounded to VALUE_TYPE.
static FUNCTION Floats weight_values(Packed block, int first, float scale) {
    Floats values = FORMAT::values(block, first);
    if (SCALES_APART) values = scale * values;
    return rounded<VALUE_TYPE>(values);
}

// The same of the weight's LANES number `chunk`.
static FUNCTION Floats weight_chunk(Packed packed, Scales scales, Index chunk) {
    const int chunks_of_block = BLOCK_LENGTH / LANES;
    Index block = chunk / chunks_of_block;
    return weight_values(packed + block * BLOCK_BYTES, (int)(chunk % chunks_of_block) * LANES, SCALES_APART ? scales[block] : 0);
}
