// Included before every C++ file of llama.cpp where GCC compiles it. GCC 12's _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes
// of the configuration; the others are then never written, and the first AMX product ends in a segmentation fault.
#pragma once

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

static inline void load_tile_config(const void* config) { __asm__ volatile("ldtilecfg %0" ::"m"(*static_cast<const char (*)[64]>(config))); }
#define _tile_loadconfig load_tile_config
#endif
