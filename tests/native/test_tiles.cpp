// Products in tiles of the sizes that a GPU has, where the other tests have smaller ones: small integers, which come
// out to the bit in every precision, by one block or by a team.
//
//   test_tiles [seed] [products]
#define METAAUG_EMULATE_ALL_THREADS

#include <limits>
#include <vector>

#include "check.h"
#include "cuda/ops/conv2d_tiles.h"

namespace {

using namespace metaaug;

template <class T, bool kByDepth>
void check_product(Precision precision) {
  const bool flat = integer(0, 1);
  const int rows = flat ? integer(1, 16) : integer(1, 150), columns = flat ? integer(17, 600) : integer(1, 150);
  const int depth = integer(1, 70), terms = integer(1, 2), members = integer(1, 5);
  std::vector<T> a[2], b[2];
  for (int term = 0; term < 2; ++term) {
    for (int i = 0; i < rows * depth; ++i) a[term].push_back(T(integer(-3, 3)));
    for (int i = 0; i < columns * depth; ++i) b[term].push_back(T(integer(-3, 3)));
  }
  const cuda::Product<T> products[2] = {{a[0].data(), b[0].data()}, {a[1].data(), b[1].data()}};
  std::vector<T> partials(members * cuda::kTilePartials, std::numeric_limits<T>::quiet_NaN());
  std::vector<T> results[2] = {std::vector<T>(rows * columns, T(0.5)), std::vector<T>(rows * columns, T(0.5))};
  const cuda::TileRoom<T> room{true, partials.data(), precision};
  cuda::emulation::run(1, members, cuda::kThreads, cuda::kTileShared * sizeof(T), [&] {
    const auto of_a = cuda::side<kByDepth>(cuda::Apart{rows, depth}, cuda::Apart{depth, 1}, cuda::AtPlaces());
    const auto of_b = cuda::side<true>(cuda::Apart{columns, depth}, cuda::Apart{depth, 1}, cuda::AtPlaces());
    for (int turn = 0; turn < 2; ++turn)
      cuda::multiply_tiles(room, turn, rows, columns, depth, products, terms, of_a, of_b,
                           [&](int m, int n, T value) { results[turn][m * columns + n] += value; });
  });
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      T sum = T(0.5);
      for (int term = 0; term < terms; ++term)
        for (int k = 0; k < depth; ++k) sum += a[term][m * depth + k] * b[term][n * depth + k];
      for (const std::vector<T>& result : results)
        CHECK(result[m * columns + n] == sum, "[%d, %d] of [%d, %d] over %d x %d by %d: %g, not %g", m, n, rows,
              columns, terms, depth, members, double(result[m * columns + n]), double(sum));
    }
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long long seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
  const int products = count > 2 ? std::atoi(arguments[2]) : 6;
  std::printf("seed %llu\n", seed);
  std::fflush(stdout);
  generator.seed(seed);
  for (int i = 0; i < products; ++i) {
    check_product<double, true>(Precision::kFloat32);
    for (const Precision precision : {Precision::kFloat32, Precision::kTf32, Precision::kBf16}) {
      check_product<float, true>(precision);
      check_product<float, false>(precision);
    }
  }
  std::printf("%d products\n", 7 * products);
}
