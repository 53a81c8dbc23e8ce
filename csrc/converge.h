// Minimisation of one group's loss without a step size: awd_fast/converge.py, which explains it, a group to each lane.
//
// d is described by its K coordinates y in the basis of L, scaled so that the vectors' root mean square norm is 1: x_i
// is row i of L / scale, u_i = x_i - y. |c| is smoothed to sqrt(c^2 + mu^2) - mu. A lane takes the decisions of the
// Python code in the same order; it waits, unchanged, for the others once it has finished. Matrices are row-major
// [K][K]. Functions have the number of tasks as a literal, so that their loops unroll, or 0 where it is not known.
// Included as number.h is, after schedule.h; the including file defines Record, which takes the best losses.

#include "group.h"
#include "number.h"
#include "problem.h"
#include "small_matrix.h"

#ifndef AWD_CONVERGE
#define AWD_CONVERGE

constexpr double START_RADIUS = 0.3;  // mu at which the smoothed loss has few minima
constexpr double POLISH_RADIUS = 1e-3;
constexpr double SHRINK = 0.2;
constexpr double UNEQUAL = 0.25;  // a shortest vector whose squared norm is below this part of the mean
constexpr double TINY = 1e-300;

// The weight of one ordered pair in the mean.
AWD_INLINE double ordered_weight(int k) { return 0.5 * pair_weight(k); }

// What of the vectors at y the pairs need: e, 1 / n, 1 / (n + eps) and 1 / (n (n + eps)); s = y' y as the result.
template <int K, class Stored>
AWD_INLINE Number shift_vectors(const Problem<Stored>& problem, const Stored* y) {
    const int k = tasks<K>(problem);
    const auto& work = problem.work;
    const Number square = span_moments(problem.x, y, k, work.offset);
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        const Number shifted = problem.gram[i * k + i] - 2.0 * work.offset[i];
        Number root, inverse, closing;
        inverse_norm(shifted, problem.eps, root, inverse, closing);
        problem.root[i] = root;
        work.inverse[i] = inverse;
        work.closing[i] = closing;
    }
    return square;
}

// alpha R(d), smoothed by mu / 10, and p, q such that its gradient is p y and its Hessian p I - q y y'.
template <class Stored>
AWD_INLINE Number smoothed_penalty(const Problem<Stored>& problem, Number square, Number mu, Number& p, Number& q) {
    const Number zero = every(0.0);
    p = q = zero;
    if (problem.penalty == Penalty::l2) {
        const Number nu = 0.1 * mu;
        const Number root = square_root(square + nu * nu);
        const Number safe = larger(root, every(TINY));
        const Number inverse = reciprocal(safe);
        p = root > zero ? problem.alpha * inverse : zero;
        q = root > zero ? p * inverse * inverse : zero;
        return problem.alpha * (root - nu);
    }
    if (problem.penalty == Penalty::squared_l2) {
        p = 2.0 * problem.alpha;
        return problem.alpha * square;
    }
    return zero;
}

// The smoothed loss at y; `plain` becomes the loss itself.
template <int K, class Stored>
AWD_OUTLINE Number smoothed_loss(const Problem<Stored>& problem, const Stored* y, Number mu, Number& plain) {
    const int k = tasks<K>(problem);
    const auto& work = problem.work;
    const Number square = shift_vectors<K>(problem, y);
    const bool squared = problem.similarity == Similarity::squared;
    Number smoothed = every(0.0), exact = every(0.0);
    AWD_UNROLL
    for (int i = 1; i < k; ++i) {
        AWD_UNROLL
        for (int j = 0; j < i; ++j) {
            const Number product = (problem.gram[i * k + j] - work.offset[i]) - work.offset[j];
            const Number c = product * (work.inverse[i] * work.inverse[j]);
            if (squared) {
                smoothed += c * c;
            } else {
                const Number size = larger(c * c + mu * mu, every(SMALLEST));
                smoothed += size * inverse_root(size) - mu;
                exact += magnitude(c);
            }
        }
    }
    if (squared) exact = smoothed;
    Number p, q;
    plain = pair_weight(k) * exact + smoothed_penalty(problem, square, every(0.0), p, q);
    return pair_weight(k) * smoothed + smoothed_penalty(problem, square, mu, p, q);
}

