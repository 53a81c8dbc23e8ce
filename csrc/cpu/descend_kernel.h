// All iterations for one item of work, for one instruction set; descend.cpp includes it through foreach_isa.h.

#include "converge_lanes.h"
#include "iterate.h"

static void sgd_item(const SgdJob& job, int64_t item, double* room) {
    const int64_t first = item * ITEM_GROUPS, at = item - job.first_item;
    double* states = job.states == nullptr ? nullptr : job.states + at * ITEM_GROUPS * 2 * job.k;
    Fetcher nothing;
    sgd_groups(job, first, std::min(first + ITEM_GROUPS, job.groups), job.histories + at * job.stretch, states, room,
               nothing);
}

static void converge_item(const ConvergeJob& job, int64_t item, double* room) {
    const int64_t first = item * ITEM_GROUPS, at = item - job.first_item;
    converge_groups(job, first, std::min(first + ITEM_GROUPS, job.groups),
                    job.histories + at * converge_entries(job.options), job.lengths + at * WAYS, room);
}
