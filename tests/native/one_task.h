// An encoder's samples as the query set of one task that takes no step.
#pragma once

#include "call.h"

namespace metaaug {

template <class T>
Call<T> as_one_task(const Encoding<T>& encoding) {
  Call<T> call;
  call.tasks = 1;
  call.parameters = encoding.parameters;
  call.buffers = encoding.buffers;
  call.rates.resize(encoding.parameters.size());
  call.wanted = encoding.wanted;
  call.query.count = encoding.samples;
  call.query.x = encoding.x;
  call.prediction_adjoint = encoding.adjoint;
  call.predictions = encoding.output;
  call.statistics = encoding.statistics;
  call.grad_parameters = encoding.grad_parameters;
  call.grad_query_x = encoding.grad_x;
  return call;
}

}  // namespace metaaug