// The smoothed loss at y, its gradient and its exact Hessian (lower triangle).
//
// grad c_ij = beta_ij u_i + beta_ji u_j, beta_ij = c_ij pull_i - scale_ij, and hess c_ij is a combination of I and of
// outer products of u_i and u_j, so the Hessian is U' B U + h I with B [K][K], plus the penalty's.
template <int K, bool SQUARED, class Stored>
AWD_OUTLINE Number smoothed_gradient(const Problem<Stored>& problem, const Stored* y, Number mu) {
    const int k = tasks<K>(problem);
    const auto& work = problem.work;
    const Number zero = every(0.0);
    const Number square = shift_vectors<K>(problem, y);
    Number local[K > 0 ? 3 * K : 1];  // registers, where the compiler sees how many
    auto* const slopes = local_or_kept<K>(local, problem.slopes);
    auto* const diagonal = local_or_kept<K>(local + K, problem.diagonal);
    auto* const leaning = local_or_kept<K>(local + 2 * K, problem.leaning);
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        slopes[i] = zero;
        diagonal[i] = zero;
        leaning[i] = zero;
    }
    Number value = zero, multiple = zero;
    const double ordered = ordered_weight(k);
    AWD_UNROLL
    for (int i = 1; i < k; ++i) {
        const Number a_i = work.closing[i], rho_i = work.inverse[i];
        AWD_UNROLL
        for (int j = 0; j < i; ++j) {
            const Number scale = rho_i * work.inverse[j], a_j = work.closing[j];
            const Number c = ((problem.gram[i * k + j] - work.offset[i]) - work.offset[j]) * scale;
            Number slope, bend;
            if (!SQUARED) {
                const Number size = larger(c * c + mu * mu, every(SMALLEST));
                const Number inverse = inverse_root(size);
                value += size * inverse - mu;
                slope = ordered * (c * inverse);
                bend = ordered * ((mu * inverse) * (mu * inverse) * inverse);
            } else {
                value += c * c;
                slope = ordered * 2.0 * c;
                bend = every(ordered * 2.0);
            }
            const Number beta_i = c * a_i - scale, beta_j = c * a_j - scale;
            slopes[i] += slope * beta_i;
            slopes[j] += slope * beta_j;
            const Number across = a_i + a_j, slanted = slope * c, bend_i = bend * beta_i;
            const Number scaled = slope * scale;
            // The parts with c and with the scale of slope hess c_ij; sums of them are taken apart and put together
            // below.
            diagonal[i] += bend_i * beta_i - 2.0 * scaled * a_i;
            diagonal[j] += bend * beta_j * beta_j - 2.0 * scaled * a_j;
            leaning[i] += slanted;
            leaning[j] += slanted;
            const Number bent = bend_i * beta_j + (slanted * (a_i * a_j) - scaled * across);
            problem.bend[i * k + j] = bent;
            problem.bend[j * k + i] = bent;
            multiple += 2.0 * scaled - slanted * across;
        }
    }
    Number p, q;
    const Number penalty = smoothed_penalty(problem, square, mu, p, q);
    Number gradient[K > 0 ? K : 1];
    auto* const sums = local_or_kept<K>(gradient, problem.gradient);
    AWD_UNROLL
    for (int n = 0; n < k; ++n) sums[n] = p * y[n];
    AWD_UNROLL
    for (int i = 0; i < k; ++i) {
        const Number a = work.closing[i];
        problem.bend[i * k + i] = diagonal[i] + leaning[i] * (2.0 * a * a + a * (problem.root[i] * problem.root[i]));
        const Number twice = 2.0 * slopes[i];
        AWD_UNROLL
        for (int n = 0; n < k; ++n) {
            const Number u = problem.x[i * k + n] - y[n];
            problem.u[i * k + n] = u;
            sums[n] += twice * u;
        }
    }
    if (K > 0) {
        AWD_UNROLL
        for (int n = 0; n < k; ++n) problem.gradient[n] = gradient[n];
    }
    for (int i = 0; i < k; ++i) {  // B U
        Number row[K > 0 ? K : 1];
        auto* const to = local_or_kept<K>(row, problem.product + i * k);
        AWD_UNROLL
        for (int n = 0; n < k; ++n) to[n] = zero;
        for (int j = 0; j < k; ++j) {
            const Number bend = 2.0 * problem.bend[i * k + j];
            AWD_UNROLL
            for (int n = 0; n < k; ++n) to[n] += bend * problem.u[j * k + n];
        }
        if (K > 0) {
            AWD_UNROLL
            for (int n = 0; n < k; ++n) problem.product[i * k + n] = row[n];
        }
    }
    for (int m = 0; m < k; ++m) {
        Number row[K > 0 ? K : 1];
        auto* const to = local_or_kept<K>(row, problem.hessian + m * k);
        const Number bent = q * y[m];
        AWD_UNROLL
        for (int n = 0; n <= m; ++n) to[n] = -bent * y[n];
        to[m] += 2.0 * multiple + p;
        for (int i = 0; i < k; ++i) {
            const Number u = problem.u[i * k + m];
            AWD_UNROLL
            for (int n = 0; n <= m; ++n) to[n] += u * problem.product[i * k + n];
        }
        if (K > 0) {
            for (int n = 0; n <= m; ++n) problem.hessian[m * k + n] = row[n];
        }
    }
    return pair_weight(k) * value + penalty;
}

