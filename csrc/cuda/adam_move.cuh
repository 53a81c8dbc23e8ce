// One step of torch.optim.Adam or SGD on an element of d.
#pragma once

#include "table.cuh"

namespace awd::cuda {

// What Adam's bias corrections make of the step size and of the mean square at an iteration; SGD ignores them.
struct Correction {
    double step, unbias;
};

// The optimiser's numbers in the type of d.
template <class Real>
struct Move {
    Real lr, momentum, add, beta2, add_square, eps, l1;
    bool adam, nesterov;

    __device__ __forceinline__ explicit Move(const Elementwise& options)
        : lr(Real(options.lr)),
          momentum(Real(options.momentum)),
          add(Real(1.0 - options.momentum)),
          beta2(Real(options.beta2)),
          add_square(Real(1.0 - options.beta2)),
          eps(Real(options.eps)),
          l1(Real(options.l1)),
          adam(options.adam),
          nesterov(options.nesterov) {}

    // slope: the gradient without that of the l1 penalty.
    __device__ __forceinline__ void step(Real slope, Real correction, Real unbias, Real& d, Real& velocity,
                                         Real& square) const {
        slope += l1 * (d > Real(0) ? Real(1) : d < Real(0) ? Real(-1) : Real(0));
        if (adam) {
            velocity = momentum * velocity + add * slope;
            square = beta2 * square + add_square * (slope * slope);
            d -= correction * velocity / (sqrt(square * unbias) + eps);
        } else {
            velocity = momentum * velocity + slope;
            d -= lr * (nesterov ? slope + momentum * velocity : velocity);
        }
    }
};

}  // namespace awd::cuda
