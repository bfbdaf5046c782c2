// Encodes rows of a weight as int8 codes of the rotated values, see ops/kernels/int8_codes.py. A block of
// threads takes a row, a team of TEAM threads CODE_GROUP columns of it at a time. A thread has TEAM of
// these: neighbours for the strides 1 and 4, then, exchanged in shared memory, such that are TEAM apart for
// 16 and 64. The values of HELD groups stay in registers until the row's largest is known; those of a longer
// row are computed again.

enum {
    CODE_GROUP = 256,
    TEAM = 16,
    PITCH = TEAM + 1,  // of what a thread writes, in shared memory: each to another bank
    HELD = 4,
    WARPS = 8  // at most
};

// What a thread stores at once.
struct alignas(16) Codes {
    Byte code[TEAM];
};

// Rotates each four numbers that are `stride` apart: each becomes the sum of all, less twice the one at
// the other end.
FUNCTION void rotate_fours(float* numbers, int stride) {
    UNROLLED for (int i = 0; i < TEAM; i++) {
        if (i / stride % 4) continue;
        float *a = numbers + i, *b = a + stride, *c = b + stride, *d = c + stride;
        float sum = *a + *b, difference = *a - *b, other_sum = *c + *d, other_difference = *c - *d;
        *a = sum + other_difference;
        *b = sum - other_difference;
        *c = other_sum + difference;
        *d = other_sum - difference;
    }
}

// Rotates a group of a row, or zeros behind its last one. values: those of the thread, TEAM apart. largest:
// becomes the larger of it and their magnitudes, as bits: those of NaN are the largest. Every thread of the
// block calls it.
FUNCTION void rotate_group(Weight weight, Index row, int group, float* shared, float* values,
                           unsigned& largest) {
    const int place = threadIdx.x % TEAM, column = group * CODE_GROUP + place * TEAM;
    UNROLLED for (int first = 0; first < TEAM; first += LANES) {
        Floats chunk = {};
        if (column < weight.columns) chunk = row_values(weight, row, column + first);
        UNROLLED for (int i = 0; i < LANES; i++) values[first + i] = chunk[i] * (1 / 16.0f);
    }
    rotate_fours(values, 1);
    rotate_fours(values, 4);
    wait_for_threads();  // for those that read what was there
    UNROLLED for (int i = 0; i < TEAM; i++) shared[place * PITCH + i] = values[i];
    wait_for_threads();
    UNROLLED for (int i = 0; i < TEAM; i++) values[i] = shared[i * PITCH + place];
    rotate_fours(values, 1);
    rotate_fours(values, 4);
    UNROLLED for (int i = 0; i < TEAM; i++) {
        const unsigned magnitude = __float_as_uint(values[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
}

// Stores the codes of a rotated group, unless it is behind the last one. Every thread of the block calls it.
FUNCTION void store_codes(const float* values, float factor, int group, int columns, Codes* shared,
                          signed char* codes) {
    const int place = threadIdx.x % TEAM, column = group * CODE_GROUP + place * TEAM;
    const float to_integer = 12582912;  // the last bits of a sum with it are the nearest integer
    Byte* bytes = (Byte*)shared;
    wait_for_threads();
    UNROLLED for (int i = 0; i < TEAM; i++)
        bytes[i * TEAM + place] = (Byte)__float_as_uint(values[i] * factor + to_integer);
    wait_for_threads();
    if (column < columns) *(Codes*)(codes + column) = shared[place];
}

// codes: (rows, weight.columns), its address a multiple of 16. weight.columns: a multiple of CODE_GROUP and
// of the weight's blocks.
extern "C" __global__ void int8_rows(Weight weight, signed char* codes, float* code_scales) {
    __shared__ Codes shared[WARPS * 32 / TEAM][PITCH * TEAM * sizeof(float) / sizeof(Codes)];
    __shared__ unsigned peaks[WARPS * 32 / TEAM];
    const Index row = blockIdx.x;
    const int team = threadIdx.x / TEAM, teams = blockDim.x / TEAM;
    const int groups = weight.columns / CODE_GROUP, rounds = (groups + teams - 1) / teams;
    float held[HELD][TEAM], computed[TEAM];
    unsigned largest = 0;
    codes += row * weight.columns;
    UNROLLED for (int round = 0; round < HELD; round++)
        if (round < rounds)
            rotate_group(weight, row, round * teams + team, (float*)shared[team], held[round], largest);
    for (int round = HELD; round < rounds; round++)
        rotate_group(weight, row, round * teams + team, (float*)shared[team], computed, largest);

    for (int distance = TEAM / 2; distance; distance /= 2) {
        const unsigned other = __float_as_uint(shuffled(float_of_bits(largest), distance));
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % TEAM == 0) peaks[team] = largest;
    wait_for_threads();
    for (int other = 0; other < teams; other++)
        largest = peaks[other] > largest ? peaks[other] : largest;
    float peak = float_of_bits(largest < 0x7F800000 ? largest : 0x7FC00000);
    if (peak < TINY) peak = TINY;
    if (threadIdx.x == 0) code_scales[row] = peak / LARGEST_CODE;

    UNROLLED for (int round = 0; round < HELD; round++)
        if (round < rounds)
            store_codes(held[round], LARGEST_CODE / peak, round * teams + team, weight.columns,
                        shared[team], codes);
    for (int round = HELD; round < rounds; round++) {
        rotate_group(weight, row, round * teams + team, (float*)shared[team], computed, largest);
        store_codes(computed, LARGEST_CODE / peak, round * teams + team, weight.columns, shared[team],
                    codes);
    }
}
