// Writes rows of a weight whose block is a row. out: (rows, columns).
//
// Of tensors that the layout does not have, any bytes. groups: of a row.
kernel void dequantize_rows(device TYPE* out [[buffer(0)]], const device uchar* codes [[buffer(1)]],
                            const device uchar* scales [[buffer(2)]],
                            const device uchar* zeros [[buffer(3)]],
                            const device uchar* minima [[buffer(4)]],
                            const device uchar* group_of_column [[buffer(5)]],
                            const device uchar* explained_scales [[buffer(6)]],
                            const device uchar* row_scales [[buffer(7)]],
                            const device uchar* explained_minima [[buffer(8)]],
                            const device uchar* numbers [[buffer(9)]],
                            const device uchar* column_scales [[buffer(10)]],
                            constant long& columns [[buffer(11)]],
                            constant long& groups [[buffer(12)]],
                            constant long& rows [[buffer(13)]],
                            uint2 tile [[threadgroup_position_in_grid]],
                            uint2 of_tile [[thread_position_in_threadgroup]]) {
    threadgroup float shared[ROTATION ? HEIGHT * SHARED_FLOATS : 1];
    Weight weight = {codes, scales, zeros, minima, group_of_column, (Scales)explained_scales,
                     (Scales)row_scales, (Scales)explained_minima, (Scales)numbers,
                     (Scales)column_scales, (int)columns, (int)groups};
    const int start = tile.x * TILE, position = of_tile.x;
    const Index row = (Index)tile.y * HEIGHT + of_tile.y;
    Floats values[CHUNKS];
    tile_values(weight, row, row < rows, start, position, shared + of_tile.y * SHARED_FLOATS,
                values);
    UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(start, position, chunk);
        if (row < rows && column < weight.columns)
            store(values[chunk], out + row * weight.columns + column);
    }
}
