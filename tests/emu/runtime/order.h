// Happens-before beyond one team: see order.cpp.
#pragma once

#include "machine.h"

namespace emu {

bool ordered_elsewhere(const Stamp& s, const Lane& lane);

// Whether the access that left the stamp happened before what `lane` does now.
inline bool ordered(const Stamp& s, const Lane& lane) {
  return s.team == lane.team->serial ? lane.clocks[s.index] >= s.clock : ordered_elsewhere(s, lane);
}

}  // namespace emu
