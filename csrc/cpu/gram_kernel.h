// G of one unit of work, for one instruction set; gram.cpp includes it through foreach_isa.h.

#include "column_products.h"
#include "products.h"

// One item: several units, each a segment of a row group's elements.
template <class Real>
static inline void gram_of_rows(const GramJob& job, int64_t item, double* room) {
    const int64_t square = int64_t(job.in.k) * job.in.k;
    const int64_t size = job.shape.columns;
    const int64_t units = job.shape.rows * job.segments;
    const int64_t end = (item + 1) * job.units_per_item < units ? (item + 1) * job.units_per_item : units;
    for (int64_t unit = item * job.units_per_item; unit < end; ++unit) {
        const int64_t start = unit / job.segments * size, first = unit % job.segments * job.segment;
        const int64_t last = first + job.segment < size ? first + job.segment : size;
        sum_elements<Real>(job.in, start + first, start + last, widened(job.in.k), job.partial + unit * square, room);
    }
}

// One item: a segment of the rows of a tile of columns.
template <class Real>
static inline void gram_of_columns(const GramJob& job, int64_t item, double* room) {
    const int64_t square = int64_t(job.in.k) * job.in.k;
    const int64_t column = item / job.segments * COLUMN_TILE, segment = item % job.segments;
    const int64_t width = std::min(job.shape.columns - column, COLUMN_TILE);
    const int64_t first = segment * job.segment, last = std::min(first + job.segment, job.shape.rows);
    double* out = job.partial + (column * job.segments + segment) * square;
    sum_columns<Real>(job.in, job.shape, column, width, first, last, out, job.segments * square, room);
}

static void gram_item(const GramJob& job, int64_t item, double* room) {
    const bool wide = job.in.dtype == Dtype::f64;
    if (job.shape.by_column) {
        wide ? gram_of_columns<double>(job, item, room) : gram_of_columns<float>(job, item, room);
    } else {
        wide ? gram_of_rows<double>(job, item, room) : gram_of_rows<float>(job, item, room);
    }
}
