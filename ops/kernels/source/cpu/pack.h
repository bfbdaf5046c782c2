// What all kernels that pack share.

const float SMALLEST_NORMAL = __FLT_MIN__;

static FUNCTION Floats all(float value) { return value - (Floats){}; }
static FUNCTION Floats either(Ints condition, Floats these, Floats others) {
    return condition ? these : others;
}
static FUNCTION Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
static FUNCTION Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static FUNCTION Floats magnitude(Floats a) { return (Floats)((Ints)a & 0x7FFFFFFF); }
static FUNCTION Floats inverse(Floats scale) {
    return either(magnitude(scale) < SMALLEST_NORMAL, all(0), 1 / scale);
}

static FUNCTION Floats between(Floats a, float lowest, float highest) {
    return smaller(larger(a, all(lowest)), all(highest));
}

static FUNCTION Floats nearest_integer(Floats small) {
    const float to_integer = 12582912;  // the last bits of a sum with it are the nearest integer
    return small + to_integer - to_integer;
}
