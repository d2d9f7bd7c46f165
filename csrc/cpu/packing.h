// Where each parameter lies: torch's layout outside, panels and padded channels inside.
#pragma once

#include "../graph.h"
#include "gemm.h"

namespace metaaug::METAAUG_ISA {

// A matrix of so few outputs is kept as [outputs, inputs]; see ops/narrow.h.
template <class T>
bool narrow_matrix(const Parameter& p) {
  return p.layout == LayoutKind::kMatrix && p.kernel.y * p.kernel.x == 1 && 4 * p.outputs <= Simd<T>::kWidth;
}

template <class T>
class Packing {
 public:
  explicit Packing(const std::vector<Parameter>& parameters) {
    for (const Parameter& p : parameters) {
      Entry entry{p, size_, flat_size_, 0, pad<T>(p.outputs)};
      const int64_t taps = int64_t{p.kernel.y} * p.kernel.x;
      entry.size = narrow_matrix<T>(p)                ? p.outputs * pad<T>(p.inputs)
                   : p.layout == LayoutKind::kMatrix  ? taps * p.inputs * entry.row
                   : p.layout == LayoutKind::kPicture ? taps * entry.row
                                                      : p.rows * entry.row;
      size_ += entry.size;
      flat_size_ += p.size();
      entries_.push_back(entry);
    }
  }

  int count() const { return int(entries_.size()); }
  int64_t size() const { return size_; }            // of all parameters, padded
  int64_t flat_size() const { return flat_size_; }  // in the user's layout
  int64_t offset(int p) const { return entries_[p].offset; }
  int64_t size(int p) const { return entries_[p].size; }
  int64_t row(int p) const { return entries_[p].row; }
  int64_t flat_offset(int p) const { return entries_[p].flat_offset; }
  int64_t flat_size(int p) const { return entries_[p].parameter.size(); }

  // One parameter, or one tensor of its shape; target's padding must be zero already.
  void pack(int p, const T* flat, T* target) const {
    each_position(p, [&](int64_t i, int64_t position) { target[position] = flat[i]; });
  }
  void unpack(int p, const T* packed, T* flat) const {
    each_position(p, [&](int64_t i, int64_t position) { flat[i] = packed[position]; });
  }
  void pack_all(const T* flat, T* target) const {
    for (int p = 0; p < count(); ++p) pack(p, flat + flat_offset(p), target + offset(p));
  }
  // Of tensors, one for each parameter.
  std::vector<T> packed(const std::vector<const T*>& tensors) const {
    std::vector<T> result(size_, T(0));
    for (int p = 0; p < count(); ++p) pack(p, tensors[p], result.data() + offset(p));
    return result;
  }
  void unpack_all(const T* packed, T* flat) const {
    for (int p = 0; p < count(); ++p) unpack(p, packed + offset(p), flat + flat_offset(p));
  }

 private:
  struct Entry {
    Parameter parameter;
    int64_t offset, flat_offset, size, row;
  };

  // body(index in the user's layout, place in the engine's)
  template <class Body>
  void each_position(int p, const Body& body) const {
    const Parameter& q = entries_[p].parameter;
    const int64_t taps = int64_t{q.kernel.y} * q.kernel.x, row = entries_[p].row;
    int64_t i = 0;
    if (narrow_matrix<T>(q)) {
      for (int64_t output = 0; output < q.outputs; ++output)
        for (int64_t input = 0; input < q.inputs; ++input) body(i++, output * pad<T>(q.inputs) + input);
    } else if (q.layout == LayoutKind::kMatrix) {
      const Panels<T> panels{taps * q.inputs, row};
      for (int64_t output = 0; output < q.outputs; ++output) {
        const int64_t first = panels.at(0, output), apart = panels.width(int(output / Panels<T>::kColumns));
        for (int64_t input = 0; input < q.inputs; ++input)
          for (int64_t tap = 0; tap < taps; ++tap) body(i++, first + (tap * q.inputs + input) * apart);
      }
    } else if (q.layout == LayoutKind::kPicture) {
      for (int64_t output = 0; output < q.outputs; ++output)
        for (int64_t tap = 0; tap < taps; ++tap) body(i++, tap * row + output);
    } else {
      for (int64_t step = 0; step < q.rows; ++step)
        for (int64_t output = 0; output < q.outputs; ++output) body(i++, step * row + output);
    }
  }

  std::vector<Entry> entries_;
  int64_t size_ = 0, flat_size_ = 0;
};

}  // namespace metaaug::METAAUG_ISA
