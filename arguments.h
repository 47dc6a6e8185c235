// The command line, and the configuration that it and the files it names come to.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "runtime/config.h"
#include "sample.h"

struct Arguments {
    std::string config_file, export_dir, export_dtype = "bf16";
    bool resume = false, plan = false, json = false, sample = false;
    bool paper = false;  // its settings are the first overrides
    SampleOptions sampling;
    std::vector<Override> overrides;
    std::string program_dir;
};

// Throws UserError for what it does not understand; prints and ends for --help.
Arguments parse(int argc, char** argv);

// The run's own config.json on --resume, --sample and --export; else the given file. Command-line values go on top. ranks says how many processes are to
// train by a configuration. changes: what differs from the run's own. remark: for the user, once, a line or several; empty: none. Throws UserError.
using RankCount = std::function<int64_t(const Config&)>;
Config configure(const Arguments& arguments, bool existing_run, const RankCount& ranks, std::vector<std::string>& changes, std::string& remark);

// A RankCount: how many processes run.gpus asks for, on this machine.
int64_t processes_wanted(const Config& config);