// Damped Newton steps from problem.y on the smoothed loss, in the lanes `active`, mu falling from `radius`; the best
// point is kept. Lanes: the type of a condition.
template <int K, class Stored, class Lanes>
AWD_OUTLINE void descend_newton(Problem<Stored>& problem, Lanes active, double radius, const Converge& options,
                                Record& record) {
    const int k = tasks<K>(problem);
    const Number zero = every(0.0), one = every(1.0), tiny = every(TINY);
    const double lowest = 0.1 * options.tolerance;
    const bool smooth = problem.similarity == Similarity::squared && problem.penalty != Penalty::l2;
    const Number floor = every(lowest);
    Number mu = smooth || radius < lowest ? floor : every(radius);
    Number damping = every(1e-3);
    for (int64_t steps = 0; steps < options.max_iterations && any(active); ++steps) {
        const Number value = problem.similarity == Similarity::squared
                                 ? smoothed_gradient<K, true>(problem, problem.y, mu)
                                 : smoothed_gradient<K, false>(problem, problem.y, mu);
        Number size = zero;
        for (int n = 0; n < k; ++n) size += magnitude(problem.hessian[n * k + n]);
        size = size * (1.0 / double(k)) + TINY;
        const auto solvable = factor_cholesky(problem.hessian, damping * size, k, problem.factor);
        for (int n = 0; n < k; ++n) problem.step[n] = -problem.gradient[n];
        solve_cholesky(problem.factor, k, problem.step);
        Number model = zero;
        for (int m = 0; m < k; ++m) {
            problem.trial[m] = problem.y[m] + problem.step[m];
            Number bent = 0.5 * problem.hessian[m * k + m] * problem.step[m];
            for (int n = 0; n < m; ++n) bent += problem.hessian[m * k + n] * problem.step[n];
            model -= problem.step[m] * (problem.gradient[m] + bent);
        }
        Number plain;
        const Number drop = value - smoothed_loss<K>(problem, problem.trial, mu, plain);
        const auto good = solvable & (drop > zero);
        const auto moved = active & good;
        const auto lower = moved & (plain < problem.best_value);
        problem.best_value = lower ? plain : problem.best_value;
        for (int n = 0; n < k; ++n) {
            problem.y[n] = moved ? problem.trial[n] : problem.y[n];
            problem.best[n] = lower ? problem.trial[n] : problem.best[n];
        }
        record.add(problem.best_value);

        const Number ratio = drop * reciprocal(larger(model, tiny));
        const Number shrink = every(SHRINK), grow = every(1.0 / SHRINK);
        const Number change = (good & (ratio > every(0.5))) ? shrink : ((good & (ratio > every(0.1))) ? one : grow);
        const Number next = smaller(larger(damping * change, every(1e-9)), every(1e12));
        const auto stuck = solvable & opposite(drop > zero) & (magnitude(model) < 1e-3 * mu);
        const auto settled = (good & (drop < 0.1 * mu)) | stuck | (next > every(1e10));
        const auto finished = settled & (mu <= floor);
        damping = active ? (settled ? smaller(next, one) : next) : damping;
        mu = (active & settled) ? larger(mu * SHRINK, floor) : mu;
        active = active & opposite(finished);
    }
}

// Steps from 0 whose sizes [ANNEAL_STEPS] shrink. Leaves the best point seen in problem.y and offers it in the lanes
// `wanted`.
template <int K, class Stored, class Lanes>
AWD_OUTLINE void descend_annealed(Problem<Stored>& problem, Lanes wanted, const Schedule& schedule,
                                  const double* sizes) {
    const int k = tasks<K>(problem);
    Number local[K > 0 ? 9 * K : 1];  // registers, where the compiler sees how many
    auto* const at = local_or_kept<K>(local, problem.trial);
    auto* const velocity = local_or_kept<K>(local + K, problem.velocity);
    auto* const point = local_or_kept<K>(local + 2 * K, problem.lowest);
    using Work = std::remove_pointer_t<decltype(at)>;
    const auto work =
        GroupWorkOf<std::remove_const_t<Work>>::at(local_or_kept<K>(local + 3 * K, problem.work.offset), k);
    const double weight = pull_weight(k, problem.similarity, 1.0);
    AWD_UNROLL
    for (int n = 0; n < k; ++n) {
        at[n] = every(0.0);
        velocity[n] = every(0.0);
        point[n] = every(0.0);
    }
    Number lowest = every(HUGE_VAL), factor = every(1.0);
    if (schedule.power != 0.0) factor = schedule.power == 0.5 ? square_root(problem.shortest) : problem.shortest;
    for (int index = 0; index < ANNEAL_STEPS; ++index) {
        const Number square = span_moments(problem.x, at, k, work.offset);
        inverse_norms(problem.gram, k, problem.eps, work);
        Number value = similarity_of(problem.gram, k, problem.similarity, index == 0, work);
        value += problem.alpha * penalty(square, problem.penalty);
        const auto lower = value < lowest;
        lowest = lower ? value : lowest;
        AWD_UNROLL
        for (int n = 0; n < k; ++n) point[n] = lower ? at[n] : point[n];
        auto* const slope = work.offset;
        span_slope(problem.x, at, k, weight, problem.alpha * penalty_slope(square, problem.penalty), work, slope);
        const Number size = sizes[index] * factor;
        AWD_UNROLL
        for (int n = 0; n < k; ++n) {
            velocity[n] = schedule.momentum * velocity[n] + slope[n];
            at[n] -= size * velocity[n];
        }
    }
    const auto lower = wanted & (lowest < problem.best_value);
    problem.best_value = lower ? lowest : problem.best_value;
    for (int n = 0; n < k; ++n) {
        problem.y[n] = point[n];
        problem.best[n] = lower ? point[n] : problem.best[n];
    }
}

