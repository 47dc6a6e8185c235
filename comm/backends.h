// The two ways to connect, each where this binary was built with its library (Makefile).
#pragma once
#include "comm/communicator.h"

#ifdef WITH_NCCL
std::unique_ptr<Communicator> connect_nccl(Device& device, Control& control);
#endif
#ifdef WITH_GLOO
std::unique_ptr<Communicator> connect_gloo(Device& device, Control& control);
#endif
