// What each launcher puts into the environment, and every mistake in it.
#include "comm/world.h"

#include <map>

#include "test/support.h"
#include "test/temp_dir.h"

namespace {

using Variables = std::map<std::string, std::string>;

const char* kKnown[] = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOQT_LAUNCHER", "TORCHELASTIC_USE_AGENT_STORE", "OMPI_COMM_WORLD_RANK",
                        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
                        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"};

// Nothing but these variables, of those that count; the test's own environment comes back.
class Environment {
  public:
    explicit Environment(const Variables& variables) {
        for (const char* name : kKnown) {
            if (const char* value = std::getenv(name)) before_[name] = value;
            unsetenv(name);
        }
        for (auto& [name, value] : variables) {
            REQUIRE(std::find(std::begin(kKnown), std::end(kKnown), name) != std::end(kKnown));
            setenv(name.c_str(), value.c_str(), 1);
        }
    }
    ~Environment() {
        for (const char* name : kKnown) unsetenv(name);
        for (auto& [name, value] : before_) setenv(name.c_str(), value.c_str(), 1);
    }

  private:
    Variables before_;
};

World world_of(const Variables& variables) {
    Environment environment(variables);
    return world_from_environment();
}

std::string mistake(const Variables& variables) {
    Environment environment(variables);
    return user_error([] { world_from_environment(); });
}

Variables with(Variables variables, const Variables& changes) {  // an empty value removes
    for (auto& [name, value] : changes) variables[name] = value;
    return variables;
}

const Variables kTorch = {{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "29500"}};
const Variables kOpenMpi = {{"OMPI_COMM_WORLD_RANK", "3"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "3"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
const Variables kMpich = {{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};
const Variables kSlurm = {{"SLURM_PROCID", "6"},  {"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_NTASKS", "8"}, {"SLURM_LOCALID", "2"}, {"SLURM_STEP_NODELIST", "node[01-02]"},
                          {"SLURM_STEP_NUM_NODES", "2"}, {"SLURM_JOB_ID", "1234567"}};

void check(const World& world, const char* launcher, int rank, int size, int local_rank, const char* address, int port) {
    CHECK(world.launcher == launcher);
    CHECK(world.rank == rank);
    CHECK(world.size == size);
    CHECK(world.local_rank == local_rank);
    CHECK(world.address == address);
    CHECK(world.port == port);
}

}  // namespace

TEST_CASE("The environment of every launcher", "[world]") {
    check(world_of(kTorch), "torchrun", 5, 8, 1, "node7", 29500);
    check(world_of(with(kTorch, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}})), "torchrun", 5, 8, 1, "node7", 29501);
    check(world_of(with(kTorch, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}})), "torchrun", 5, 8, 1, "node7", 29500);
    check(world_of(with(kTorch, {{"LOQT_LAUNCHER", "train_loqt"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}})), "train_loqt", 5, 8, 1, "node7", 29500);
    check(world_of(kOpenMpi), "mpirun", 3, 4, 3, "127.0.0.1", 29517);
    check(world_of(with(kOpenMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"MASTER_ADDR", "a"}, {"MASTER_PORT", "7"}})), "mpirun", 3, 4, 3, "a", 7);
    check(world_of(kMpich), "mpirun", 1, 2, 1, "127.0.0.1", 29517);
    check(world_of(kSlurm), "srun", 6, 8, 2, "node01", 24567);
    check(world_of(with(kSlurm, {{"MASTER_ADDR", "login"}, {"MASTER_PORT", "30000"}})), "srun", 6, 8, 2, "login", 30000);
    check(world_of(with(kSlurm, {{"SLURM_JOB_ID", ""}})), "srun", 6, 8, 2, "node01", 29517);
    check(world_of(with(kSlurm, {{"SLURM_STEP_NUM_NODES", "1"}})), "srun", 6, 8, 2, "127.0.0.1", 24567);
    // The first that is complete.
    Variables all = kTorch;
    for (const Variables& more : {kOpenMpi, kMpich, kSlurm}) all.insert(more.begin(), more.end());
    CHECK(world_of(all).launcher == "torchrun");
    CHECK(world_of(with(all, {{"LOCAL_RANK", ""}, {"MASTER_ADDR", ""}})).launcher == "mpirun");
    CHECK(world_of(with(all, {{"RANK", ""}, {"OMPI_COMM_WORLD_RANK", ""}, {"MPI_LOCALRANKID", ""}, {"MASTER_ADDR", ""}})).launcher == "srun");
}

