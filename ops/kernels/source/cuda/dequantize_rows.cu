// Writes rows of a weight whose block is a row. out: (rows, weight.columns), with `padding` values that
// are left out behind each row.
extern "C" __global__ void dequantize_rows(Weight weight, TYPE* out, long long rows, int padding) {
    __shared__ float shared[ROTATION ? HEIGHT * SHARED_FLOATS : 1];
    const int start = blockIdx.x * TILE, position = threadIdx.x;
    // As many times for each thread: all reach every barrier.
    const Index step = (Index)gridDim.y * HEIGHT;
    for (Index first = (Index)blockIdx.y * HEIGHT; first < rows; first += step) {
        Index row = first + threadIdx.y;
        Floats values[CHUNKS];
        tile_values(weight, row, row < rows, start, position, shared + threadIdx.y * SHARED_FLOATS,
                    values);
        UNROLLED for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = column_of(start, position, chunk);
            if (row < rows && column < weight.columns)
                store_chunk(out + row * (weight.columns + padding) + column, values[chunk]);
        }
    }
}
