// What a user should hear about a configuration that is valid but unlikely to be meant.
#pragma once
#include <functional>
#include <string>

#include "runtime/config.h"

// On the settings of the method of a new run, a line each; empty: nothing to say. file_name and file: the configuration file; config: with the command line on
// top; asked: whether the command line sets a key. The figures behind it are in docs/experiments.md.
std::string method_remarks(const std::string& file_name, const Config& file, const Config& config, const std::function<bool(const char*)>& asked);
