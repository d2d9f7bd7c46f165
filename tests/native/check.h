// What programs that test without a framework need: a check that ends them, and random numbers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

std::mt19937_64 generator;

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

}  // namespace
