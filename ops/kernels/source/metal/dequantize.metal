// Writes a weight's values from its first block on, in order. Each thread writes one chunk.
//
// scales: one per block; the packed bytes again where the blocks hold their scales.
kernel void dequantize(device TYPE* out [[buffer(0)]], const device uchar* packed [[buffer(1)]],
                       const device uchar* scales [[buffer(2)]],
                       uint chunk [[thread_position_in_grid]]) {
    Weight weight = {packed, (Scales)scales, 0};
    store(weight_chunk(weight, chunk), out + (Index)chunk * LANES);
}
