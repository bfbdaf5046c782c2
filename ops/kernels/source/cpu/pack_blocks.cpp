// `Search.fit` of whole blocks.

// Packs the LANES blocks from `first` on. Lanes after the last block repeat it.
template <bool WEIGHTED>
static void pack_lanes(const float* values, const float* weights, Byte* codes, float* d,
                       float* dmin, float* scale, float* minimum, Index first, Index count,
                       int tries, int rounds, int sweeps, int emphasis) {
    Blocks<WEIGHTED> blocks;
    for (int lane = 0; lane < LANES; lane++) {
        Index from = (first + lane < count ? first + lane : count - 1) * LENGTH;
        for (int i = 0; i < LENGTH; i++)
            ((float*)blocks.values)[i * LANES + lane] = values[from + i];
        if (WEIGHTED)
            for (int i = 0; i < LENGTH; i++)
                ((float*)blocks.weights)[i * LANES + lane] = weights ? weights[from + i] : 1;
    }
    blocks.normalise();
    if (WEIGHTED && emphasis) blocks.emphasise();
    for (int g = 0; g < GROUPS; g++) blocks.prepare(g);
    Stored best;
    blocks.search(best, tries, rounds, sweeps);
    Bytes indices[LENGTH];
    for (int g = 0; g < GROUPS; g++) {
        Floats inverted = inverse(best.d * best.scale[g]),
               shift = best.dmin * best.minimum[g] * inverted;
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
            indices[i] =
                __builtin_convertvector(nearest(blocks.scaled(i, inverted, shift), true), Bytes);
    }
    blocks.restore(best);
    for (int lane = 0; lane < LANES && first + lane < count; lane++) {
        Index block = first + lane;
        for (int i = 0; i < LENGTH; i++)
            codes[block * LENGTH + i] = ((Byte*)indices)[i * LANES + lane];
        d[block] = best.d[lane];
        if (MINIMUM) dmin[block] = best.dmin[lane];
        for (int g = 0; g < GROUPS; g++) {
            scale[block * GROUPS + g] = best.scale[g][lane];
            if (MINIMUM) minimum[block * GROUPS + g] = best.minimum[g][lane];
        }
    }
}

// values, weights: (count, LENGTH); weights may be null: all equal. The others are those of a
// `Fit`; dmin and minimum are written only where the grid has a minimum.
extern "C" void pack_blocks(const float* values, const float* weights, Byte* codes, float* d,
                            float* dmin, float* scale, float* minimum, Index count, int tries,
                            int rounds, int sweeps, int emphasis, int threads) {
    parallel_for(threads, (count + LANES - 1) / LANES, [=](Index part) {
        const Index first = part * LANES;
        if (weights || emphasis)
            pack_lanes<true>(values, weights, codes, d, dmin, scale, minimum, first, count, tries,
                             rounds, sweeps, emphasis);
        else
            pack_lanes<false>(values, weights, codes, d, dmin, scale, minimum, first, count, tries,
                              rounds, sweeps, emphasis);
    });
}
