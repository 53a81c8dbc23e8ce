// One group as Converge sees it, scaled, and room to work on it. Included as number.h is.

#include "group.h"
#include "number.h"

#ifndef AWD_PROBLEM
#define AWD_PROBLEM

// The scaled groups and room to work on them.
template <class Stored>
struct Problem {
    int k;
    Similarity similarity;
    Penalty penalty;
    Number eps, alpha;
    Stored *gram, *x, *u, *bend, *product, *hessian, *factor;        // [K][K]
    GroupWorkOf<Stored> work;                                        // [K] of the vectors, as the next
    Stored *root, *slopes, *diagonal, *leaning;                      // 1 / n_i, and sums over pairs
    Stored *y, *best, *gradient, *step, *trial, *velocity, *lowest;  // [K] coordinates
    Number best_value;
    Number shortest;  // squared norm of the shortest vector other than 0, at most 1

    // room: 7 K^2 + 17 K numbers.
    AWD_DEVICE void place(Stored* room) {
        Stored** const matrices[] = {&gram, &x, &u, &bend, &product, &hessian, &factor};
        Stored** const rows[] = {&root,     &slopes, &diagonal, &leaning,  &y,     &best,
                                 &gradient, &step,   &trial,    &velocity, &lowest};
        for (Stored** matrix : matrices) {
            *matrix = room;
            room += k * k;
        }
        for (Stored** row : rows) {
            *row = room;
            room += k;
        }
        work = GroupWorkOf<Stored>::at(room, k);
    }
};

template <int K, class Stored>
AWD_INLINE int tasks(const Problem<Stored>& problem) {
    return K > 0 ? K : problem.k;
}

#endif
