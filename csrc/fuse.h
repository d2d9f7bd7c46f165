// Ops that are done together with the one in front of them, so that what lies between is never stored.
#pragma once

#include "graph.h"

namespace metaaug {

// Draws the relu and the 2x2 max pool behind a batch norm into it, and, `with_products`, a relu behind a convolution.
// Finds the biases in front of batch norms, whose gradient is zero: a norm takes away what all its samples share.
Graph fuse(Graph graph, bool with_products);

}  // namespace metaaug
