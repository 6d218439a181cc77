// The host's side of the emulated machine: options, streams and events, and the functions that Python calls.
#pragma once

#include "machine.h"

namespace emu {

Options& options();
void order_launch(Launch& launch, void* stream, bool overlaps);  // what has ended when it starts, by streams and events
void* create_stream(bool blocking);
void* create_event();
void record_event(void* event, void* stream);
void stream_waits(void* stream, void* event);
void host_waits(void* stream);
void host_waits_for_all();
void forget_launch();  // the newest, which has not run
void forget_launches();

}  // namespace emu
