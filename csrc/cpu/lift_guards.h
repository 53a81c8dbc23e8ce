// Lets the headers that are included once per instruction set be included for the next; see foreach_isa.h.
#undef AWD_VECTOR_LANES
#undef AWD_INLINE
#undef AWD_NUMBER
#undef AWD_GROUP
#undef AWD_SMALL_MATRIX
#undef AWD_PROBLEM
#undef AWD_CONVERGE
#undef AWD_STORAGE
#undef AWD_PRODUCTS
#undef AWD_WEIGHTED_SUM
#undef AWD_ITERATE
#undef AWD_FETCH
#undef AWD_COLUMN_PRODUCTS
#undef AWD_CONVERGE_LANES
#undef AWD_MAGNITUDES
#undef AWD_PHILOX
#undef AWD_DROP