TEST_CASE("Lists of machines in Slurm's form", "[world]") {
    for (auto& [list, host] : Variables{{"gpu7", "gpu7"},
                                        {"gpu7,gpu9", "gpu7"},
                                        {"node[01-03,05],gpu7", "node01"},
                                        {"node[05,01-03]", "node05"},
                                        {"gpu7,node[01-03]", "gpu7"},
                                        {"rack[2-3]n[08-11]-ib,x", "rack2n08-ib"},
                                        {"node[7]", "node7"}})
        CHECK(world_of(with(kSlurm, {{"SLURM_STEP_NODELIST", list}})).address == host);
    for (const char* list : {"node[01-03", "node[]", ",a"}) CHECK(has(mistake(with(kSlurm, {{"SLURM_STEP_NODELIST", list}})), std::string("SLURM_STEP_NODELIST is \"") + list));
}

TEST_CASE("A process that is alone", "[world]") {
    for (const Variables& variables : {Variables(), {{"RANK", "3"}}, {{"LOCAL_RANK", "1"}}, {{"WORLD_SIZE", "1"}}, {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_RANK", "0"}},
                                       {{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_LOCALID", "0"}, {"SLURM_JOB_ID", "7"}},  // a batch script
                                       with(kSlurm, {{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}}),
                                       {{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}, {"MPI_LOCALRANKID", "0"}}, {{"MASTER_ADDR", "a"}, {"MASTER_PORT", "x"}}}) {
        check(world_of(variables), "", 0, 1, 0, "127.0.0.1", 0);
        CHECK(world_of(variables).alone());
    }
}

TEST_CASE("Mistakes in the environment name the variable", "[world]") {
    for (auto& [name, bad] : std::vector<std::pair<std::string, std::string>>{{"RANK", "8"}, {"RANK", "-1"}, {"RANK", "one"}, {"RANK", "1x"}, {"WORLD_SIZE", "0"}, {"WORLD_SIZE", "2.5"},
                                                                          {"WORLD_SIZE", "99999999999999999999"}, {"LOCAL_RANK", "8"}, {"LOCAL_RANK", " "}, {"MASTER_PORT", "0"},
                                                                          {"MASTER_PORT", "65536"}, {"MASTER_PORT", "http"}}) {
        std::string message = mistake(with(kTorch, {{name, bad}}));
        INFO(message);
        CHECK(has(message, "variable " + name + " is \"" + bad + "\""));
    }
    CHECK(has(mistake(with(kTorch, {{"MASTER_ADDR", ""}})), "MASTER_ADDR is not set"));
    CHECK(has(mistake(with(kTorch, {{"MASTER_PORT", ""}})), "MASTER_PORT is not set"));
    CHECK(has(mistake(with(kTorch, {{"MASTER_PORT", "65535"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}})), "MASTER_PORT"));
    CHECK(has(mistake({{"WORLD_SIZE", "2"}}), "WORLD_SIZE is 2 but RANK is not set"));
    CHECK(has(mistake({{"WORLD_SIZE", "2"}, {"RANK", "1"}}), "LOCAL_RANK is not set"));
    CHECK(has(mistake(with(kOpenMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}})), "MASTER_ADDR is not set"));
    CHECK(has(mistake(with(kMpich, {{"MPI_LOCALNRANKS", ""}})), "MASTER_ADDR is not set"));
    CHECK(has(mistake(with(kOpenMpi, {{"OMPI_COMM_WORLD_RANK", "4"}})), "OMPI_COMM_WORLD_RANK"));
    CHECK(has(mistake(with(kMpich, {{"PMI_RANK", "2"}})), "PMI_RANK"));
    CHECK(has(mistake(with(kSlurm, {{"SLURM_PROCID", "x"}})), "SLURM_PROCID"));
    CHECK(has(mistake(with(kSlurm, {{"SLURM_STEP_NODELIST", ""}})), "MASTER_ADDR is not set"));
    CHECK(has(mistake(with(kSlurm, {{"SLURM_JOB_ID", "x"}})), "SLURM_JOB_ID"));
}

TEST_CASE("Who prints when rank 0 cannot", "[world]") {
    World world;
    world.size = 16;
    std::vector<int> speakers;
    for (world.rank = 0; world.rank < 16; ++world.rank) {
        world.local_rank = world.rank % 8;
        if (world.speaks()) speakers.push_back(world.rank);
    }
    CHECK(speakers == std::vector<int>{0, 1, 8});
}
