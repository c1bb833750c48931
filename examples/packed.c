/* The integer operations of a packed file (docs/packed-format.md), on codes: what a program of your own needs beside a
   reader of JSON. Values are (batch, channels, height, width), as q - zero_point; groups of a convolution and dilation
   are left out. Build it without -ffast-math: cc -O2 -ffp-contract=off -shared -fPIC packed.c -lm */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef struct { float scale; int zero_point, low, high; } Grid;

static int code(const uint8_t *packed, int field, size_t i) {
    size_t each = 8 / field;
    int v = packed[i / each] >> (i % each * field) & ((1 << field) - 1);
    return v >= 1 << (field - 1) ? v - (1 << field) : v;
}

static int32_t round_to(float ratio, Grid y) {
    float q = rintf(ratio) + y.zero_point;
    return (int32_t)(q < y.low ? y.low : q > y.high ? y.high : q) - y.zero_point;
}

void requantize(const float *x, size_t count, Grid y, int32_t *out) {
    for (size_t i = 0; i < count; i++) out[i] = round_to(x[i] / y.scale, y);
}

/* weight is packed, (outs, ins, k, k); odd: a code c stands for 2 c + 1 */
void convolution(const int32_t *x, int n, int ins, int rows, int cols, const uint8_t *weight, int field, int odd,
                 int headroom, const float *weight_scale, const int32_t *bias, int outs, int k, int stride, int pad,
                 float x_scale, Grid y, int32_t *out) {
    int out_rows = (rows + 2 * pad - k) / stride + 1, out_cols = (cols + 2 * pad - k) / stride + 1;
    for (int b = 0; b < n; b++) for (int o = 0; o < outs; o++) {
        float factor = (x_scale * weight_scale[o]) / y.scale;
        for (int r = 0; r < out_rows; r++) for (int c = 0; c < out_cols; c++) {
            int32_t sum = bias[o];
            for (int i = 0; i < ins; i++) for (int u = 0; u < k; u++) for (int v = 0; v < k; v++) {
                int at_row = r * stride + u - pad, at_col = c * stride + v - pad;
                if (at_row < 0 || at_row >= rows || at_col < 0 || at_col >= cols) continue;
                int w = code(weight, field, ((size_t)(o * ins + i) * k + u) * k + v);
                sum += x[((size_t)(b * ins + i) * rows + at_row) * cols + at_col] * (odd ? 2 * w + 1 : w) * headroom;
            }
            *out++ = round_to((float)sum * factor, y);
        }
    }
}

void linear(const int32_t *x, int n, int ins, const uint8_t *weight, int field, int odd, const float *scale,
            int one_scale, const float *bias, int outs, float *out) {
    for (int b = 0; b < n; b++) for (int o = 0; o < outs; o++) {
        int32_t sum = 0;
        for (int i = 0; i < ins; i++) {
            int w = code(weight, field, (size_t)o * ins + i);
            sum += x[b * ins + i] * (odd ? 2 * w + 1 : w);
        }
        *out++ = (float)sum * scale[one_scale ? 0 : o] + bias[o];
    }
}
