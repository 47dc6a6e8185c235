// See world.h.
#include "comm/world.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "runtime/error.h"

namespace {

constexpr int kDefaultPort = 29517;

// Empty where it is not set.
std::string variable(const char* name) {
    const char* text = std::getenv(name);
    return text ? text : "";
}

bool is_set(const char* name) { return !variable(name).empty(); }

long long number(const char* name, long long low, long long high) {
    std::string text = variable(name);
    char* end = nullptr;
    errno = 0;
    long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || errno || value < low || value > high)
        throw UserError(format("the environment variable %s is \"%s\"; it must be a whole number from %lld to %lld", name, text.c_str(), low, high));
    return value;
}

// What a launcher calls its variables.
struct Names {
    const char *launcher, *rank, *size, *local_rank;
};

constexpr Names kTorchrun = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"};
constexpr Names kLaunchers[] = {
    kTorchrun,
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"},
};

bool complete(const Names& names) { return is_set(names.rank) && is_set(names.size) && is_set(names.local_rank); }

// The first name of a Slurm list such as "node[01-03,05],gpu7": what is before a bracket, the first number in it, what comes after.
std::string first_host(const std::string& list) {
    std::string host;
    for (size_t i = 0; i < list.size() && list[i] != ',';) {
        if (list[i] != '[') {
            host += list[i++];
            continue;
        }
        size_t close = list.find(']', i), end = list.find_first_of("-,]", i);
        if (close == std::string::npos || end == i + 1) return "";
        host += list.substr(i + 1, end - i - 1);
        i = close + 1;
    }
    return host;
}

// Rank 0's machine where MASTER_ADDR does not say it; empty: not known.
std::string address_of_root(const World& world) {
    if (world.launcher == "mpirun") {
        for (const char* here : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"})
            if (variable(here) == std::to_string(world.size)) return "127.0.0.1";
    } else if (world.launcher == "srun") {
        if (variable("SLURM_STEP_NUM_NODES") == "1") return "127.0.0.1";  // its name need not be known inside a container
        std::string list = variable("SLURM_STEP_NODELIST"), host = first_host(list);
        if (!list.empty() && host.empty()) throw UserError("the environment variable SLURM_STEP_NODELIST is \"" + list + "\", no list of machines; set MASTER_ADDR to rank 0's");
        return host;
    }
    return "";
}

int port_of_root(const World& world) {
    if (is_set("MASTER_PORT")) {
        bool taken = world.launcher == "torchrun" && variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
        return int(number("MASTER_PORT", 1, taken ? 65534 : 65535)) + taken;
    }
    if (world.launcher == "srun" && is_set("SLURM_JOB_ID")) return 20000 + int(number("SLURM_JOB_ID", 0, INT64_MAX) % 10000);
    if (world.launcher == "srun" || world.launcher == "mpirun") return kDefaultPort;
    throw UserError("the environment variable MASTER_PORT is not set: the port on which rank 0 listens (RANK and WORLD_SIZE are set, as torchrun does)");
}

World world_of(const Names& names) {
    World world;
    world.size = int(number(names.size, 1, 1 << 20));
    world.rank = int(number(names.rank, 0, world.size - 1));
    world.local_rank = int(number(names.local_rank, 0, world.size - 1));
    if (world.alone()) return World();
    world.launcher = &names == &kLaunchers[0] && variable("LOQT_LAUNCHER") == "train_loqt" ? "train_loqt" : names.launcher;
    world.address = is_set("MASTER_ADDR") ? variable("MASTER_ADDR") : address_of_root(world);
    if (world.address.empty())
        throw UserError(format("the environment variable MASTER_ADDR is not set: the name or address of the machine of rank 0 (this is rank %d of %d, started by %s)", world.rank,
                               world.size, world.launcher.c_str()));
    world.port = port_of_root(world);
    return world;
}

}  // namespace

World world_from_environment() {
    for (const Names& names : kLaunchers)
        if (complete(names)) return world_of(names);
    // Two processes that take themselves for the only one would write over each other's run.
    if (is_set("WORLD_SIZE") && number("WORLD_SIZE", 1, 1 << 20) > 1)
        for (const char* name : {kTorchrun.rank, kTorchrun.local_rank})
            if (!is_set(name))
                throw UserError(format("the environment variable WORLD_SIZE is %s but %s is not set; start the processes with --gpus, torchrun, mpirun or srun, or unset WORLD_SIZE",
                                       variable("WORLD_SIZE").c_str(), name));
    return World();
}
