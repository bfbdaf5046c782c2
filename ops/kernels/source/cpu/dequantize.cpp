// Writes a weight's first `count` values, a multiple of LANES, in order.
extern "C" void dequantize(const Weight* of, TYPE* out, long long count, int threads) {
    const Weight weight = *of;
    long long blocks = count / BLOCK_LENGTH;
    parallel_for(threads, blocks, [=](Index block) {
        Part part = part_of_block(weight, block);
#pragma GCC unroll 32
        for (int first = 0; first < BLOCK_LENGTH; first += LANES)
            store(part_values(weight, part, first), out + block * BLOCK_LENGTH + first);
    });
    for (Index first = blocks * BLOCK_LENGTH; first < count; first += LANES)
        store(weight_chunk(weight, first / LANES), out + first);
}