// All ways, one after the other, from a posed problem; the best point is left in problem.best. records: one for each
// way. K, ANNEALED: the number of tasks as a literal for the Newton steps and for the annealed descents, or 0.
template <int K, int ANNEALED, class Stored>
AWD_OUTLINE void descend_ways(Problem<Stored>& problem, const Converge& options, const StepSizes& sizes,
                              Record* records) {
    const auto everywhere = every(0.0) == every(0.0);
    records[0].add(problem.best_value);
    descend_newton<K>(problem, everywhere, START_RADIUS, options, records[0]);
    records[0].close(problem.best_value);
    for (int way = 0; way < DESCENTS; ++way) {
        const Schedule schedule = schedule_of(way);
        Record& record = records[1 + way];
        auto wanted = everywhere;
        if (schedule.needed != Needed::always) wanted = problem.best_value > every(options.tolerance);
        if (schedule.needed == Needed::where_unequal) wanted = wanted & (problem.shortest < every(UNEQUAL));
        if (any(wanted)) {
            descend_annealed<ANNEALED>(problem, wanted, schedule, sizes.of[way]);
            record.add(problem.best_value);
            descend_newton<K>(problem, wanted, POLISH_RADIUS, options, record);
        }
        record.close(problem.best_value);
    }
}

template <class Stored>
AWD_OUTLINE void descend_all_ways(Problem<Stored>& problem, const Converge& options, const StepSizes& sizes,
                                  Record* records) {
    switch (problem.k) {
        case 3:
            return descend_ways<3, 3>(problem, options, sizes, records);
        case 4:
            return descend_ways<4, 4>(problem, options, sizes, records);
        case 8:
            return descend_ways<8, 8>(problem, options, sizes, records);
        default:
            return descend_ways<0, 0>(problem, options, sizes, records);
    }
}

// The problem of vectors with Gram matrix G: in the basis of L, scaled, and the objective in that scale; its best point
// is d = 0.
template <class Stored>
AWD_OUTLINE void pose(Problem<Stored>& problem, const Stored* gram, const Objective& objective) {
    const int k = problem.k;
    const Number zero = every(0.0);
    Number sum = zero;
    for (int i = 0; i < k; ++i) sum += gram[i * k + i];
    const Number size = square_root(sum * (1.0 / double(k)));
    const Number scale = size > zero ? size : every(1.0);
    factor_gram(gram, k, problem.x);
    const Number inverse = reciprocal(scale);
    for (int index = 0; index < k * k; ++index) {
        problem.x[index] *= inverse;
        problem.gram[index] = gram[index] * inverse * inverse;
    }
    problem.shortest = every(1.0);
    for (int i = 0; i < k; ++i) {
        const Number square = problem.gram[i * k + i];
        problem.shortest = square > every(TINY) ? smaller(square, problem.shortest) : problem.shortest;
    }
    const Number power = objective.penalty == Penalty::squared_l2 ? scale * scale : scale;
    problem.similarity = objective.similarity;
    problem.penalty = objective.penalty;
    // The mean over groups divides the similarity by their number; here it multiplies the penalty instead.
    problem.alpha = objective.penalty == Penalty::none ? zero : objective.alpha * objective.total * power;
    problem.eps = objective.eps * inverse;
    for (int n = 0; n < k; ++n) {
        problem.y[n] = zero;
        problem.best[n] = zero;
    }
    smoothed_loss<0>(problem, problem.y, zero, problem.best_value);
    problem.best_value += defect(gram, k);
}

#endif
