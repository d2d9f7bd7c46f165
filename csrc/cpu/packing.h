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
      Entry entry{size_, flat_size_, 0, 0, p.size(), {}};
      const int taps = p.kernel.y * p.kernel.x;
      const Panels<T> panels{int64_t{taps} * p.inputs, pad<T>(p.outputs)};
      const int64_t padded = pad<T>(p.outputs);
      entry.position.reserve(p.size());
      for (int64_t i = 0; i < p.size(); ++i) {
        if (narrow_matrix<T>(p)) {
          entry.position.push_back(int32_t(i / p.inputs * pad<T>(p.inputs) + i % p.inputs));
        } else if (p.layout == LayoutKind::kMatrix) {
          const int64_t tap = i % taps, input = i / taps % p.inputs, output = i / (int64_t{taps} * p.inputs);
          entry.position.push_back(int32_t(panels.at(tap * p.inputs + input, output)));
        } else if (p.layout == LayoutKind::kPicture) {
          entry.position.push_back(int32_t(i % taps * padded + i / taps));
        } else {
          entry.position.push_back(int32_t(i / p.outputs * padded + i % p.outputs));
        }
      }
      entry.row = padded;
      entry.size = narrow_matrix<T>(p)                ? p.outputs * pad<T>(p.inputs)
                   : p.layout == LayoutKind::kMatrix  ? panels.size()
                   : p.layout == LayoutKind::kPicture ? taps * padded
                                                      : p.rows * padded;
      size_ += entry.size;
      flat_size_ += entry.flat_size;
      entries_.push_back(std::move(entry));
    }
  }

  int count() const { return int(entries_.size()); }
  int64_t size() const { return size_; }            // of all parameters, padded
  int64_t flat_size() const { return flat_size_; }  // in the user's layout
  int64_t offset(int p) const { return entries_[p].offset; }
  int64_t size(int p) const { return entries_[p].size; }
  int64_t row(int p) const { return entries_[p].row; }
  int64_t flat_offset(int p) const { return entries_[p].flat_offset; }
  int64_t flat_size(int p) const { return entries_[p].flat_size; }

  // One parameter, or one tensor of its shape; target's padding must be zero already.
  void pack(int p, const T* flat, T* target) const {
    const auto& position = entries_[p].position;
    for (size_t i = 0; i < position.size(); ++i) target[position[i]] = flat[i];
  }
  void unpack(int p, const T* packed, T* flat) const {
    const auto& position = entries_[p].position;
    for (size_t i = 0; i < position.size(); ++i) flat[i] = packed[position[i]];
  }
  void pack_all(const T* flat, T* target) const {
    for (int p = 0; p < count(); ++p) pack(p, flat + flat_offset(p), target + offset(p));
  }
  void unpack_all(const T* packed, T* flat) const {
    for (int p = 0; p < count(); ++p) unpack(p, packed + offset(p), flat + flat_offset(p));
  }

 private:
  struct Entry {
    int64_t offset, flat_offset, size, row, flat_size;
    std::vector<int32_t> position;
  };
  std::vector<Entry> entries_;
  int64_t size_ = 0, flat_size_ = 0;
};

}  // namespace metaaug::METAAUG_ISA
