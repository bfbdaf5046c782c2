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
//
// Kernels of products take any weight that has what is below: this, or formats/rows.h.

struct Weight {
    Packed codes;
    Scales scales;  // of blocks, where the format keeps them in a tensor of their own
    int columns;    // of a row
};

enum { PART_LENGTH = BLOCK_LENGTH };  // values in a Part, 0: the rest of a row

struct Part {
    Packed codes;
    float scale;
};

static FUNCTION Part part_of_block(Weight weight, Index block) {
    Part part = {weight.codes + block * BLOCK_BYTES, SCALES_APART ? weight.scales[block] : 0};
    return part;
}

// Returns the part of a row that holds a column.
static FUNCTION Part part_of(Weight weight, Index row, int column) {
    return part_of_block(weight, row * (weight.columns / BLOCK_LENGTH) + column / BLOCK_LENGTH);
}

// Returns LANES values of a part, from number `first` on.
static FUNCTION Floats part_values(Weight, Part part, int first) {
    Floats values = FORMAT::values(part.codes, first);
    if (SCALES_APART) values = part.scale * values;
    return values;
}

// Returns which value of its part is that of a column.
static FUNCTION int place_in_part(int column) { return column % BLOCK_LENGTH; }

// Returns the bytes of the codes of some columns.
static FUNCTION int code_bytes(int columns) { return columns * BLOCK_BYTES / BLOCK_LENGTH; }

// Returns LANES values of a row, from `column` on.
static FUNCTION Floats row_values(Weight weight, Index row, int column) {
    return part_values(weight, part_of(weight, row, column), place_in_part(column));
}

// Returns the weight's flattened values from chunk * LANES on.
static FUNCTION Floats weight_chunk(Weight weight, Index chunk) {
    const int chunks_of_block = BLOCK_LENGTH / LANES;
    return part_values(weight, part_of_block(weight, chunk / chunks_of_block),
                       (int)(chunk % chunks_of_block) * LANES);
}
